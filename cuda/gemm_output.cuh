// gemm_output — what becomes of the sums of gptq_gemm's sm_90a kernel: given to the block that owns the tile, or stored.
//
// acc[n][e] of lane l of a warp: row l / 4 (e < 2) or l / 4 + 8 of the warp's row tile, token 8 n + 2 (l % 4) + e % 2. Shape says how many
// TOKENS a tile has, and how many warpgroups (GROUPS) share it.
#pragma once
#include "gelu.cuh"
#include "units.cuh"
#include "wgmma.cuh"

constexpr int TRANSPOSE_BYTES = 512;  // of shared memory, a warp: 16 tokens x 16 rows of f16

#if PEREGRINE_WGMMA

__device__ __forceinline__ void warpgroup_barrier(uint32_t group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Sums of a part of a tile that another block stores: [share index][warpgroup][float4][thread].
template <class Shape>
__device__ __forceinline__ float4* split_sums(const GptqMatmulParams& p, uint32_t share_index, uint32_t group) {
    return reinterpret_cast<float4*>(p.split_sums) + ((size_t)share_index * Shape::GROUPS + group) * (Shape::TOKENS / 8) * 128 +
           threadIdx.x % 128;
}

template <class Shape>
__device__ __forceinline__ void give_sums(const GptqMatmulParams& p, const typename Shape::Sums& acc, uint32_t share_index,
                                          uint32_t group) {
    float4* to = split_sums<Shape>(p, share_index, group);
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++) __stcg(to + n * 128, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
    __threadfence();
    warpgroup_barrier(group);
    if (threadIdx.x % 128 == 0)
        asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(p.split_flags + share_index * PEREGRINE_GEMM_GROUPS + group) : "memory");
}

// Adds what blocks first .. end - 1 gave, in this order, and clears their flags for the next launch.
template <class Shape>
__device__ __forceinline__ void take_sums(const GptqMatmulParams& p, typename Shape::Sums& acc, uint32_t first, uint32_t end,
                                          uint32_t group) {
    for (uint32_t other = first + threadIdx.x % 128; other < end; other += 128) {
        uint32_t* flag = p.split_flags + other * PEREGRINE_GEMM_GROUPS + group;
        uint32_t given;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(given) : "l"(flag) : "memory");
        while (!given);
        *flag = 0;
    }
    warpgroup_barrier(group);
    for (uint32_t other = first; other < end; other++) {
        const float4* from = split_sums<Shape>(p, other, group);
#pragma unroll
        for (int n = 0; n < Shape::TOKENS / 8; n++) {
            const float4 v = __ldcg(from + n * 128);
            acc[n][0] += v.x, acc[n][1] += v.y, acc[n][2] += v.z, acc[n][3] += v.w;
        }
    }
}

// One row tile's sums as f16, 16 tokens at a time through shared memory, so that a token's 16 rows are stored as one sector.
template <int TOKENS>
__device__ __forceinline__ void store_halves(const GptqMatmulParams& p, uint32_t row, uint32_t token0, const float (&acc)[TOKENS / 8][4],
                                             uint8_t* transpose) {
    const uint32_t lane = threadIdx.x % 32;
    const GptqOutput& y = p.y;
    const bool plain = row < y.split_row;
    const float bias_low = y.bias ? y.bias[row + lane / 4] : 0.f, bias_high = y.bias ? y.bias[row + lane / 4 + 8] : 0.f;
    uint16_t* out = plain ? y.out + row : y.gelu_out + (row - y.split_row);
    const uint32_t stride = plain ? y.out_stride : y.gelu_stride;
    // Matrix i of the four: rows 8 (i % 2), tokens 8 (i / 2); lane l names token l % 8 of matrix l / 8.
    const uint32_t to = smem_address(transpose) + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16;
    const auto pair = [&](float v0, float v1, float bias) {
        v0 += bias, v1 += bias;
        if (!plain) v0 = gelu_quick(v0), v1 = gelu_quick(v1);
        return as_u32(__floats2half2_rn(v0, v1));
    };
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
        const uint32_t r[4] = {pair(acc[n][0], acc[n][1], bias_low), pair(acc[n][2], acc[n][3], bias_high),
                               pair(acc[n + 1][0], acc[n + 1][1], bias_low), pair(acc[n + 1][2], acc[n + 1][3], bias_high)};
        __syncwarp();
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                     "r"(r[3]) : "memory");
        __syncwarp();
        const uint4 v = *reinterpret_cast<const uint4*>(transpose + lane * 16);
        const uint32_t m = token0 + n * 8 + lane / 2;
        if (m < p.tokens) *reinterpret_cast<uint4*>(out + (size_t)m * stride + lane % 2 * 8) = v;
    }
}

// One row tile's sums as f32: to the partials, or added to the residual, where each element has this one writer.
template <int TOKENS>
__device__ __forceinline__ void store_floats(const GptqMatmulParams& p, uint32_t slice, uint32_t row, uint32_t token0,
                                             const float (&acc)[TOKENS / 8][4]) {
    const uint32_t lane = threadIdx.x % 32, row_low = row + lane / 4;
    const bool partials = p.y.partials;
    float* out = partials ? p.y.partials + (size_t)slice * p.tokens * p.w.n : p.y.residual;
    const float bias[2] = {!partials && p.y.bias ? p.y.bias[row_low] : 0.f, !partials && p.y.bias ? p.y.bias[row_low + 8] : 0.f};
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t m = token0 + n * 8 + lane % 4 * 2 + e % 2;
            if (m >= p.tokens) continue;
            float* to = out + (size_t)m * p.w.n + row_low + e / 2 * 8;
            if (partials) *to = acc[n][e];
            else asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(acc[n][e] + bias[e / 2]) : "memory");
        }
}

#endif
