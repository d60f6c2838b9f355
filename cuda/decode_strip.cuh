// decode_strip — 16 output rows x a warp's UNITS units, on the integer tensor core. Used by decode_step.
//
// Inputs      fixed point, one scale for a token's inputs of this warp: x = step * v, v = 254 high + low, both from -127 to 127. They are
//             signed bytes, and columns of the product: column 2 t is token t's high bytes, 2 t + 1 its low ones. A token of four more
//             is in a second tile of columns.
//             The rounding is to 2^-16 of the largest input; f16, which the inputs come from, rounds that one to 2^-12. Where inputs
//             are below 2^-8 the step is the smallest, 2^-23.
// Codes       two words of a lane are the A operand of mma.m16n8k32 with a mask each for rows g and g + 8: two operations for 8 weights,
//             where f16 takes five. Rows g + 8 are 16 times too large, which the end undoes.
//
//                 word s   nibble   7     6     5     4     3     2     1     0       & 0x0f0f0f0f: row g, bytes k 2q, 2q+8, 2q+1, 2q+9
//                          k, row  2q+9  2q+9  2q+1  2q+1  2q+8  2q+8  2q    2q       & 0xf0f0f0f0: row g + 8, the same
//                                  g+8   g     g+8   g     g+8   g     g+8   g
//
// Sums        of a unit are exact integers: of high and low bytes below 2^21 each, 254 high + low below 2^29, which one conversion rounds.
// Zero points are what the sums begin with: minus a product of scales (x zero points) and the sums of a unit's v, whose k is the unit. As
//             f16 the sums are a pair, exactly.
#pragma once
#include "units.cuh"

// c[16 x 8] += a[16 x 32] * b[32 x 8], bytes; a is unsigned.
__device__ __forceinline__ void mma_bytes(uint32_t c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ void store_shared4(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared8(uint32_t address, uint32_t v, uint32_t w) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(v), "r"(w) : "memory");
}

constexpr int FIXED_BASE = 254;            // 2 * 127: what a high byte leaves, half a step at most, is a low byte
constexpr float LEAST_SHARE = 32768.f;     // high bytes' steps in 1, at most: as f16
constexpr uint32_t PICK_HIGH = 0x5140, PICK_LOW = 0x7362;  // of two FixedInputs::bytes_of
constexpr uint32_t COLUMN_TOKENS = 4;  // of a tile of 8 columns

// What a lane holds of a warp's inputs: columns g of TILES tiles.
template <int UNITS, int TILES>
struct FixedInputs {
    static constexpr int PIECES = (UNITS * 8 + 31) / 32;
    uint32_t b[TILES][UNITS][STEPS];
    float step[TILES];    // of token q, 4 + q
    uint32_t sums[2];     // of v / 64 as B operand of m16n8k16: column 2 t is token t, 2 t + 1 token 4 + t; and what f16 left out

    // Tile t from f16; `top`: the largest of a lane's, by `most`. The lanes of a token's two columns have one half of each unit, steps 2 p
    // and 2 p + 1 of the column of plane p: w[i] is the words of k 16 s + 8 h + 2 q, + 1 of unit i, at 2 (s % 2) + h. A lane converts
    // them to both planes, keeps its own and gives the other one away. Units beyond the warp's have codes and scales of zero: their
    // inputs do not matter, as long as they are not larger than the others.
    __device__ __forceinline__ void set(int t, const uint4 (&w)[UNITS], uint32_t top, uint32_t lane) {
        uint32_t bits = bits_of(top);
#pragma unroll
        for (int apart = 1; apart < 8; apart *= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, apart));
        const __half2 inverse = inverse_of(bits);
        const bool low = lane / 4 % 2;
        const uint32_t own = low ? PICK_LOW : PICK_HIGH, other = low ? PICK_HIGH : PICK_LOW;
#pragma unroll
        for (int i = 0; i < UNITS; i++)
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const uint32_t even = bytes_of(s ? w[i].z : w[i].x, inverse), odd = bytes_of(s ? w[i].w : w[i].y, inverse);
                keep_plane(b[t][i], s, __byte_perm(even, odd, own), __byte_perm(even, odd, other), low);
            }
        step[t] = __shfl_sync(~0u, step_of(inverse), lane % 4 * 8);
    }
    // Of the words of both planes this lane keeps its column's, and gives the other to lane ^ 4, which has the unit's other half.
    static __device__ __forceinline__ void keep_plane(uint32_t (&b)[STEPS], int s, uint32_t own, uint32_t given, bool low) {
        const uint32_t got = __shfl_xor_sync(~0u, given, 4);
        b[s] = low ? got : own, b[2 + s] = low ? own : got;
    }
    // The same for one token alone, whose inputs all lanes have a part of. Each is converted once, not by both its columns, and reaches
    // them through `bytes`, the shared address of two planes of UNITS * 64 bytes: high bytes and low ones, in the order of the codes.
    // With more tokens `set` has fewer instructions. The bits are the same.
    //
    // From memory: piece lane + 32 i is as many chunks of eight f16 on, which are s / 2 and q of a unit in this order.
    __device__ __forceinline__ void set_one(const uint4 (&pieces)[PIECES], uint32_t bytes, uint32_t lane) {
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) top = most(top, pieces[i]);
        const __half2 inverse = scale_of_one(top);
        const uint32_t to = bytes + lane / 8 * 64 + lane % 4 * 16 + lane / 4 % 2 * 8;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            uint32_t high[2], low[2];
            both(pieces[i].x, pieces[i].y, inverse, high[0], low[0]), both(pieces[i].z, pieces[i].w, inverse, high[1], low[1]);
            if (lane + 32 * i < UNITS * 8)
                store_shared8(to + i * 256, high[0], high[1]), store_shared8(to + UNITS * 64 + i * 256, low[0], low[1]);
        }
        take_planes(bytes, lane);
    }
    // From the norm: pairs[i] is inputs 2 lane, 2 lane + 1 of unit i. Lanes l and l ^ 4 have the four bytes of a word of each plane.
    __device__ __forceinline__ void set_pairs(const uint32_t (&pairs)[UNITS], uint32_t bytes, uint32_t lane) {
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < UNITS; i++) top = most(top, pairs[i]);
        const __half2 inverse = scale_of_one(top);
        const bool second = lane / 4 % 2;
        const uint32_t pick = second ? 0x3726 : PICK_HIGH;
        const uint32_t to = bytes + second * (UNITS * 64) + lane % 4 * 16 + lane / 8 * 4;
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint32_t own = bytes_of(pairs[i], inverse);
            store_shared4(to + i * 64, __byte_perm(own, __shfl_xor_sync(~0u, own, 4), pick));
        }
        take_planes(bytes, lane);
    }
    // The one token's step, from the largest of each lane's inputs; returns what inputs are multiplied by.
    __device__ __forceinline__ __half2 scale_of_one(uint32_t top) {
        const __half2 inverse = inverse_of(__reduce_max_sync(~0u, bits_of(top)));
        step[0] = step_of(inverse);
        return inverse;
    }
    // Operands from the planes. For the sums a column of the product is a unit, the weights are ones.
    __device__ __forceinline__ void take_planes(uint32_t bytes, uint32_t lane) {
        __syncwarp();
        const uint32_t g = lane / 4, from = bytes + lane % 4 * 16, own = from + min(g, UNITS - 1) * 64;
        const uint4 high = load_shared16(own), low = load_shared16(own + UNITS * 64);
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint4 v = lane < 8 ? load_shared16(from + g * (UNITS * 64) + i * 64) : make_uint4(0, 0, 0, 0);
            b[0][i][0] = v.x, b[0][i][1] = v.y, b[0][i][2] = v.z, b[0][i][3] = v.w;
        }
        const uint32_t ones[4] = {0x01010101, 0, 0x01010101, 0};
        uint32_t h[4] = {}, l[4] = {};
        mma_bytes(h, ones, high.x, high.y), mma_bytes(l, ones, low.x, low.y);
        mma_bytes(h, ones, high.z, high.w), mma_bytes(l, ones, low.z, low.w);
        float mean[2];
#pragma unroll
        for (int e = 0; e < 2; e++) mean[e] = __int2float_rn((int)h[e] * FIXED_BASE + (int)l[e]) * (1.f / UNIT_INPUTS);
        split(mean, sums);
        static_assert(UNITS % 2 == 0, "a lane's two units are or are not");
        if (g || lane % 4 * 2 >= UNITS) sums[0] = sums[1] = 0;  // the token is column 0
        __syncwarp();
    }
    // As f16, and what that left out.
    static __device__ __forceinline__ void split(const float (&mean)[2], uint32_t (&parts)[2]) {
        const __half2 v = __floats2half2_rn(mean[0], mean[1]);
        parts[0] = as_u32(v), parts[1] = as_u32(__floats2half2_rn(mean[0] - __low2float(v), mean[1] - __high2float(v)));
    }
    // Bytes of two inputs: high, high, low, low. 1536 and an integer of 8 bits is an f16 with the integer in its lower byte; what it
    // leaves is exact but for 2^-13 of a high byte's step.
    static __device__ __forceinline__ uint32_t bytes_of(uint32_t pair, __half2 inverse) {
        const __half2 x = as_half2(pair), zero = __float2half2_rn(1536.f), high = __hfma2(x, inverse, zero);
        const __half2 left = __hfma2(x, inverse, __hsub2(zero, high)), low = __hfma2(left, __float2half2_rn(FIXED_BASE), zero);
        return __byte_perm(as_u32(high), as_u32(low), 0x6420);
    }
    // Inputs 2q, 2q + 1 and 2q + 8, 2q + 9, as bytes in the order of the codes.
    static __device__ __forceinline__ void both(uint32_t even, uint32_t odd, __half2 inverse, uint32_t& high, uint32_t& low) {
        const uint32_t a = bytes_of(even, inverse), c = bytes_of(odd, inverse);
        high = __byte_perm(a, c, PICK_HIGH), low = __byte_perm(a, c, PICK_LOW);
    }
    static __device__ __forceinline__ uint32_t bits_of(uint32_t pair) {
        return __float_as_uint(__half2float(__hmax_nan(__low2half(as_half2(pair)), __high2half(as_half2(pair)))));
    }
    // Of the largest input's bits: high bytes' steps in 1, twice. Not a number if that is none.
    static __device__ __forceinline__ __half2 inverse_of(uint32_t largest) {
        const __half share = __float2half_rn(__fdividef(127.f, __uint_as_float(largest)));
        return __half2half2(__hmin_nan(share, __float2half_rn(LEAST_SHARE)));
    }
    static __device__ __forceinline__ float step_of(__half2 inverse) { return __fdividef(1.f / FIXED_BASE, __low2float(inverse)); }
    static __device__ __forceinline__ uint32_t most(uint32_t a, uint32_t b) {
        return as_u32(__hmax2_nan(as_half2(a), __habs2(as_half2(b))));
    }
    static __device__ __forceinline__ uint32_t most(uint32_t a, const uint4& v) { return most(most(most(most(a, v.x), v.y), v.z), v.w); }
    static __device__ __forceinline__ bool are_numbers(uint32_t pair) { return __hbeq2(as_half2(pair), as_half2(pair)); }

    // After the last tile `set`: sums. A product with ones in row i for unit i; transposed it is the operand.
    __device__ __forceinline__ void add_up(uint32_t lane) {
        const uint32_t g = lane / 4;
        uint32_t c[TILES][2][4] = {};
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint32_t ones = g == i ? 0x01010101u : 0, a[4] = {ones, 0, ones, 0};
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                mma_bytes(c[t][0], a, b[t][i][0], b[t][i][1]), mma_bytes(c[t][1], a, b[t][i][2], b[t][i][3]);
            }
        }
        float mean[2] = {0.f, 0.f};
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const int high = c[t][0][0] + c[t][1][0], low = c[t][0][1] + c[t][1][1];
            mean[t] = __int2float_rn(high * FIXED_BASE + low) * (1.f / UNIT_INPUTS);
        }
        split(mean, sums);
        sums[0] = transpose(sums[0]), sums[1] = transpose(sums[1]);
    }
    static __device__ __forceinline__ uint32_t transpose(uint32_t v) {
        uint32_t r;
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
        return r;
    }
};

// z += factors x sums; factors: (row g, row g + 8) of units 2q, 2q + 1.
__device__ __forceinline__ void subtrahend(float z[4], const uint32_t factors[2], uint32_t sums) {
    const uint32_t a[4] = {__byte_perm(factors[0], factors[1], 0x5410), __byte_perm(factors[0], factors[1], 0x7632), 0, 0};
    mma(z, a, sums, 0);
}

// z = the part of a product that the zero points are: factors of all units times the sums of their inputs, see FixedInputs::sums.
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
        subtrahend(z, rest, sums[0]);
    }
    subtrahend(z, pair, sums[1]);
    subtrahend(z, pair, sums[0]);
}

// sum[tile][0], [1]: rows g, g + 8 of tokens q, 4 + q, of `units` (a shared address) times x.
template <bool ZEROS, int UNITS, int TILES>
__device__ __forceinline__ void multiply_strip(float (&sum)[TILES][2], uint32_t units, const FixedInputs<UNITS, TILES>& x, uint32_t lane) {
    // Units whose products run side by side, and units whose codes are loaded ahead: all of them, where there are registers for it.
    constexpr int BYTES = unit_bytes<1, ZEROS>(), SIDE = 3, AHEAD = TILES == 1 ? UNITS : SIDE;
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
    constexpr float ZERO = (ZEROS ? 1.f : 8.f) * UNIT_INPUTS;
    float acc[TILES][2];  // rows g, then g + 8, which are 16 times too large
#pragma unroll
    for (int t = 0; t < TILES; t++) acc[t][0] = -ZERO * z[t], acc[t][1] = -16.f * ZERO * z[2 + t];
#pragma unroll
    for (int i = 0; i < UNITS; i += SIDE) {
        uint32_t c[SIDE][TILES][4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < SIDE; n++) {
                const uint32_t v = h ? codes[i + n].z : codes[i + n].x, w = h ? codes[i + n].w : codes[i + n].y;
                const uint32_t a[4] = {v & 0x0f0f0f0fu, v & 0xf0f0f0f0u, w & 0x0f0f0f0fu, w & 0xf0f0f0f0u};
#pragma unroll
                for (int t = 0; t < TILES; t++) mma_bytes(c[n][t], a, x.b[t][i + n][2 * h], x.b[t][i + n][2 * h + 1]);
            }
        if (i + AHEAD < UNITS) load(i + AHEAD);
#pragma unroll
        for (int n = 0; n < SIDE; n++) {
            const float2 scale = __half22float2(as_half2(scales[i + n]));
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    acc[t][r] = __fmaf_rn(r ? scale.y : scale.x, __int2float_rn((int)c[n][t][2 * r] * FIXED_BASE + (int)c[n][t][2 * r + 1]),
                                          acc[t][r]);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int r = 0; r < 2; r++) sum[t][r] = acc[t][r] * ((r ? 1.f / 16.f : 1.f) * x.step[t]);
}
