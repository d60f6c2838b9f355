// mma_output — what becomes of the sums of gptq_gemm's mma.sync kernel: given to the block that owns the tile, or stored.
//
// Of a row tile a lane has acc[n][e]: row lane / 4 (e < 2) or lane / 4 + 8, token 8 n + 2 (lane % 4) + e % 2.
#pragma once
#include "gelu.cuh"
#include "units.cuh"

constexpr int GEMM_THREADS = 256;  // of a block

// Sums of a part of a tile that another block stores: [share index][float4][thread].
template <int COUNT>
__device__ __forceinline__ float4* split_sums(const GptqMatmulParams& p, uint32_t share_index) {
    return reinterpret_cast<float4*>(p.split_sums) + (size_t)share_index * COUNT * GEMM_THREADS + threadIdx.x;
}

template <int COUNT>
__device__ __forceinline__ void give_sums(const GptqMatmulParams& p, const float (&acc)[COUNT][4], uint32_t share_index) {
    float4* to = split_sums<COUNT>(p, share_index);
#pragma unroll
    for (int n = 0; n < COUNT; n++) __stcg(to + n * GEMM_THREADS, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(p.split_flags + share_index * PEREGRINE_GEMM_GROUPS) : "memory");
}

// Adds what blocks first .. end - 1 gave, in this order, and clears their flags for the next launch.
template <int COUNT>
__device__ __forceinline__ void take_sums(const GptqMatmulParams& p, float (&acc)[COUNT][4], uint32_t first, uint32_t end) {
    for (uint32_t other = first + threadIdx.x; other < end; other += GEMM_THREADS) {
        uint32_t* flag = p.split_flags + other * PEREGRINE_GEMM_GROUPS;
        uint32_t given;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(given) : "l"(flag) : "memory");
        while (!given);
        *flag = 0;
    }
    __syncthreads();
    for (uint32_t other = first; other < end; other++) {
        const float4* from = split_sums<COUNT>(p, other);
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            const float4 v = __ldcg(from + n * GEMM_THREADS);
            acc[n][0] += v.x, acc[n][1] += v.y, acc[n][2] += v.z, acc[n][3] += v.w;
        }
    }
}

// A row tile's sums as f16. Each 8 x 8 of them is transposed, so that four lanes store 8 rows of a token.
template <int COLUMNS>
__device__ __forceinline__ void store_halves(const GptqMatmulParams& p, uint32_t row, uint32_t token0, const float (&acc)[COLUMNS][4]) {
    const uint32_t lane = threadIdx.x % 32;
    const GptqOutput& y = p.y;
    const bool plain = row < y.split_row;
    uint16_t* out = (plain ? y.out + row : y.gelu_out + (row - y.split_row)) + lane % 4 * 2;
    const uint32_t stride = plain ? y.out_stride : y.gelu_stride;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float bias = y.bias ? y.bias[row + half * 8 + lane / 4] : 0.f;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            float v0 = acc[n][half * 2] + bias, v1 = acc[n][half * 2 + 1] + bias;
            if (!plain) v0 = gelu(v0), v1 = gelu(v1);
            uint32_t pair;
            asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(pair) : "r"(as_u32(__floats2half2_rn(v0, v1))));
            const uint32_t m = token0 + n * 8 + lane / 4;
            if (m < p.tokens) *reinterpret_cast<uint32_t*>(out + (size_t)m * stride + half * 8) = pair;
        }
    }
}

// A row tile's sums as f32: to the partials, or added to the residual, where each element has this one writer.
template <int COLUMNS>
__device__ __forceinline__ void store_floats(const GptqMatmulParams& p, uint32_t slice, uint32_t row, uint32_t token0,
                                             const float (&acc)[COLUMNS][4]) {
    const uint32_t lane = threadIdx.x % 32, row_low = row + lane / 4;
    const bool partials = p.y.partials;
    float* out = partials ? p.y.partials + (size_t)slice * p.tokens * p.w.n : p.y.residual;
    const float bias[2] = {!partials && p.y.bias ? p.y.bias[row_low] : 0.f, !partials && p.y.bias ? p.y.bias[row_low + 8] : 0.f};
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t m = token0 + n * 8 + lane % 4 * 2 + e % 2;
            if (m >= p.tokens) continue;
            float* to = out + (size_t)m * p.w.n + row_low + e / 2 * 8;
            if (partials) *to = acc[n][e];
            else asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(acc[n][e] + bias[e / 2]) : "memory");
        }
}
