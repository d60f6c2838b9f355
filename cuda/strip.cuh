// strip — 16 output rows x one K slice, and a warp's part of it: a few units whose inputs it keeps in registers. Used by gptq_gemv. The
// arithmetic is that of decode_step with up to 4 tokens, and decode_bytes.cuh draws its operands: columns of high and of low bytes; codes
// by one mask for each of rows g and g + 8. Here a unit may have two scales, inputs come in the order of memory, zero points are subtracted
// unit by unit (zero point x sum of the inputs is an integer too), and beyond 4 tokens there is a second tile of columns.
//
// Numbers  v is 254 high + low, both from -127 to 127: rounded to 2^-16 of the largest input, where f16 rounds that one to 2^-12. Where
//          inputs are below 2^-8 the step is the smallest, 2^-23.
#pragma once
#include "fixed.cuh"
#include "shared_words.cuh"

constexpr int FIXED_BASE = 254;         // 2 * 127: what a high byte leaves, half a step at most, is a low byte
constexpr float LEAST_SHARE = 32768.f;  // high bytes' steps in 1, at most: as f16

// Of the largest input's bits: high bytes' steps in 1, twice. Not a number if that is none.
__device__ __forceinline__ __half2 inverse_of(uint32_t largest) {
    const __half share = __float2half_rn(__fdividef(127.f, __uint_as_float(largest)));
    return __half2half2(__hmin_nan(share, __float2half_rn(LEAST_SHARE)));
}
__device__ __forceinline__ float step_of(__half2 inverse) { return __fdividef(1.f / FIXED_BASE, __low2float(inverse)); }

// Sums of a unit start at these bits, 1.5 * 2^23: with an integer below 2^22 added they are f32 numbers already.
constexpr uint32_t FLOAT_ZERO = 0x4b400000;
constexpr float FLOAT_ZERO_VALUE = 12582912.f;

__device__ __forceinline__ float2 load_shared8(uint32_t address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}

// The inputs of UNITS units for 4 TILES tokens: b[t] are B operands of mma.m16n8k32. Lane l has column l / 4 of a tile, which is token
// l / 8 of it, its high bytes in the even column, its low ones in the odd one.
template <int UNITS, int TILES, int SCALES>
struct StripInputs {
    static constexpr int PIECES = (UNITS * 8 + 31) / 32;
    static constexpr int PLANE_BYTES = UNITS * UNIT_INPUTS;
    static constexpr int SUM_BYTES = TILES * UNITS * SCALES * 32;
    uint32_t b[TILES][UNITS][STEPS];
    float step[TILES];  // of token l % 4
    uint32_t sums;      // shared address of SUM_BYTES of the warp: sums of each column, [TILES][UNITS][SCALES][8] f32

    // The four tokens of tile t: the 8 lanes of a token have the 8 chunks of 8 inputs of each unit, zeros where there are none. Lanes q
    // exchange words until each has its own of four chunks, converts them to both planes, keeps its column's and gives the other away.
    __device__ __forceinline__ void set(int t, const uint4 (&chunks)[UNITS], uint32_t lane) {
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < UNITS; i++) top = most(top, chunks[i]);
        uint32_t bits = bits_of(top);
#pragma unroll
        for (int apart = 1; apart < 8; apart *= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, apart));
        const __half2 inverse = inverse_of(bits);
        const bool odd = lane % 2, upper = lane / 2 % 2, low = lane / 4 % 2;
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint4 v = chunks[i];
            const uint32_t x = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1), y = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
            const uint32_t w[4] = {odd ? x : v.x, odd ? v.y : x, odd ? y : v.z, odd ? v.w : y};
            const uint32_t z = __shfl_xor_sync(~0u, upper ? w[0] : w[2], 2), u = __shfl_xor_sync(~0u, upper ? w[1] : w[3], 2);
            const uint32_t even[2] = {upper ? z : w[0], upper ? w[2] : z}, next[2] = {upper ? u : w[1], upper ? w[3] : u};
#pragma unroll
            for (int s = 0; s < 2; s++) {
                uint32_t high, rest;
                both<FIXED_BASE>(even[s], next[s], inverse, high, rest);
                keep_plane(b[t][i], s, low ? rest : high, low ? high : rest, low);
            }
        }
        step[t] = __shfl_sync(~0u, step_of(inverse), lane % 4 * 8);
    }
    // One token alone, with the same bits: chunk c = lane + 32 i of eight inputs. Each lane has a part of it, and the bytes reach the lanes
    // of its columns through `planes`, a shared address of 2 PLANE_BYTES of the warp: high bytes, low bytes.
    __device__ __forceinline__ void set_one(const uint4 (&chunks)[PIECES], uint32_t planes, uint32_t lane) {
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) top = most(top, chunks[i]);
        const __half2 inverse = inverse_of(__reduce_max_sync(~0u, bits_of(top)));
        // Two lanes have the halves of a k16 step: the even one makes the words of lanes q = 0 and 1, the odd one those of 2 and 3.
        const bool odd = lane % 2;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const uint4& v = chunks[i];
            const uint32_t first = __shfl_xor_sync(~0u, odd ? v.x : v.z, 1), second = __shfl_xor_sync(~0u, odd ? v.y : v.w, 1);
            uint32_t high[2], low[2];
            both<FIXED_BASE>(odd ? first : v.x, odd ? v.z : first, inverse, high[0], low[0]);
            both<FIXED_BASE>(odd ? second : v.y, odd ? v.w : second, inverse, high[1], low[1]);
            const uint32_t c = lane + 32 * i, to = planes + c / 8 * UNIT_INPUTS + c % 2 * 32 + c / 2 % 4 * 4;
            if (c < UNITS * 8) {
                store_shared4(to, high[0]), store_shared4(to + 16, high[1]);
                store_shared4(to + PLANE_BYTES, low[0]), store_shared4(to + PLANE_BYTES + 16, low[1]);
            }
        }
        __syncwarp();
        const uint32_t own = planes + lane / 4 % 2 * PLANE_BYTES + lane % 4 * 16;
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint4 v = lane < 8 ? load_shared16(own + i * UNIT_INPUTS) : make_uint4(0, 0, 0, 0);
            b[0][i][0] = v.x, b[0][i][1] = v.y, b[0][i][2] = v.z, b[0][i][3] = v.w;
        }
        __syncwarp();
        step[0] = step_of(inverse);
    }
    // Where this lane's two columns of accumulators have the sums of a unit, or of half of it.
    __device__ __forceinline__ uint32_t sums_of(int t, int i, int h, uint32_t lane) const {
        return sums + ((t * UNITS + i) * SCALES + h) * 32 + lane % 4 * 8;
    }
    // After the last token: `sums`, by products with ones.
    __device__ __forceinline__ void add_up(uint32_t lane) {
        constexpr uint32_t ONES[4] = {0x01010101, 0, 0x01010101, 0};
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < UNITS; i++) {
                uint32_t c[SCALES][4] = {};
#pragma unroll
                for (int h = 0; h < 2; h++) mma_bytes(c[h % SCALES], ONES, b[t][i][2 * h], b[t][i][2 * h + 1]);
#pragma unroll
                for (int h = 0; h < SCALES; h++) {
                    const float even = __int2float_rn((int)c[h][0]), odd = __int2float_rn((int)c[h][1]);
                    if (lane < 4) store_shared8(sums_of(t, i, h, lane), __float_as_uint(even), __float_as_uint(odd));
                }
            }
        __syncwarp();
    }
};

// sum[t][0], [1]: rows g, g + 8 of token l % 4 of tile t, of `units` (a shared address) times x.
template <bool ZEROS, int UNITS, int TILES, int SCALES>
__device__ __forceinline__ void multiply_part(float (&sum)[TILES][2], uint32_t units, const StripInputs<UNITS, TILES, SCALES>& x,
                                               uint32_t lane) {
    // Units whose products run side by side, and units whose codes are loaded ahead.
    constexpr int BYTES = unit_bytes<SCALES, ZEROS>(), SIDE = 3, AHEAD = TILES == 1 ? UNITS : SIDE;
    static_assert(UNITS % SIDE == 0, "no unit is left over");
    const uint32_t q = units + UNIT_CODE_BYTES + lane / 4 * 4;
    uint4 codes[UNITS];
    float acc[TILES][4] = {};  // high and low bytes of rows g, then of rows g + 8
#pragma unroll
    for (int i = 0; i < AHEAD; i++) codes[i] = load_shared16(units + i * BYTES + lane * 16);
#pragma unroll
    for (int i = 0; i < UNITS; i += SIDE) {
        uint32_t c[SIDE][TILES][SCALES][4];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int n = 0; n < SIDE; n++) {
                const uint32_t v = h ? codes[i + n].z : codes[i + n].x, w = h ? codes[i + n].w : codes[i + n].y;
                const uint32_t a[4] = {v & 0x0f0f0f0fu, v & 0xf0f0f0f0u, w & 0x0f0f0f0fu, w & 0xf0f0f0f0u};
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    uint32_t(&own)[4] = c[n][t][h % SCALES];
                    if (h < SCALES) own[0] = own[1] = own[2] = own[3] = FLOAT_ZERO;
                    mma_bytes(own, a, x.b[t][i + n][2 * h], x.b[t][i + n][2 * h + 1]);
                }
            }
        if (i + AHEAD < UNITS)
#pragma unroll
            for (int n = i + AHEAD; n < i + AHEAD + SIDE; n++) codes[n] = load_shared16(units + n * BYTES + lane * 16);
#pragma unroll
        for (int n = 0; n < SIDE; n++)
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
                const uint32_t at = q + (i + n) * BYTES + h * UNIT_SCALE_BYTES;
                const float2 scale = __half22float2(as_half2(load_shared4(at)));
                const float2 zero = ZEROS ? __half22float2(as_half2(load_shared4(at + SCALES * UNIT_SCALE_BYTES))) : make_float2(8.f, 8.f);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    const float2 columns = load_shared8(x.sums_of(t, i + n, h, lane));
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float less = __fmaf_rn(j < 2 ? zero.x : 16.f * zero.y, j % 2 ? columns.y : columns.x, FLOAT_ZERO_VALUE);
                        acc[t][j] = __fmaf_rn(j < 2 ? scale.x : scale.y, __uint_as_float(c[n][t][h][j]) - less, acc[t][j]);
                    }
                }
            }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            sum[t][r] = __fmaf_rn(acc[t][2 * r], (float)FIXED_BASE, acc[t][2 * r + 1]) * (r ? 1.f / 16.f : 1.f) * x.step[t];
}
