// decode_planes — inputs of 5 to 8 tokens for decode_strip: a tile of high bytes of v and one of low ones, column t token t.
//
// A lane has the f16 of its column alone, and converts them to its words of both tiles; nothing is exchanged.
//
// Cost      cycles of a scheduler with three warps (H200): a product 6.2; with 2, 4, 6 other instructions for each
//               LOP3, SHF, PRMT, IMAD, I2FP   7.0  10.1  14.1     (four alone 8.2)
//               HADD2                         6.8  10.7  15.3     (4.5)
//               HFMA2                         7.5  11.9  16.1     (6.3)
//               FFMA                          7.4   8.6  10.1     (3.6)
//               IMAD.HI                      14.4  22.2  30.0    (15.7)
//               F2FP of e4m3                  7.4  13.8  17.9    (10.8)
//           So they add, to each other and to products. A strip is 231 instructions of a warp: 24 products, 48 masks, 48 to join digits. A
//           multiply-add by mma.sync is 1.9 pJ in f16 and 0.66 of bytes, of which there are two.
// Measured  by turns with v as f16 (254 instructions a strip, 190 fewer to convert a run's inputs), norms as now published, ms: 8 texts at
//           128 0.977 for 0.987, 0.975 for 0.983, sustained 0.990 for 1.001, 1.020 for 1.029; 8 tokens of one text 1.009 for 1.018,
//           sustained 1.065 for 1.081; but 8 texts at 1024 1.098 for 1.068, sustained 1.104 for 1.083, and 1.200 for 1.212 on a card that
//           was short of power; at 1900 1.474 for 1.442. So it is less power, and a longer way to the first strip of a run.
// Tried     Digits joined in f32, sums beginning at 1.5 * 2^23: 1.028 for 1.014, at 1024 1.137 for 1.082. All codes of a strip loaded ahead:
//           0.985 for 0.977.
#pragma once
#include "decode_strip.cuh"

template <int UNITS_>
struct PlaneInputs {
    static constexpr int UNITS = UNITS_, TOKENS = 2, PLANES = 2;
    static constexpr bool ALL_AHEAD = false;
    using Sums = uint32_t[2][4];
    uint32_t b[2][UNITS][STEPS];  // high, low
    float step[TOKENS];           // of tokens 2 q, 2 q + 1
    uint32_t sums[2];             // see FixedPoint; column t is token t

    // From f16: w[i][p] is the words of steps 2 p and 2 p + 1 of unit i, of token g: k 16 s + 8 h + 2 q, + 1.
    __device__ __forceinline__ void set(const uint4 (&w)[UNITS][2], uint32_t top, uint32_t lane) {
        uint32_t bits = bits_of(top);
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, apart));
        const float share = FixedPoint::inverse_of(bits), own = FixedPoint::step_of(bits, share);
        const __half2 inverse = __float2half2_rn(share);
        // Sums: a product with ones in row i for unit i; transposed it is the operand.
        uint32_t c[2][4] = {};
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint32_t ones = lane / 4 == i ? 0x01010101u : 0, a[4] = {ones, 0, ones, 0};
#pragma unroll
            for (int p = 0; p < 2; p++) {
                both<FixedPoint::BASE>(w[i][p].x, w[i][p].y, inverse, b[0][i][2 * p], b[1][i][2 * p]);
                both<FixedPoint::BASE>(w[i][p].z, w[i][p].w, inverse, b[0][i][2 * p + 1], b[1][i][2 * p + 1]);
#pragma unroll
                for (int h = 0; h < 2; h++) mma_bytes(c[h], a, b[h][i][2 * p], b[h][i][2 * p + 1]);
            }
        }
        float mean[2];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            step[t] = __shfl_sync(~0u, own, (lane % 4 * 2 + t) * 4);
            mean[t] = FixedPoint::both_digits(c[0][t], c[1][t]) * (1.f / UNIT_INPUTS);
        }
        FixedPoint::split_sums(sums, mean);
        sums[0] = FixedPoint::transpose(sums[0]), sums[1] = FixedPoint::transpose(sums[1]);
    }
    // From a norm as it is published, see decode_norm.cuh.
    __device__ __forceinline__ void put(const uint4 (&w)[UNITS][2], uint2 record, uint32_t lane) {
#pragma unroll
        for (int i = 0; i < UNITS; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) b[h][i][0] = w[i][h].x, b[h][i][1] = w[i][h].y, b[h][i][2] = w[i][h].z, b[h][i][3] = w[i][h].w;
#pragma unroll
        for (int t = 0; t < TOKENS; t++) step[t] = __uint_as_float(__shfl_sync(~0u, record.x, (lane % 4 * 2 + t) * 4 + 3));
        const bool none = lane % 4 == 3;
        sums[0] = none ? 0 : record.x, sums[1] = none ? 0 : record.y;
    }

    // Half `part` of unit i.
    __device__ __forceinline__ void multiply(Sums& c, const uint4& codes, int i, int part) const {
        uint32_t a[4];
        unpack_bytes(codes, part, a);
#pragma unroll
        for (int h = 0; h < 2; h++) mma_bytes(c[h], a, b[h][i][2 * part], b[h][i][2 * part + 1]);
    }
    static __device__ __forceinline__ float value(const Sums& c, int t, int r) {
        return FixedPoint::both_digits(c[0][2 * r + t], c[1][2 * r + t]);
    }
};
