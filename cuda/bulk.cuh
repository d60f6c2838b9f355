// bulk — what a kernel that streams weights needs of sm_90: mbarriers and one-dimensional bulk copies (the copy engine of an SM).
//
// A barrier of count n completes a phase when n arrivals and all announced bytes are in; `parity` is the phase's number modulo 2,
// counted from 0. Waiting for parity 1 on a fresh barrier returns at once: "the phase before the first is over".
#pragma once
#include <stdint.h>
#include "units.cuh"

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}
// Makes the initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// By shared address, or by pointer.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t count = 1) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, uint32_t count = 1) { barrier_arrive(smem_address(barrier), count); }
// One arrival, and `bytes` more to wait for.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) { barrier_expect(smem_address(barrier), bytes); }
// Whether the phase is over, without waiting.
__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}"
        ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) { barrier_wait(smem_address(barrier), parity); }

// The same for what blocks of the cluster wrote here.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}"
        ::"r"(smem_address(barrier)), "r"(parity) : "memory");
}

// Global to shared, `bytes` (a multiple of 16) reported to `barrier`; by shared address, or by pointer. The hint: read once, evict first.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared),
                 "l"(global), "r"(bytes), "r"(barrier), "l"(0x12F0000000000000ull)
                 : "memory");
}
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
    bulk_copy(smem_address(shared), global, bytes, smem_address(barrier));
}
// The same without a hint: others will read it too.
__device__ __forceinline__ void bulk_copy_kept(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(global),
                 "r"(bytes), "r"(barrier) : "memory");
}
// True in one lane of a warp, of which the compiler knows that it is one.
__device__ __forceinline__ bool one_lane() {
    uint32_t one;
    asm volatile(
        "{\n"
        ".reg .pred one;\n"
        "elect.sync _|one, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, one;\n"
        "}"
        : "=r"(one));
    return one;
}
// Into L2 alone.
__device__ __forceinline__ void prefetch_bulk(const void* global, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// A place in a ring of COUNT stages with a barrier for full and one for empty each: the parity of its use.
template <int COUNT>
struct Place {
    uint32_t slot = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == COUNT) slot = 0, parity ^= 1;
    }
};
