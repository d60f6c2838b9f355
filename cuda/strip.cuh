// strip — 16 output rows x one K slice, and a warp's part of it: a few units whose inputs it keeps in registers. Used by gptq_gemv;
// decode_step, which keeps its inputs for a whole phase, has decode_strip.cuh.
#pragma once
#include "units.cuh"

// The inputs of UNITS units for up to 8 tokens as B operands of mma.m16n8k16: b[i][2 s], b[i][2 s + 1] for k16 step s of unit i. Lane l
// holds token l / 4. offset[i][h]: what the zero point 8 (ZEROS: 1) takes from the unit's h-th run of 64 / SCALES inputs, for the tokens
// 2 (l % 4), + 1 of this lane's accumulators, at the scale of rows g.
template <int UNITS, int SCALES, bool ZEROS>
struct StripInputs {
    uint32_t b[UNITS][2 * STEPS];
    float2 offset[UNITS][SCALES];

    // From b: a product with ones, whose rows are all the sums. The tensor core does it in a tenth of the instructions.
    __device__ __forceinline__ void add_up() {
        constexpr float ZERO = (ZEROS ? -1.f : -8.f) / CODE_LOW_SCALE;
        constexpr uint32_t ONES[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
#pragma unroll
        for (int i = 0; i < UNITS; i++)
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
                float c[2][4] = {};
#pragma unroll
                for (int s = h * STEPS / SCALES; s < (h + 1) * STEPS / SCALES; s++) mma(c[s % 2], ONES, b[i][2 * s], b[i][2 * s + 1]);
                offset[i][h] = make_float2(ZERO * (c[0][0] + c[1][0]), ZERO * (c[0][1] + c[1][1]));
            }
    }
};

// acc[16 rows x 8 tokens] += one unit * x, with rows g and g + 8 each at their power of two. Two chains of mma for a scale's inputs, not
// one: a chain is waited for 33 cycles a link, and the compiler puts one unit's behind the other's. The zero points' share is where
// a chain begins.
template <int UNITS, int SCALES, bool ZEROS>
__device__ __forceinline__ void multiply_unit(float acc[4], const uint8_t* unit, const StripInputs<UNITS, SCALES, ZEROS>& x, int i,
                                              uint32_t lane) {
    const uint4 codes = *reinterpret_cast<const uint4*>(unit + lane * 16);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int h = 0; h < SCALES; h++) {
        const uint8_t* q = unit + UNIT_CODE_BYTES + h * UNIT_SCALE_BYTES + lane / 4 * 4;
        const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(q));
        const float2 zero =
            ZEROS ? __half22float2(*reinterpret_cast<const __half2*>(q + SCALES * UNIT_SCALE_BYTES)) : make_float2(1.f, 1.f);
        constexpr float RATIO = CODE_LOW_SCALE / CODE_HIGH_SCALE;
        const float2 low = x.offset[i][h], high = make_float2(low.x * RATIO, low.y * RATIO);
        float c[2][4] = {{zero.x * low.x, zero.x * low.y, zero.y * high.x, zero.y * high.y}, {0.f, 0.f, 0.f, 0.f}};
#pragma unroll
        for (int s = h * STEPS / SCALES; s < (h + 1) * STEPS / SCALES; s++) {
            uint32_t a[4];
            unpack_subnormal(words[s], a);
            mma(c[s % 2], a, x.b[i][2 * s], x.b[i][2 * s + 1]);
        }
        acc[0] += scale.x * (c[0][0] + c[1][0]), acc[2] += scale.y * (c[0][2] + c[1][2]);
        acc[1] += scale.x * (c[0][1] + c[1][1]), acc[3] += scale.y * (c[0][3] + c[1][3]);
    }
}
// Undoes the powers of two of a strip's sums.
__device__ __forceinline__ void scale_rows(float acc[4]) {
    acc[0] *= CODE_LOW_SCALE, acc[1] *= CODE_LOW_SCALE, acc[2] *= CODE_HIGH_SCALE, acc[3] *= CODE_HIGH_SCALE;
}
