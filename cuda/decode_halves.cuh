// decode_halves — inputs of 5 to 8 tokens for decode_strip: v as f16, a token a column.
//
// f16 knows v exactly, since it comes from an f16 by a power of two: times 2^-24 it is a subnormal, and the multiplication rounds what is
// smaller. So it takes one instruction two inputs, where bytes take six; and one product of 16 x 8 x 16 f16 where two planes of bytes
// would take two of the same time. Codes are subnormals too, see units.cuh, and sums multiples of 2^-48 below 2^-24.
//
// Cost      cycles of a scheduler with three warps (H200): a product 6.2; with 2, 4, 6 other instructions for each
//               LOP3, SHF, PRMT, IMAD, I2FP   7.0  10.1  14.1     (four alone 8.2)
//               HADD2                         6.8  10.7  15.3     (4.5)
//               HFMA2                         7.5  11.9  16.1     (6.3)
//               FFMA                          7.4   8.6  10.1     (3.6)
//               IMAD.HI                      14.4  22.2  30.0    (15.7)
//               F2FP of e4m3                  7.4  13.8  17.9    (10.8)
//           So they add, to each other and to products: a strip is 359 cycles a warp, of which unpacking, five instructions a product, is
//           136. Tried there: upper bytes by PRMT, rows g + 8 of them as a difference by HADD2 352, by IMAD 364; of both bytes by IMAD 400;
//           the shift by IMAD.HI 414. (Codes as bytes, up to 4 tokens: 207.)
#pragma once
#include "decode_strip.cuh"

// What a lane holds of a warp's inputs: those of token g. b[i][2 s + h] is v of k 16 s + 8 h + 2 q, + 1 of unit i, times 2^-24.
template <int UNITS_>
struct HalfInputs {
    static constexpr int UNITS = UNITS_, TOKENS = 2, PARTS = STEPS;
    static constexpr bool ALL_AHEAD = false;
    static constexpr float ONE = 0x1p-48f;  // a product of a code 1 and v 1
    using Sums = float[4];
    uint32_t b[UNITS][2 * STEPS];
    float step[TOKENS];  // of tokens 2 q, 2 q + 1
    uint32_t sums[2];    // see FixedPoint; column t is token t

    // From f16: w[i][p] is the words of steps 2 p and 2 p + 1 of unit i.
    __device__ __forceinline__ void set(const uint4 (&w)[UNITS][2], uint32_t top, uint32_t lane) {
        uint32_t bits = bits_of(top);
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, apart));
        float share = FixedPoint::inverse_of(bits);
        const float own = FixedPoint::step_of(bits, share);
#pragma unroll
        for (int i = 0; i < UNITS; i++)
#pragma unroll
            for (int p = 0; p < 2; p++)
                b[i][4 * p] = w[i][p].x, b[i][4 * p + 1] = w[i][p].y, b[i][4 * p + 2] = w[i][p].z, b[i][4 * p + 3] = w[i][p].w;
        // 2^-24 * BASE, in two steps where f16 has no such factor.
        if (share < 0x1p-7f) share *= 0x1p8f, multiply_all(__float2half2_rn(0x1p-8f));
        multiply_all(__float2half2_rn(share * 0x1p-17f));
#pragma unroll
        for (int t = 0; t < TOKENS; t++) step[t] = __shfl_sync(~0u, own, (lane % 4 * 2 + t) * 4);
        add_up(lane);
    }
    __device__ __forceinline__ void multiply_all(__half2 factor) {
#pragma unroll
        for (int i = 0; i < UNITS; i++)
#pragma unroll
            for (int j = 0; j < 2 * STEPS; j++) b[i][j] = as_u32(__hmul2(as_half2(b[i][j]), factor));
    }
    // Sums. A product with 1 / 64 in row i for unit i; transposed it is the operand.
    __device__ __forceinline__ void add_up(uint32_t lane) {
        float c[2][4] = {};
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint32_t shares = lane / 4 == i ? 0x24002400u : 0, a[4] = {shares, 0, shares, 0};
#pragma unroll
            for (int s = 0; s < STEPS; s++) mma(c[s % 2], a, b[i][2 * s], b[i][2 * s + 1]);
        }
        const float mean[2] = {(c[0][0] + c[1][0]) * CODE_LOW_SCALE, (c[0][1] + c[1][1]) * CODE_LOW_SCALE};
        FixedPoint::split_sums(sums, mean);
        sums[0] = FixedPoint::transpose(sums[0]), sums[1] = FixedPoint::transpose(sums[1]);
    }

    // Step `part` of unit i.
    __device__ __forceinline__ void multiply(Sums& c, const uint4& codes, int i, int part) const {
        uint32_t a[4];
        unpack_subnormal(part == 0 ? codes.x : part == 1 ? codes.y : part == 2 ? codes.z : codes.w, a);
        mma(c, a, b[i][2 * part], b[i][2 * part + 1]);
    }
    static __device__ __forceinline__ float value(const Sums& c, int t, int r) { return c[2 * r + t]; }
};
