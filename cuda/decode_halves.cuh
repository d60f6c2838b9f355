// decode_halves — inputs of slices for 5 to 8 tokens, for decode_strip: v as f16, a token a column.
//
// f16 knows v exactly, since it comes from an f16 by a power of two: times 2^-24 it is a subnormal, and the multiplication rounds what is
// smaller. So it takes one instruction two inputs, where digits take five; and one product of 16 x 8 x 16 f16 where two planes of bytes
// would take two of the same time. Codes are subnormals too, see units.cuh, and sums multiples of 2^-48 below 2^-24, which the tensor core
// must add exactly: unpack_check looks whether it does.
//
// Cost      a strip is 254 instructions of a warp, where planes take 231 (decode_planes.cuh); inputs of a run 190 fewer than digits would.
// Measured  by turns with planes for slices too, their inputs converted by each reader, ms, a pair a run: 8 texts at 128 0.980 for 0.983,
//           0.981 for 0.980, 0.989 for 0.992, 0.994 for 0.997; 110 steps after two seconds of rest 0.991 for 0.988, 1.000 for 1.011; at 512
//           1.011 for 1.032, 1.013 for 1.031, 1.030 for 1.060; at 1024 1.058 for 1.092, 1.087 for 1.115, 1.090 for 1.119; at 1900 1.428
//           for 1.459; sustained at 128 1.050 for 1.050, 1.065 for 1.056, at 1024 1.139 for 1.146, 1.157 for 1.167. So it is for contexts
//           beyond some hundred tokens.
// Tried     Attention's slice alone as f16: 1.000 at 128, 1.111 at 1024, 1.430 at 1900. Norms as f16 too, v from their owner, one loop of
//           strips for both: 0.987 for 0.980, at 512 1.020 for 1.011, sustained 1.071 for 1.050. Units side by side and loaded ahead, where
//           3 and 3 took 0.994 and at 1024 1.090: 2 and 2 0.996, 1.088; 2 and 4 0.996, 1.088; 1 and 2 0.994, 1.089; 3 and 6 0.996 (in
//           another run 0.984 for 0.980), 1.082.
#pragma once
#include "decode_strip.cuh"

// What a lane holds of a warp's inputs: those of token g.
template <int UNITS_>
struct HalfInputs {
    static constexpr int UNITS = UNITS_, TOKENS = 2, PIECES = 2, PARTS = STEPS;
    static constexpr bool ALL_AHEAD = false;
    static constexpr float ONE = 1.f / (CODE_LOW_SCALE * CODE_LOW_SCALE);  // a product of a code 1 and v 1, rows g
    using Sums = float[4];
    uint4 b[UNITS][PIECES];  // [p]: of steps 2 p and 2 p + 1 of a unit v of k 16 s + 8 h + 2 q, + 1, times 2^-24
    float step[TOKENS];      // of tokens 2 q, 2 q + 1
    uint32_t sums[2];        // see FixedPoint; column t is token t

    // `b` is the inputs themselves, `top` their largest.
    __device__ __forceinline__ void set(uint32_t top, uint32_t lane) {
        uint32_t bits = bits_of(top);
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, apart));
        float share = FixedPoint::inverse_of(bits);
        const float own = FixedPoint::step_of(bits, share);
        // 2^-24 * BASE, in two steps where f16 has no such factor.
        if (share < 0x1p-7f) share *= 0x1p8f, multiply_all(__float2half2_rn(0x1p-8f));
        multiply_all(__float2half2_rn(share * 0x1p-17f));
#pragma unroll
        for (int t = 0; t < TOKENS; t++) step[t] = __shfl_sync(~0u, own, (lane % 4 * 2 + t) * 4);
        add_up(lane);
    }
    __device__ __forceinline__ void multiply_all(__half2 factor) {
        const auto product = [&](uint32_t v) { return as_u32(__hmul2(as_half2(v), factor)); };
#pragma unroll
        for (int i = 0; i < UNITS; i++)
#pragma unroll
            for (int p = 0; p < PIECES; p++) {
                const uint4 v = b[i][p];
                b[i][p] = make_uint4(product(v.x), product(v.y), product(v.z), product(v.w));
            }
    }
    // Sums. A product with 1 / 64 in row i for unit i; transposed it is the operand.
    __device__ __forceinline__ void add_up(uint32_t lane) {
        float c[2][4] = {};
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint32_t shares = lane / 4 == i ? 0x24002400u : 0, a[4] = {shares, 0, shares, 0};
#pragma unroll
            for (int p = 0; p < PIECES; p++) mma(c[0], a, b[i][p].x, b[i][p].y), mma(c[1], a, b[i][p].z, b[i][p].w);
        }
        const float mean[2] = {(c[0][0] + c[1][0]) * CODE_LOW_SCALE, (c[0][1] + c[1][1]) * CODE_LOW_SCALE};
        FixedPoint::split_sums(sums, mean);
        sums[0] = FixedPoint::transpose(sums[0]), sums[1] = FixedPoint::transpose(sums[1]);
    }

    // Step `part` of unit i.
    __device__ __forceinline__ void multiply(Sums& c, const uint4& codes, int i, int part) const {
        uint32_t a[4];
        unpack_subnormal(part == 0 ? codes.x : part == 1 ? codes.y : part == 2 ? codes.z : codes.w, a);
        const uint4& v = b[i][part / 2];
        mma(c, a, part % 2 ? v.z : v.x, part % 2 ? v.w : v.y);
    }
    static __device__ __forceinline__ float value(const Sums& c, int t, int r) { return c[2 * r + t]; }
};
