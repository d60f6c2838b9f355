// strip — 16 output rows x one K slice, and a warp's part of it: a few units whose inputs it keeps in registers. Shared by gptq_gemv
// and decode_step, so that both have one arithmetic.
#pragma once
#include "units.cuh"

// The inputs of UNITS units for up to 8 tokens as B operands of mma.m16n8k16: b[i][2 s], b[i][2 s + 1] for k16 step s of unit i. Lane l
// holds token l / 4. sums[i][h]: of the unit's h-th run of 64 / SCALES inputs, for the tokens 2 (l % 4), + 1 of this lane's accumulators.
template <int UNITS, int SCALES>
struct StripInputs {
    uint32_t b[UNITS][2 * STEPS];
    float2 sums[UNITS][SCALES];

    // From b. In a fixed order.
    __device__ __forceinline__ void add_up() {
        const uint32_t q = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < UNITS; i++)
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
                float sum = 0.f;
#pragma unroll
                for (int j = h * 2 * STEPS / SCALES; j < (h + 1) * 2 * STEPS / SCALES; j++) {
                    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&b[i][j]));
                    sum += f.x + f.y;
                }
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                // Token t's sum is in lanes 4 t ..; this lane's accumulators are of tokens 2 q and 2 q + 1.
                sums[i][h] = make_float2(__shfl_sync(~0u, sum, 8 * q), __shfl_sync(~0u, sum, 8 * q + 4));
            }
    }
};

// acc[16 rows x 8 tokens] += one unit * x.
template <int SCALES, bool ZEROS>
__device__ __forceinline__ void multiply_unit(float acc[4], const uint8_t* unit, const uint32_t b[2 * STEPS], const float2 sums[SCALES],
                                              uint32_t lane) {
    const uint4 codes = *reinterpret_cast<const uint4*>(unit + lane * 16);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int h = 0; h < SCALES; h++) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = h * STEPS / SCALES; s < (h + 1) * STEPS / SCALES; s++) {
            uint32_t a[4];
            unpack_subnormal(words[s], a);
            mma(c, a, b[2 * s], b[2 * s + 1]);
        }
        const uint8_t* q = unit + UNIT_CODE_BYTES + h * UNIT_SCALE_BYTES + lane / 4 * 4;
        const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(q));
        const float2 zero =
            ZEROS ? __half22float2(*reinterpret_cast<const __half2*>(q + SCALES * UNIT_SCALE_BYTES)) : make_float2(8.f, 8.f);
        acc[0] += scale.x * fmaf(c[0], CODE_LOW_SCALE, -zero.x * sums[h].x);
        acc[1] += scale.x * fmaf(c[1], CODE_LOW_SCALE, -zero.x * sums[h].y);
        acc[2] += scale.y * fmaf(c[2], CODE_HIGH_SCALE, -zero.y * sums[h].x);
        acc[3] += scale.y * fmaf(c[3], CODE_HIGH_SCALE, -zero.y * sums[h].y);
    }
}

// acc += the first `units` of UNITS consecutive units * x; no branch between the units of a full warp, so that their chains of mma run
// side by side.
template <int UNITS, int SCALES, bool ZEROS>
__device__ __forceinline__ void multiply_units(float acc[4], const uint8_t* first, uint32_t units, const StripInputs<UNITS, SCALES>& x,
                                               uint32_t lane) {
    constexpr int BYTES = unit_bytes<SCALES, ZEROS>(), LAST = UNITS - 1;
    if (units >= LAST) {
#pragma unroll
        for (int i = 0; i < LAST; i++) multiply_unit<SCALES, ZEROS>(acc, first + i * BYTES, x.b[i], x.sums[i], lane);
        if (units > LAST) multiply_unit<SCALES, ZEROS>(acc, first + LAST * BYTES, x.b[LAST], x.sums[LAST], lane);
    } else {
#pragma unroll
        for (int i = 0; i < LAST; i++)
            if (i < units) multiply_unit<SCALES, ZEROS>(acc, first + i * BYTES, x.b[i], x.sums[i], lane);
    }
}
