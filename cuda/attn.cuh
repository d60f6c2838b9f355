// attn — multi-query attention of 16 query rows by one warp, what attn_decode and attn_prefill share.
//
// The warp's rows are query heads of one token (decode) or tokens of one head (prefill); K and V are those of the one shared
// head. Online softmax in base 2: scores are multiplied by log2(e) / 8 once, weights are exp2. Lane l holds rows l/4, l/4 + 8.
// Prefill brings keys through shared memory: tile [64 keys][64] f16, 16-byte chunk c of key t at c ^ (t % 8), so that ldmatrix has
// no bank conflicts.
#pragma once
#include "units.cuh"

constexpr int HEAD_DIM = PEREGRINE_HEAD_DIM;
constexpr int TILE_KEYS = 64;
constexpr int TILE_BYTES = TILE_KEYS * HEAD_DIM * 2;
constexpr float SCORE_SCALE = 1.44269504088896341f / 8.f;  // log2(e) / sqrt(64)

// Sum of weighted values, weights and largest scaled score of two rows.
struct AttnState {
    float out[8][4];       // 16 rows x 64: accumulators of eight n8 tiles
    float sum[2], top[2];  // rows l/4, l/4 + 8; `sum` is this lane's share until reduce_sums
};

__device__ __forceinline__ void clear(AttnState& s) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) s.out[i][c] = 0.f;
    s.sum[0] = s.sum[1] = 0.f;
    s.top[0] = s.top[1] = -INFINITY;
}

// Sum and maximum over the four lanes of a row.
__device__ __forceinline__ float row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
    return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ __forceinline__ float row_sum(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}

// Asks for keys key0 .. key0 + 63 of a cache [.., 64]; keys from `length` on become zeros, never read. `threads` work together.
__device__ __forceinline__ void request_tile(uint8_t* tile, const uint16_t* cache, uint32_t key0, uint32_t length, uint32_t thread,
                                             uint32_t threads) {
    for (uint32_t c = thread; c < TILE_KEYS * 8; c += threads) {
        const uint32_t t = c / 8, j = c % 8;
        const bool valid = key0 + t < length;
        cp_async(smem_address(tile + t * 128 + (j ^ (t % 8)) * 16), cache + (size_t)(valid ? key0 + t : 0) * HEAD_DIM + j * 8, valid);
    }
}

// The A registers of 16 rows of queries; row_a and row_b are rows l/4 and l/4 + 8 of this lane, NULL for an absent row.
__device__ __forceinline__ void load_queries(uint32_t q[4][4], const uint16_t* row_a, const uint16_t* row_b) {
    const uint32_t at = threadIdx.x % 4 * 2;
#pragma unroll
    for (int s = 0; s < 4; s++) {
        q[s][0] = row_a ? *reinterpret_cast<const uint32_t*>(row_a + s * 16 + at) : 0;
        q[s][1] = row_b ? *reinterpret_cast<const uint32_t*>(row_b + s * 16 + at) : 0;
        q[s][2] = row_a ? *reinterpret_cast<const uint32_t*>(row_a + s * 16 + at + 8) : 0;
        q[s][3] = row_b ? *reinterpret_cast<const uint32_t*>(row_b + s * 16 + at + 8) : 0;
    }
}

__device__ __forceinline__ uint32_t pack(float a, float b) {
    __half2 h = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&h);
}

// 2^x; below 2^-126 it is 0, which spares exp2f's care for subnormals.
__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Turns the scores of N n8 tiles of keys into weights and scales the state to their maximum. Row r of this lane sees keys up to and
// including last[r] (absolute index); key0 is the first tile's first. The first keys of a row must hold one it sees. Without MASKED
// every row sees all: the same bits, for products are not fused into the sums that follow.
template <int N, bool MASKED>
__device__ __forceinline__ void soften(AttnState& state, float score[N][4], uint32_t key0, const uint32_t last[2]) {
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = state.top[r];
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const uint32_t key = key0 + j * 8 + threadIdx.x % 4 * 2 + c;
                float& x = score[j][r * 2 + c];
                x = !MASKED || key <= last[r] ? __fmul_rn(x, SCORE_SCALE) : -INFINITY;
                top = fmaxf(top, x);
            }
        top = row_max(top);
        shrink[r] = power2(state.top[r] - top);
        state.top[r] = top;
    }
    // Mostly the maximum has been seen before: then there is nothing to scale.
    if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            state.sum[r] = __fmul_rn(state.sum[r], shrink[r]);
#pragma unroll
            for (int j = 0; j < 8; j++) state.out[j][r * 2] *= shrink[r], state.out[j][r * 2 + 1] *= shrink[r];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float& x = score[j][r * 2 + c];
                x = power2(x - state.top[r]);
                state.sum[r] += x;
            }
}

// The A registers of k16 step t of the weights: an accumulator of two n8 tiles is the A layout of one k16 step.
__device__ __forceinline__ void weights_of(uint32_t a[4], const float score[][4], int t) {
    a[0] = pack(score[2 * t][0], score[2 * t][1]), a[1] = pack(score[2 * t][2], score[2 * t][3]);
    a[2] = pack(score[2 * t + 1][0], score[2 * t + 1][1]), a[3] = pack(score[2 * t + 1][2], score[2 * t + 1][3]);
}

// Adds 64 keys to the state; key0 and last as in `soften`.
__device__ __forceinline__ void attend(AttnState& state, const uint32_t q[4][4], const uint8_t* k_tile, const uint8_t* v_tile,
                                       uint32_t key0, const uint32_t last[2]) {
    const uint32_t lane = threadIdx.x % 32;
    float score[8][4];
    const uint32_t k = smem_address(k_tile), v = smem_address(v_tile);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const uint32_t t = j * 8 + lane % 8;
        uint32_t b[8];
        ldmatrix(b, k + t * 128 + ((lane / 8) ^ (t % 8)) * 16);
        ldmatrix(b + 4, k + t * 128 + ((lane / 8 + 4) ^ (t % 8)) * 16);
#pragma unroll
        for (int c = 0; c < 4; c++) score[j][c] = 0.f;
#pragma unroll
        for (int s = 0; s < 4; s++) mma(score[j], q[s], b[2 * s], b[2 * s + 1]);
    }
    soften<8, true>(state, score, key0, last);
#pragma unroll
    for (int t = 0; t < 4; t++) {
        uint32_t a[4];
        weights_of(a, score, t);
        const uint32_t key = t * 16 + lane % 16;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            uint32_t b[4];
            ldmatrix_transposed(b, v + key * 128 + ((j + lane / 16) ^ (key % 8)) * 16);
            mma(state.out[j], a, b[0], b[1]);
            mma(state.out[j + 1], a, b[2], b[3]);
        }
    }
}
