// A LayerNorm as a newcomer might write it: right, and slower than the built-in one. The files beside this one spoil it in one place each,
// for tests of what `peregrine lab try` says: statements AFTER_SUM or AFTER_STORE, values LEFT_OUT at the end of a row.
#pragma once
#include <cuda_fp16.h>
#include "launch.cuh"

#ifndef AFTER_SUM
#define AFTER_SUM
#endif
#ifndef LEFT_OUT
#define LEFT_OUT 0
#endif
#ifndef AFTER_STORE
#define AFTER_STORE
#endif

namespace {

constexpr int THREADS = 256;

__device__ float block_sum(float v) {
    __shared__ float shared[THREADS];
    shared[threadIdx.x] = v;
    __syncthreads();
    for (int step = THREADS / 2; step; step /= 2) {
        if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
        __syncthreads();
    }
    v = shared[0];
    __syncthreads();
    return v;
}

__global__ void newcomer_kernel(const __grid_constant__ LayernormParams p) {
    overlap_next();
    wait_previous();
    const size_t row = (size_t)blockIdx.x * p.hidden;
    float sum = 0.f;
    for (uint32_t i = threadIdx.x; i < p.hidden; i += THREADS) {
        float v = p.x[row + i];
        if (p.partials) {
            for (uint32_t s = 0; s < p.slices; s++) v += p.partials[(size_t)s * p.tokens * p.hidden + row + i];
            if (p.partials_bias) v += p.partials_bias[i];
            p.x[row + i] = v;
        }
        sum += v;
    }
    AFTER_SUM;
    const float mean = block_sum(sum) / p.hidden;
    float squares = 0.f;
    for (uint32_t i = threadIdx.x; i < p.hidden; i += THREADS) squares += (p.x[row + i] - mean) * (p.x[row + i] - mean);
    const float scale = rsqrtf(block_sum(squares) / p.hidden + p.epsilon);
    for (uint32_t i = threadIdx.x; i + LEFT_OUT < p.hidden; i += THREADS) {
        const __half h = __float2half_rn((p.x[row + i] - mean) * scale * p.weight[i] + p.bias[i]);
        p.out[row + i] = __half_as_ushort(h);
        AFTER_STORE;
    }
}

}  // namespace

extern "C" int32_t layernorm(const LayernormParams* p, const Launch* l) {
    if (p->tokens == 0 || p->hidden == 0) return PEREGRINE_BAD_SHAPE;
    return launch(newcomer_kernel, dim3(p->tokens), THREADS, 0, l, *p);
}
