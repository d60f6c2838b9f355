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

// Writes the sums and goes on: `publish_sums` waits until they are seen.
template <class Shape>
__device__ __forceinline__ void give_sums(const GptqMatmulParams& p, const typename Shape::Sums& acc, uint32_t share_index,
                                          uint32_t group) {
    float4* to = split_sums<Shape>(p, share_index, group);
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++) __stcg(to + n * 128, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
    asm volatile("bar.arrive %0, %1;" ::"n"(PEREGRINE_GEMM_GROUPS + 1), "n"(Shape::GROUPS * 128 + 32) : "memory");
}
template <class Shape>
__device__ __forceinline__ void publish_sums(const GptqMatmulParams& p, uint32_t share_index) {
    asm volatile("bar.sync %0, %1;" ::"n"(PEREGRINE_GEMM_GROUPS + 1), "n"(Shape::GROUPS * 128 + 32) : "memory");
    if (threadIdx.x % 32 < Shape::GROUPS)
        asm volatile("st.release.gpu.global.u32 [%0], 1;"
                     ::"l"(p.split_flags + share_index * PEREGRINE_GEMM_GROUPS + threadIdx.x % 32) : "memory");
}

// Adds what blocks first .. end - 1 gave, in this order, and clears their flags for the next launch. OTHERS x RUN loads are under way at a
// time: more would spill.
template <class Shape>
__device__ __forceinline__ void take_sums(const GptqMatmulParams& p, typename Shape::Sums& acc, uint32_t first, uint32_t end,
                                          uint32_t group) {
    constexpr int COUNT = Shape::TOKENS / 8, OTHERS = COUNT > 14 ? 1 : COUNT > 10 ? 2 : 3, RUN = OTHERS == 1 ? COUNT : 4;
    for (uint32_t other = first + threadIdx.x % 128; other < end; other += 128) {
        uint32_t* flag = p.split_flags + other * PEREGRINE_GEMM_GROUPS + group;
        uint32_t given;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(given) : "l"(flag) : "memory");
        while (!given);
        *flag = 0;
    }
    warpgroup_barrier(group);
    const float4* from = split_sums<Shape>(p, 0, group);
    constexpr size_t STRIDE = (size_t)Shape::GROUPS * COUNT * 128;
#pragma unroll
    for (int n0 = 0; n0 < COUNT; n0 += RUN)
        for (uint32_t other = first; other < end; other += OTHERS) {
            float4 v[OTHERS][RUN];
#pragma unroll
            for (int o = 0; o < OTHERS; o++)
#pragma unroll
                for (int n = n0; n < n0 + RUN && n < COUNT; n++)
                    if (other + o < end) v[o][n - n0] = __ldcg(from + (other + o) * STRIDE + n * 128);
#pragma unroll
            for (int o = 0; o < OTHERS; o++)
#pragma unroll
                for (int n = n0; n < n0 + RUN && n < COUNT; n++)
                    if (other + o < end) {
                        const float4 w = v[o][n - n0];
                        acc[n][0] += w.x, acc[n][1] += w.y, acc[n][2] += w.z, acc[n][3] += w.w;
                    }
        }
}

// One row tile's sums as f16, 16 tokens at a time through shared memory, so that a token's 16 rows are stored as one sector. `bias` of
// rows l / 4 and l / 4 + 8.
template <int TOKENS, bool GELU>
__device__ __forceinline__ void store_halves(const GptqMatmulParams& p, uint16_t* out, uint32_t stride, float2 bias, uint32_t token0,
                                             const float (&acc)[TOKENS / 8][4], uint8_t* transpose) {
    constexpr int COUNT = TOKENS / 8;
    const uint32_t lane = threadIdx.x % 32, end = min(p.tokens, token0 + TOKENS);
    // Matrix i of the four: rows 8 (i % 2), tokens 8 (i / 2); lane l names token l % 8 of matrix l / 8.
    const uint32_t to = smem_address(transpose) + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16;
    const auto pair = [&](float v0, float v1, float bias) {
        v0 += bias, v1 += bias;
        if (GELU) v0 = gelu(v0), v1 = gelu(v1);
        return as_u32(__floats2half2_rn(v0, v1));
    };
#pragma unroll
    for (int n = 0; n < COUNT; n += 2) {
        uint32_t r[4] = {};
#pragma unroll
        for (int i = n; i < n + 2 && i < COUNT; i++)
            r[(i - n) * 2] = pair(acc[i][0], acc[i][1], bias.x), r[(i - n) * 2 + 1] = pair(acc[i][2], acc[i][3], bias.y);
        __syncwarp();
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                     "r"(r[3]) : "memory");
        __syncwarp();
        const uint4 v = *reinterpret_cast<const uint4*>(transpose + lane * 16);
        const uint32_t m = token0 + n * 8 + lane / 2;
        if (m < end) *reinterpret_cast<uint4*>(out + (size_t)m * stride + lane % 2 * 8) = v;
    }
}
template <int TOKENS>
__device__ __forceinline__ void store_halves(const GptqMatmulParams& p, uint32_t row, float2 bias, uint32_t token0,
                                             const float (&acc)[TOKENS / 8][4], uint8_t* transpose) {
    const GptqOutput& y = p.y;
    if (row < y.split_row) store_halves<TOKENS, false>(p, y.out + row, y.out_stride, bias, token0, acc, transpose);
    else store_halves<TOKENS, true>(p, y.gelu_out + (row - y.split_row), y.gelu_stride, bias, token0, acc, transpose);
}

// One row tile's sums as f32. To the partials from where they are, eight rows of a token a sector: by way of shared memory, as below, steps
// of 16 texts took 1.239 ms for 1.226.
template <int TOKENS>
__device__ __forceinline__ void store_partials(const GptqMatmulParams& p, uint32_t slice, uint32_t row, uint32_t token0,
                                               const float (&acc)[TOKENS / 8][4]) {
    const uint32_t lane = threadIdx.x % 32;
    float* to = p.y.partials + (size_t)slice * p.tokens * p.w.n + row + lane / 4;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t m = token0 + n * 8 + lane % 4 * 2 + e % 2;
            if (m < p.tokens) to[(size_t)m * p.w.n + e / 2 * 8] = acc[n][e];
        }
}

// Added to the residual, where each element has this one writer. 8 tokens at a time through shared memory, [token][16 rows] with the rows'
// 16-byte chunks swapped about so that no more than two lanes meet in a bank.
template <int TOKENS>
__device__ __forceinline__ void add_to_residual(const GptqMatmulParams& p, uint32_t row, uint32_t token0, const float (&acc)[TOKENS / 8][4],
                                                uint8_t* transpose) {
    const uint32_t lane = threadIdx.x % 32, token = lane / 4;
    float* out = p.y.residual + row + lane % 4 * 4;
    float4 bias = make_float4(0.f, 0.f, 0.f, 0.f);
    if (p.y.bias) {
        const float* b = p.y.bias + row + lane % 4 * 4;
        bias = make_float4(b[0], b[1], b[2], b[3]);
    }
    float* chunks = reinterpret_cast<float*>(transpose);
    const auto chunk = [&](uint32_t token, uint32_t quad) { return chunks + token * UNIT_ROWS + (quad ^ token / 2) * 4; };
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) {
        __syncwarp();
#pragma unroll
        for (int e = 0; e < 4; e++) chunk(lane % 4 * 2 + e % 2, lane / 16 + e / 2 * 2)[lane / 4 % 4] = acc[n][e];
        __syncwarp();
        const float4 v = *reinterpret_cast<const float4*>(chunk(token, lane % 4));
        const uint32_t m = token0 + n * 8 + token;
        if (m >= p.tokens) continue;
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                     ::"l"(out + (size_t)m * p.w.n), "f"(v.x + bias.x), "f"(v.y + bias.y), "f"(v.z + bias.z), "f"(v.w + bias.w) : "memory");
    }
}

template <int TOKENS>
__device__ __forceinline__ void store_floats(const GptqMatmulParams& p, uint32_t slice, uint32_t row, uint32_t token0,
                                             const float (&acc)[TOKENS / 8][4], uint8_t* transpose) {
    if (p.y.partials) store_partials<TOKENS>(p, slice, row, token0, acc);
    else add_to_residual<TOKENS>(p, row, token0, acc, transpose);
}

#endif
