// launch — how every launcher starts its kernel, and what a kernel says about its neighbours in the stream.
//
// Programmatic dependent launch (sm_90, Launch::overlap = 1): a kernel may begin while its predecessor drains. Each kernel
//   1. calls overlap_next() at its top, so that its successor may be brought up as soon as SMs have room;
//   2. may prefetch what no kernel writes (weights);
//   3. calls wait_previous() in EVERY block, also in one with nothing to do, before it touches anything another kernel wrote
//      or reads. If all left without waiting, their grid would complete before the grid in front of it has, and the grid after
//      the next would then see unfinished data.
// attn_decode may do 3 last, and wait for a word that says what is there instead; the product behind it may have as its predecessor what
// attention follows, and wait for attention by words (ready.cuh).
// embed, which begins each step, does 1 after 3: what is launched behind it may read at once what was written in front of it.
// On sm_80 both are empty and the stream orders the kernels; the device layer then passes overlap = 0.
#pragma once
#include <atomic>
#include <cuda_runtime.h>
#include <stdint.h>
#include "kernels.h"

__device__ __forceinline__ void overlap_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Multiprocessors of the current device if it runs KERNEL as it was made for sm_90a, else 0: elsewhere it runs what the driver made of an
// older target's PTX, in which such a kernel is empty. The runtime is asked once a device.
template <auto KERNEL>
uint32_t hopper_multiprocessors() {
    constexpr int DEVICES = 64;
    static std::atomic<uint32_t> answers[DEVICES];  // and 1; 0: not asked yet
    int device = 0, multiprocessors = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    const uint32_t known = device < DEVICES ? answers[device].load(std::memory_order_relaxed) : 0;
    if (known) return known - 1;
    cudaFuncAttributes made = {};
    if (cudaFuncGetAttributes(&made, KERNEL) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
    const uint32_t answer = made.ptxVersion == 90 ? multiprocessors : 0;
    if (device < DEVICES) answers[device].store(answer + 1, std::memory_order_relaxed);
    return answer;
}

// Bytes of dynamic shared memory a kernel gets without asking.
constexpr size_t DEFAULT_SMEM_BYTES = 48 * 1024;

// TOGETHER: all blocks run at once or none does (a cooperative launch); for kernels whose blocks wait for each other.
template <bool TOGETHER = false, typename Params>
int32_t launch(void (*kernel)(Params), dim3 grid, uint32_t threads, size_t smem_bytes, const Launch* l, const Params& p,
               uint32_t cluster = 1) {
    if (smem_bytes > DEFAULT_SMEM_BYTES) {
        cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem_bytes);
        if (e != cudaSuccess) return (int32_t)e;
    }
    cudaLaunchAttribute attributes[3] = {};
    uint32_t count = 0;
    if (TOGETHER) {
        attributes[count].id = cudaLaunchAttributeCooperative;
        attributes[count++].val.cooperative = 1;
    }
    if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count++].val.clusterDim = {cluster, 1, 1};
    }
    if (l->overlap) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = (cudaStream_t)l->stream;
    config.attrs = attributes;
    config.numAttrs = count;
    cudaError_t e = cudaLaunchKernelEx(&config, kernel, p);
    // Clears the sticky copy of a launch error, so that the next launcher does not report it again.
    cudaError_t last = cudaGetLastError();
    return (int32_t)(e != cudaSuccess ? e : last);
}
