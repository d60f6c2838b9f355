// ready — words by which attention begins before the product in front of it has ended, and lets the one behind it begin before it has.
//
// A decode step's stream runs [qkv ; up], attention, [down | dense]. Attention needs the rows of `qkv` alone; `down` needs the first product
// alone, which is complete when attention's wait_previous() returns; `dense` needs attention. So neither of the two waits for its
// predecessor, but for these words:
//   word 0   how many parts of attention there are, each a head tile of a token's keys or of some of them; a block of attention that has
//            nothing else to do writes it when what stands before attention is complete
//   word 1   how many of them are done
//   word 2   how many blocks of [down | dense] have no more use for the words; the last one clears all: zero before and after
//   word 3   how many row tiles of `qkv` are stored
// Nothing is kept from running by what waits for it: a block of [down | dense] begins when every block of attention has begun, and one of
// attention when every block of [qkv ; up] has (overlap_next; without overlap, when all have ended). They run already, and none waits for a
// block of what is behind it.
// The words are zero when [qkv ; up] counts in them: its inputs were there, so all before it was complete, the layer before among it. And it
// calls overlap_next() after it has waited for these: attention, and all behind it, begins after that too.
// A block of either that has work calls wait_previous() before it ends, see launch.cuh: then what it waits for has long ended.
#pragma once
#include "launch.cuh"

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* word) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(word) : "memory");
    return v;
}

// Words left over from a step that broke off would be waited for in vain: an error after seconds, not a hang.
__device__ __forceinline__ void ready_patience(uint32_t& tries) {
    if (++tries == 1 << 23) asm volatile("trap;");
}

// By one thread of [qkv ; up] behind all stores of `tiles` row tiles of `qkv`, and a barrier of those who stored them.
__device__ __forceinline__ void ready_count(uint32_t* ready, uint32_t tiles) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(ready + 3), "r"(tiles) : "memory");
}
// By one thread of a block of attention, before the first read of `qkv`, which has so many row tiles.
__device__ __forceinline__ void ready_wait_qkv(const uint32_t* ready, uint32_t tiles) {
    uint32_t tries = 0;
    while (load_acquire(ready + 3) != tiles) ready_patience(tries);
}

// By one thread of one block of attention, after wait_previous().
__device__ __forceinline__ void ready_begin(uint32_t* ready, uint32_t parts) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(ready), "r"(parts) : "memory");
}
// By one thread for each of those parts, behind all that was written for it.
__device__ __forceinline__ void ready_end(uint32_t* ready) {
    if (ready) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(ready + 1) : "memory");
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
    for (int i = 0; i < PEREGRINE_READY_WORDS; i++) ready[i] = 0;
}
