// ready — words by which attention lets the product behind it begin before attention has ended.
//
// A decode step's stream runs [qkv ; up], attention, [down | dense]. `down` needs the first product alone, which is complete when
// attention's wait_previous() returns; `dense` needs attention. So [down | dense] does not wait for its predecessor, but for these words:
//   word 0   how many parts of attention there are, each a head tile of a token's keys or of some of them; a thread of the first block
//            writes it when what stands before attention is complete
//   word 1   how many of them are done
//   word 2   how many blocks of the product have no more use for the words; the last one clears all: zero before and after
// Nothing is kept from running by what waits for it: a block of the product begins when every block of attention has begun
// (overlap_next; without overlap, when all have ended). They run already, and none waits for a block of the product.
// The words are zero when the product begins: the product in front of attention, [qkv ; up], calls overlap_next() after its own
// ready_wait(), so attention, and all behind it, begins when what is before [qkv ; up] is complete, the layer before among it.
// A block of the product calls wait_previous() before it ends, see launch.cuh: then attention has long ended.
#pragma once
#include "launch.cuh"

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* word) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(word) : "memory");
    return v;
}

// By one thread of one block of attention, after wait_previous().
__device__ __forceinline__ void ready_begin(uint32_t* ready, uint32_t parts) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(ready), "r"(parts) : "memory");
}
// By one thread for each of those parts, behind all that was written for it.
__device__ __forceinline__ void ready_end(uint32_t* ready) {
    if (ready) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(ready + 1) : "memory");
}

// Words left over from a step that broke off would be waited for in vain: an error after seconds, not a hang.
__device__ __forceinline__ void ready_patience(uint32_t& tries) {
    if (++tries == 1 << 23) asm volatile("trap;");
}

// By the thread that reads the product's inputs, or has the copy engine read them: before the first. Without words it waits for all that
// was before.
__device__ __forceinline__ void ready_wait(const uint32_t* ready) {
    if (!ready) return wait_previous();
    uint32_t tries = 0;
    while (!load_acquire(ready)) ready_patience(tries);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
// After that, and before the first of attention's.
__device__ __forceinline__ void ready_wait_attention(const uint32_t* ready) {
    if (!ready) return;
    const uint32_t parts = load_acquire(ready);
    uint32_t tries = 0;
    while (load_acquire(ready + 1) != parts) ready_patience(tries);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
// By one thread of each block of the product, after the block's ready_wait. Waits for all that was before.
__device__ __forceinline__ void ready_leave(uint32_t* ready) {
    wait_previous();
    if (!ready || atomicAdd(ready + 2, 1) != gridDim.x - 1) return;
    ready[0] = ready[1] = ready[2] = 0;
}
