// ready — words by which attention begins before the product in front of it has ended, and the one behind it before attention has.
//
//   [qkv ; up] ~~~> attention          ~~~>  begins when every block of the other has begun, and its inputs are there (overlap_next)
//        `~~~~~~~~> [down | dense]           [down | dense] begins when every block of attention has begun too
//
// Attention needs the rows of `qkv` alone, `down` the first product alone, `dense` attention. So attention does not wait for its predecessor,
// but for word 3. In a captured step the second product overtakes it (src/gpu/overtake.rs): it waits for the end of [qkv ; up], and for
// attention by words 0 and 1, before the first stage that attention writes. Elsewhere attention is its predecessor, and it waits for word 0
// instead of for the end of [qkv ; up].
//   word 0   how many parts attention has, as many as its blocks have teams; one of these says so when [qkv ; up] has ended
//   word 1   how many of them are done, or have found that there is nothing to do
//   word 2   how many blocks of [down | dense] have no more use for the words; the last one clears all: zero before and after
//   word 3   how many row tiles of `qkv` are stored
// All blocks of attention count, so when [down | dense] has ended none of attention reads or writes memory: what is behind it need not wait
// for attention too.
// Nothing is kept from running by what waits for it: who waits for a block by a word began after that block. (The driver promises that order
// where a block of the second kernel does not fit in where none of the first would: one of attention needs less of everything.)
// The words are zero when [qkv ; up] counts in them: its inputs were there, so all before it was complete, the layer before among it. And it
// calls overlap_next() after it has waited for these: attention begins after that too.
// A block of attention that has work calls wait_previous() before it ends, see launch.cuh: [qkv ; up] has ended when attention has.
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
__device__ __forceinline__ void ready_before(uint32_t* ready, uint32_t parts) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(ready), "r"(parts) : "memory");
}
// By one thread for so many parts, behind all that was written for them.
__device__ __forceinline__ void ready_end(uint32_t* ready, uint32_t parts) {
    if (ready) asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(ready + 1), "r"(parts) : "memory");
}
// By one thread for parts with nothing to do, behind the block's last read. Without a fence: nothing was written, and what was read has
// arrived, since it decided this. With one, which such blocks wait for, a step of 16 texts took 1.194 ms for 1.188.
__device__ __forceinline__ void ready_idle(uint32_t* ready, uint32_t parts) {
    if (ready) asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(ready + 1), "r"(parts) : "memory");
}

// By the thread that has the copy engine read the product's inputs, before the first. Without words it waits for all that was before.
__device__ __forceinline__ void ready_wait(const uint32_t* ready, bool overtakes) {
    if (!ready || overtakes) return wait_previous();
    uint32_t tries = 0;
    while (!load_acquire(ready)) ready_patience(tries);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
// After that, and before the first of attention's.
__device__ __forceinline__ void ready_wait_attention(const uint32_t* ready) {
    if (!ready) return;
    uint32_t tries = 0, parts;
    while (!(parts = load_acquire(ready))) ready_patience(tries);
    while (load_acquire(ready + 1) != parts) ready_patience(tries);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
// By one thread of each block of the product, behind its last use of the words. Then all that was before has ended.
__device__ __forceinline__ void ready_leave(uint32_t* ready) {
    wait_previous();
    if (!ready || atomicAdd(ready + 2, 1) != gridDim.x - 1) return;
    for (int i = 0; i < PEREGRINE_READY_WORDS; i++) ready[i] = 0;
}
