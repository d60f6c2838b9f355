// staged — how gptq_gemm's sm_90a kernel stores an f16 tile: by way of shared memory, while its warps multiply the next one.
//
// The staged tile is [warpgroup][token][64 rows], 16-byte chunk c of token t at c ^ (t % 8): the copy engine's 128-byte swizzle. Sums
// acc[n][e] of lane l of a warp: row l / 4 (e < 2) or l / 4 + 8 of the warp's row tile, token 8 n + 2 (l % 4) + e % 2.
#pragma once
#include "gelu.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

#if PEREGRINE_WGMMA

// One row tile's sums, as f16 pairs of tokens; `bias` of rows l / 4 and l / 4 + 8.
template <int TOKENS, bool GELU>
__device__ __forceinline__ void to_halves(const float (&acc)[TOKENS / 8][4], float2 bias, uint32_t (&pairs)[TOKENS / 8][2]) {
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float v0 = acc[n][h * 2] + (h ? bias.y : bias.x), v1 = acc[n][h * 2 + 1] + (h ? bias.y : bias.x);
            if (GELU) v0 = gelu(v0), v1 = gelu(v1);
            pairs[n][h] = as_u32(__floats2half2_rn(v0, v1));
            asm volatile("" : "+r"(pairs[n][h]));  // not after what comes next, a barrier
        }
}
// Into `staged`, the warpgroup's part of the tile.
template <int COUNT>
__device__ __forceinline__ void stage_halves(uint32_t staged, const uint32_t (&pairs)[COUNT][2]) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    // Matrix i of the four: rows 8 (i % 2), tokens 8 (i / 2); lane l names token l % 8 of matrix l / 8.
    const uint32_t to = staged + (lane / 16 * 8 + lane % 8) * 128 + ((warp * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int n = 0; n + 1 < COUNT; n += 2)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to + n * 1024), "r"(pairs[n][0]),
                     "r"(pairs[n][1]), "r"(pairs[n + 1][0]), "r"(pairs[n + 1][1]) : "memory");
    if (COUNT % 2)
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(to + (COUNT - 1) * 1024),
                     "r"(pairs[COUNT - 1][0]), "r"(pairs[COUNT - 1][1]) : "memory");
}
// The warps that multiply have staged a tile, and go on; the warp that stores waits for them.
template <class Shape>
__device__ __forceinline__ void staged_arrive() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.arrive %0, %1;" ::"n"(PEREGRINE_GEMM_GROUPS + 2), "n"(Shape::GROUPS * 128 + 32) : "memory");
}
template <class Shape>
__device__ __forceinline__ void staged_wait() {
    asm volatile("bar.sync %0, %1;" ::"n"(PEREGRINE_GEMM_GROUPS + 2), "n"(Shape::GROUPS * 128 + 32) : "memory");
}
// The warp that stores: the tile from `row0`, `token0` on to global memory. `staged` may be written again after this.
template <class Shape>
__device__ __forceinline__ void store_staged(const GptqMatmulParams& p, const CUtensorMap& out, const CUtensorMap& gelu_out, uint32_t row0,
                                             uint32_t token0, const uint8_t* staged) {
    const uint32_t split = p.y.split_row, lane = threadIdx.x % 32;
    for (uint32_t group = 0; group < Shape::GROUPS; group++, staged += Shape::TOKENS * 128) {
        const uint32_t row = row0 + group * 64;
        if (row < split && row + 64 > split && split < p.w.n) {  // of both kinds
            for (uint32_t i = lane; i < Shape::TOKENS * 8; i += 32) {
                const uint32_t token = i / 8, m = token0 + token, at = row + i % 8 * 8;
                if (m >= p.tokens || at >= p.w.n) continue;
                uint16_t* to = at < split ? p.y.out + (size_t)m * p.y.out_stride + at
                                          : p.y.gelu_out + (size_t)m * p.y.gelu_stride + at - split;
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(staged + token * 128 + (i % 8 ^ token % 8) * 16);
            }
        } else if (lane == 0 && row < p.w.n) {
            if (row < split) store_box(out, row, token0, smem_address(staged));
            else store_box(gelu_out, row - split, token0, smem_address(staged));
        }
    }
    if (lane == 0) store_boxes_read();
}

#endif
