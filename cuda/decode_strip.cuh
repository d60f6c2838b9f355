// decode_strip — 16 output rows x a warp's UNITS units x 8 tokens, on the tensor core. Used by decode_step.
//
// Inputs      fixed point: x = step * v, a step for a token's inputs of this warp, a power of two; v from -16256 to 16256, rounded to even.
//             The step is 2^-13 to 2^-14 of the largest input, of which f16, which the inputs come from, knows 2^-11. Where inputs are
//             below 2^-8 it is the smallest, 2^-22.
//             v is two signed bytes, digits of base 128: of up to 4 tokens in one tile of 8 columns (decode_bytes.cuh), of 5 to 8 in two
//             (decode_planes.cuh); or, of slices of 5 to 8, f16 (decode_halves.cuh).
// Sums        of a unit, codes times v, are below 15 * 64 * 16256 < 2^24: exact as integers and in f32. So all ways give the same bits.
// Codes       two words of a lane are the A operand of mma.m16n8k32 with a mask each for rows g and g + 8: two operations for 8 weights,
//             where f16 takes five. Rows g + 8 are 16 times too large.
//
//                 word s   nibble   7     6     5     4     3     2     1     0       & 0x0f0f0f0f: row g, bytes k 2q, 2q+8, 2q+1, 2q+9
//                          k, row  2q+9  2q+9  2q+1  2q+1  2q+8  2q+8  2q    2q       & 0xf0f0f0f0: row g + 8, the same
//                                  g+8   g     g+8   g     g+8   g     g+8   g
//
// Zero points are what the sums begin with: minus a product of scales (x zero points) and the sums of a unit's v, whose k is the unit. As
//             f16 the sums are a pair, exactly.
#pragma once
#include "fixed.cuh"
#include "shared_words.cuh"

// decode_step's fixed point.
struct FixedPoint {
    static constexpr int BASE = 128;  // v = BASE * high + low, high up to 127

    // The high digit's steps in 1: the largest power of two that leaves the largest input at 127 or less.
    static __device__ __forceinline__ float inverse_of(uint32_t largest) {
        constexpr uint32_t ONE = 0x3f800000u, EXPONENT = 0x00800000u, ABOVE_127 = EXPONENT - 1 - 0x7e0000u;
        return __uint_as_float(min(2 * ONE + 6 * EXPONENT - ((largest + ABOVE_127) & 0x7f800000u), ONE + 15 * EXPONENT));
    }
    // What v is multiplied by. Not a number if the largest input is none.
    static __device__ __forceinline__ float step_of(uint32_t largest, float inverse) {
        const float step = __uint_as_float(0x7f000000u - __float_as_uint(inverse)) * (1.f / BASE);
        return largest < 0x7f800000u ? step : __int_as_float(0x7fffffff);
    }

    static __device__ __forceinline__ float both_digits(uint32_t high, uint32_t low) { return __int2float_rn((int)high * BASE + (int)low); }
    // sums: of a unit's v / 64, two tokens' of unit lane / 4, as B operand of m16n8k16, whose k is the unit; and what f16 left out.
    static __device__ __forceinline__ void split_sums(uint32_t (&sums)[2], const float (&mean)[2]) {
        const __half2 v = __floats2half2_rn(mean[0], mean[1]);
        sums[0] = as_u32(v), sums[1] = as_u32(__floats2half2_rn(mean[0] - __low2float(v), mean[1] - __high2float(v)));
    }
    static __device__ __forceinline__ uint32_t transpose(uint32_t v) {
        uint32_t r;
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
        return r;
    }
};

// The A registers of half `part` of a lane's codes.
__device__ __forceinline__ void unpack_bytes(const uint4& codes, int part, uint32_t a[4]) {
    const uint32_t v = part ? codes.z : codes.x, w = part ? codes.w : codes.y;
    a[0] = v & 0x0f0f0f0fu, a[1] = v & 0xf0f0f0f0u, a[2] = w & 0x0f0f0f0fu, a[3] = w & 0xf0f0f0f0u;
}

// z += factors x (sums + rest); factors: (row g, row g + 8) of units 2q, 2q + 1. One product of 16 k: the eight units, twice.
__device__ __forceinline__ void subtrahend(float z[4], const uint32_t factors[2], uint32_t sums, uint32_t rest) {
    const uint32_t low = __byte_perm(factors[0], factors[1], 0x5410), high = __byte_perm(factors[0], factors[1], 0x7632);
    const uint32_t a[4] = {low, high, low, high};
    mma(z, a, sums, rest);
}

// z = the part of a product that the zero points are: factors of all units times the sums of their inputs, see FixedPoint::split_sums.
// Of a unit that is none: any scale, its sums are zeros.
template <bool ZEROS, int UNITS>
__device__ __forceinline__ void subtrahends(float (&z)[4], uint32_t scales, const uint32_t (&sums)[2], uint32_t lane) {
    constexpr int BYTES = unit_bytes<1, ZEROS>();
    const uint32_t own = scales + min(lane % 4, (UNITS - 1) / 2) * 2 * BYTES;
    uint32_t pair[2] = {load_shared4(own), load_shared4(own + BYTES)};
    if (ZEROS) {
        // A scale times a zero point has more bits than an f16: two of them.
        const uint32_t zero[2] = {load_shared4(own + UNIT_SCALE_BYTES), load_shared4(own + BYTES + UNIT_SCALE_BYTES)};
        uint32_t rest[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const __half2 whole = __hmul2(as_half2(pair[k]), as_half2(zero[k]));
            rest[k] = as_u32(__hfma2(as_half2(pair[k]), as_half2(zero[k]), __hneg2(whole))), pair[k] = as_u32(whole);
        }
        subtrahend(z, rest, sums[0], 0);
    }
    subtrahend(z, pair, sums[0], sums[1]);
}

// sum[t][0], [1]: rows g, g + 8 of the t-th of a lane's tokens, of `units` (a shared address) times x.
template <bool ZEROS, class Inputs>
__device__ __forceinline__ void multiply_strip(float (&sum)[Inputs::TOKENS][2], uint32_t units, const Inputs& x, uint32_t lane) {
    // Units whose products run side by side, and units whose codes are loaded ahead.
    constexpr int BYTES = unit_bytes<1, ZEROS>(), UNITS = Inputs::UNITS, SIDE = 3, AHEAD = Inputs::ALL_AHEAD ? UNITS : SIDE;
    static_assert(UNITS <= 8 && UNITS % SIDE == 0, "a unit is a row of the sums' product, two are a lane's; no unit is left over");
    uint4 codes[UNITS];
    uint32_t scales[UNITS];
    const uint32_t q = units + UNIT_CODE_BYTES + lane / 4 * 4;
    const auto load = [&](int i) {
#pragma unroll
        for (int n = i; n < i + SIDE; n++) codes[n] = load_shared16(units + n * BYTES + lane * 16);
#pragma unroll
        for (int n = i; n < i + SIDE; n++) scales[n] = load_shared4(q + n * BYTES);
    };
    float z[4] = {0.f, 0.f, 0.f, 0.f};
    subtrahends<ZEROS, UNITS>(z, q, x.sums, lane);
#pragma unroll
    for (int i = 0; i < AHEAD; i += SIDE) load(i);
    __syncwarp();  // for the compiler: these loads are asked for before the first is used
    constexpr float ZERO = (ZEROS ? 1.f : 8.f) * UNIT_INPUTS * Inputs::ONE;
    // Rows g, then g + 8, which are 16 times too large.
#pragma unroll
    for (int t = 0; t < Inputs::TOKENS; t++) sum[t][0] = -ZERO * z[t], sum[t][1] = -16.f * ZERO * z[2 + t];
#pragma unroll
    for (int i = 0; i < UNITS; i += SIDE) {
        typename Inputs::Sums c[SIDE] = {};
#pragma unroll
        for (int part = 0; part < Inputs::PARTS; part++)
#pragma unroll
            for (int n = 0; n < SIDE; n++) x.multiply(c[n], codes[i + n], i + n, part);
        if (i + AHEAD < UNITS) load(i + AHEAD);
#pragma unroll
        for (int n = 0; n < SIDE; n++) {
            const float2 scale = __half22float2(as_half2(scales[i + n]));
#pragma unroll
            for (int t = 0; t < Inputs::TOKENS; t++)
#pragma unroll
                for (int r = 0; r < 2; r++) sum[t][r] = __fmaf_rn(r ? scale.y : scale.x, Inputs::value(c[n], t, r), sum[t][r]);
        }
    }
#pragma unroll
    for (int t = 0; t < Inputs::TOKENS; t++)
#pragma unroll
        for (int r = 0; r < 2; r++) sum[t][r] *= (r ? 1.f / 16.f : 1.f) / Inputs::ONE * x.step[t];
}
