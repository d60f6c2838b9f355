// mma_output — what becomes of the sums of gptq_gemm's mma.sync kernel: given to the block that owns the tile, or stored, 32 rows a warp.
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

// The factors (row_factors.cu) of rows lane / 4 and lane / 4 + 8 of a row tile, or of the last one if it is not there.
__device__ __forceinline__ __half2 row_factor(const GptqMatrix& w, uint32_t tile) {
    return as_half2(w.row_factors[min(tile, w.n / UNIT_ROWS - 1) * 8 + threadIdx.x % 32 / 4]);
}

// What is done to the sums of rows lane / 4 and lane / 4 + 8 of a row tile. SCALED: their weights are unpack_scaled's.
template <bool SCALED>
struct RowScale {
    float by[2] = {1.f, 1.f}, bias[2] = {};
    __device__ __forceinline__ RowScale(const GptqMatmulParams& p, uint32_t row, bool biased) {
        if (SCALED) {
            const float2 undo = undo_factor(row_factor(p.w, row / UNIT_ROWS));
            by[0] = undo.x, by[1] = undo.y;
        }
        if (biased && row < p.w.n) bias[0] = p.y.bias[row + threadIdx.x % 32 / 4], bias[1] = p.y.bias[row + threadIdx.x % 32 / 4 + 8];
    }
    __device__ __forceinline__ float apply(float sum, int half) const {
        return SCALED ? fmaf(sum, by[half], bias[half]) : sum + bias[half];
    }
};

// Between the four lanes of a token pair: lane q has v[0 .. 3] and gets v[q] of lane j as v[j].
template <typename T>
__device__ __forceinline__ void exchange(T (&v)[4]) {
    const uint32_t q = threadIdx.x % 4;
    const auto swap = [](bool yes, T& a, T& b) {
        const T t = yes ? b : a;
        b = yes ? a : b, a = t;
    };
    // Lane q's v[r] becomes what it has for lane q ^ r.
    swap(q & 1, v[0], v[1]), swap(q & 1, v[2], v[3]), swap(q & 2, v[0], v[2]), swap(q & 2, v[1], v[3]);
#pragma unroll
    for (int r = 1; r < 4; r++) v[r] = __shfl_xor_sync(~0u, v[r], r);
    swap(q & 1, v[0], v[1]), swap(q & 1, v[2], v[3]), swap(q & 2, v[0], v[2]), swap(q & 2, v[1], v[3]);
}

// The sums of 32 rows as f16: 64 bytes of a token in one piece, as sectors that are written by halves cost twice. Each 8 x 8 of them is
// transposed, which gives a lane two rows of each eight; lanes exchange them, and each has eight rows of a token.
template <bool SCALED, int COLUMNS>
__device__ __forceinline__ void store_halves(const GptqMatmulParams& p, uint32_t row, uint32_t token0, float (&acc)[2 * COLUMNS][4]) {
    const uint32_t lane = threadIdx.x % 32, mine = row + lane % 4 * 8;
    const GptqOutput& y = p.y;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t at = row + i * UNIT_ROWS;
        if (at >= p.w.n) continue;
        const RowScale<SCALED> scale(p, at, y.bias);
        if (at < y.split_row) {
            if (SCALED || y.bias)
#pragma unroll
                for (int n = 0; n < COLUMNS * 4; n++)
                    acc[i * COLUMNS + n / 4][n % 4] = scale.apply(acc[i * COLUMNS + n / 4][n % 4], n % 4 / 2);
        } else {
#pragma unroll
            for (int n = 0; n < COLUMNS * 4; n++)
                acc[i * COLUMNS + n / 4][n % 4] = gelu(scale.apply(acc[i * COLUMNS + n / 4][n % 4], n % 4 / 2));
        }
    }
    const bool plain = mine < y.split_row;
    const uint32_t stride = plain ? y.out_stride : y.gelu_stride, first = token0 + lane / 4;
    uint16_t* out = (plain ? y.out + mine : y.gelu_out + (mine - y.split_row)) + (size_t)first * stride;
    const int32_t tokens = mine < p.w.n ? (int32_t)(p.tokens - first) : 0;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* c = &acc[i / 2 * COLUMNS + n][i % 2 * 2];
            asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v[i]) : "r"(as_u32(__floats2half2_rn(c[0], c[1]))));
        }
        exchange(v);
        // Predicated here: the compiler would branch.
        asm volatile("{.reg .pred p; setp.gt.s32 p, %5, %6; @p st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(out), "r"(v[0]), "r"(v[1]),
                     "r"(v[2]), "r"(v[3]), "r"(tokens), "r"(n * 8)
                     : "memory");
        out += (size_t)8 * stride;
    }
}

// The sums of 32 rows as f32: to the partials, or added to the residual, where each element has this one writer. WHOLE: nothing is beyond
// the edges, and there are no branches.
template <bool SCALED, bool PARTIALS, bool WHOLE, int COLUMNS>
__device__ __forceinline__ void store_floats(const GptqMatmulParams& p, float* out, uint32_t row, uint32_t token0,
                                             const float (&acc)[2 * COLUMNS][4]) {
    const uint32_t lane = threadIdx.x % 32, first = token0 + lane % 4 * 2;
    const bool biased = !PARTIALS && p.y.bias;
    const RowScale<SCALED> scale[2] = {{p, row, biased}, {p, row + UNIT_ROWS, biased}};
    const int32_t tokens[2] = {(int32_t)(p.tokens - first), row + UNIT_ROWS < p.w.n ? (int32_t)(p.tokens - first) : 0};
    out += (size_t)first * p.w.n + row + lane / 4;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float* to = out + e * p.w.n + i * 8;
                if (!WHOLE && n * 8 + e >= tokens[i / 2]) continue;
                const float v = scale[i / 2].apply(acc[i / 2 * COLUMNS + n][i % 2 * 2 + e], i % 2);
                if (PARTIALS) *to = v;
                else asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(v) : "memory");
            }
        }
        out += (size_t)8 * p.w.n;
    }
}
template <bool SCALED, int COLUMNS>
__device__ __forceinline__ void store_floats(const GptqMatmulParams& p, uint32_t slice, uint32_t row, uint32_t token0,
                                             const float (&acc)[2 * COLUMNS][4]) {
    if (p.y.partials)
        store_floats<SCALED, true, false, COLUMNS>(p, p.y.partials + (size_t)slice * p.tokens * p.w.n, row, token0, acc);
    else if (row + 2 * UNIT_ROWS <= p.w.n && token0 + COLUMNS * 8 <= p.tokens)
        store_floats<SCALED, false, true, COLUMNS>(p, p.y.residual, row, token0, acc);
    else store_floats<SCALED, false, false, COLUMNS>(p, p.y.residual, row, token0, acc);
}
