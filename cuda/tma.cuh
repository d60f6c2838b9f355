// tma — tensor maps, and copies of boxes of a tensor to shared memory by the copy engine (sm_90).
//
// A map describes a tensor in global memory and the box one copy takes; what of a box lies outside the tensor arrives as zeros, and
// counts as bytes like the rest. It is made on the host and reaches the kernel as a __grid_constant__ parameter.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include "units.cuh"

// A tensor of `RANK` dimensions, innermost first; stride_bytes[i] between neighbours of dimension i + 1.
template <int RANK>
struct TensorShape {
    CUtensorMapDataType type;
    cuuint64_t size[RANK], stride_bytes[RANK - 1];
    cuuint32_t box[RANK];
    CUtensorMapSwizzle swizzle;
};

// cuTensorMapEncodeTiled of the driver: the runtime finds it, so that nothing is linked to libcuda.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

template <int RANK>
cudaError_t make_tensor_map(CUtensorMap* map, const void* data, const TensorShape<RANK>& s) {
    static EncodeTiled encode = nullptr;  // the same for every thread that asks
    if (!encode) {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        if (e != cudaSuccess) return e;
        if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
        encode = (EncodeTiled)entry;
    }
    cuuint32_t step[RANK];
    for (int i = 0; i < RANK; i++) step[i] = 1;
    const CUresult r = encode(map, s.type, RANK, const_cast<void*>(data), s.size, s.stride_bytes, s.box, step,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, s.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#if __CUDA_ARCH__ >= 900
constexpr uint64_t L2_NORMAL = 0x1000000000000000ull;
constexpr uint64_t L2_EVICT_FIRST = 0x12F0000000000000ull;

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// The box at (c0, c1) or (c0, c1, c2) to shared address `to`; its bytes are reported to `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, uint32_t c0, uint32_t c1, uint64_t* barrier, uint64_t hint) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(to), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "l"(hint) : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, uint32_t c0, uint32_t c1, uint32_t c2, uint64_t* barrier,
                                         uint64_t hint) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;"
        ::"r"(to), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(hint) : "memory");
}
// Shared address `from` to the box at (c0, c1), without what lies outside the tensor. A negative place is an illegal instruction.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t c0, uint32_t c1, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(c0), "r"(c1), "r"(from)
                 : "memory");
}
// Waits until shared memory was read by all this thread's stores.
__device__ __forceinline__ void store_boxes_read() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
#endif
