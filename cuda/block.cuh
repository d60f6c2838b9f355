// block — reductions over one block of BLOCK_THREADS threads, in a fixed order, so that a result has the same bits every run.
#pragma once
#include <stdint.h>

constexpr int BLOCK_THREADS = 512;
constexpr int BLOCK_WARPS = BLOCK_THREADS / 32;

// Combines one value a thread; every thread gets the result. `shared` holds BLOCK_WARPS values and may be reused at once.
template <typename T, typename Combine>
__device__ T block_reduce(T v, T* shared, Combine combine) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
        T other;
        // Shuffles word by word, so that a struct will do.
        static_assert(sizeof(T) % 4 == 0, "whole words");
#pragma unroll
        for (int w = 0; w < (int)sizeof(T) / 4; w++)
            reinterpret_cast<uint32_t*>(&other)[w] = __shfl_xor_sync(~0u, reinterpret_cast<uint32_t*>(&v)[w], step);
        v = combine(v, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    T all = shared[0];
    for (int w = 1; w < BLOCK_WARPS; w++) all = combine(all, shared[w]);
    return all;
}
