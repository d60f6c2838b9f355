// layernorm — x += partials + bias, then out = (x - mean) / sqrt(variance + eps) * weight + bias.   Reference: reference.rs::layernorm
// Shapes   x [tokens, hidden] f32, hidden <= 8192 and % 4 == 0; partials [slices, tokens, hidden] f32; out f16.
// Mapping  one block of 512 threads a token; the row stays in registers, so mean and variance are two exact passes over them. The
//          residual and all its slices are asked for together.
// Tried    weight and bias loaded before the predecessor has finished: no difference at 1 token. One kernel for with and without slices:
//          50 us at 2048 tokens, since the slices' registers (74 in all) halve the occupancy.
// Numbers  partials are added in slice order and sums run in a fixed tree: same bits every run. Biased variance, as PyTorch's.
// Measured 4.1 us at 1 token with 5 slices, 27 us at 512, 20 us at 2048 without; H200.
// Cost     one token: 109 KB from L2 by one SM, a chain of latencies (load, two block sums, store), not bandwidth.
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int THREADS = 512;
constexpr int VECTORS = 4;  // float4 a thread: hidden <= 512 * 4 * 4
constexpr int MAX_SLICES = 8;

// Sum over the block; every thread gets it. `slot` alternates so that one barrier a call is enough.
__device__ float block_sum(float v, float (*shared)[THREADS / 32], int slot) {
#pragma unroll
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    if (threadIdx.x % 32 == 0) shared[slot][threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) sum += shared[slot][w];
    return sum;
}

__device__ __forceinline__ void add(float4& a, float4 b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; }

// PARTIALS: there are some to add. Without them the kernel needs half the registers.
template <bool PARTIALS>
__global__ void __launch_bounds__(THREADS) layernorm_kernel(const __grid_constant__ LayernormParams p) {
    overlap_next();
    __shared__ float shared[2][THREADS / 32];
    const uint32_t vectors = p.hidden / 4;
    const size_t row = (size_t)blockIdx.x * vectors;
    float4* x = reinterpret_cast<float4*>(p.x) + row;
    const float4* partials = reinterpret_cast<const float4*>(p.partials) + row;
    const size_t slice_stride = (size_t)p.tokens * vectors;
    wait_previous();

    float4 v[VECTORS];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const uint32_t e = i * THREADS + threadIdx.x;
        if (e >= vectors) continue;
        v[i] = x[e];
        if (PARTIALS) {
            float4 part[MAX_SLICES];
#pragma unroll
            for (int s = 0; s < MAX_SLICES; s++)
                if (s < p.slices) part[s] = partials[s * slice_stride + e];
#pragma unroll
            for (int s = 0; s < MAX_SLICES; s++)
                if (s < p.slices) add(v[i], part[s]);
            if (p.partials_bias) add(v[i], reinterpret_cast<const float4*>(p.partials_bias)[e]);
            x[e] = v[i];
        }
        sum += (v[i].x + v[i].y) + (v[i].z + v[i].w);
    }
    const float mean = block_sum(sum, shared, 0) / p.hidden;
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if (i * THREADS + threadIdx.x >= vectors) continue;
        const float4 d = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
        squares += (d.x * d.x + d.y * d.y) + (d.z * d.z + d.w * d.w);
    }
    const float rstd = 1.f / sqrtf(block_sum(squares, shared, 1) / p.hidden + p.epsilon);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const uint32_t e = i * THREADS + threadIdx.x;
        if (e >= vectors) continue;
        const float4 w = __ldg(reinterpret_cast<const float4*>(p.weight) + e), b = __ldg(reinterpret_cast<const float4*>(p.bias) + e);
        __half2 lo = __floats2half2_rn((v[i].x - mean) * rstd * w.x + b.x, (v[i].y - mean) * rstd * w.y + b.y);
        __half2 hi = __floats2half2_rn((v[i].z - mean) * rstd * w.z + b.z, (v[i].w - mean) * rstd * w.w + b.w);
        reinterpret_cast<uint2*>(p.out)[row + e] = make_uint2(*reinterpret_cast<uint32_t*>(&lo), *reinterpret_cast<uint32_t*>(&hi));
    }
}

}  // namespace

extern "C" int32_t layernorm(const LayernormParams* p, const Launch* l) {
    if (p->tokens == 0 || p->hidden == 0 || p->hidden % 4 || p->hidden > THREADS * VECTORS * 4) return PEREGRINE_BAD_SHAPE;
    if (p->partials && p->slices > MAX_SLICES) return PEREGRINE_BAD_SHAPE;
    return launch(p->partials ? layernorm_kernel<true> : layernorm_kernel<false>, dim3(p->tokens), THREADS, 0, l, *p);
}
