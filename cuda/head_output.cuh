// head_output — a row tile's sums for all tokens to logits, of head beyond 8 tokens.
#pragma once
#include "kernels.h"
#include "units.cuh"

// By the warp that has them; `logits` is token 0's of the row tile's first row. acc[n][e]: row lane / 4 (e < 2) or lane / 4 + 8, token
// 8 n + 2 (lane % 4) + e % 2.
template <int TOKENS>
__device__ __forceinline__ void store_logits(const HeadParams& p, float* logits, const float (&acc)[TOKENS / 8][4], float scale) {
    const uint32_t lane = threadIdx.x % 32;
    logits += lane / 4;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t m = n * 8 + lane % 4 * 2 + e % 2;
            if (m < p.tokens) logits[(size_t)m * p.vocab + e / 2 * 8] = acc[n][e] * scale;
        }
}
