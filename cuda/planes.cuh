// planes — activations of up to 16 tokens as two planes of bytes, with a step for each 64 of a token's: what gptq_batch multiplies there.
//
// x[m, k] = step[k / 64][m] * (256 * high[m, k] + low[m, k]), both bytes signed. A buffer of `inputs` a token, as shared memory gets it:
//
//     |unit 0: 16 tokens' 64 high bytes, 16 tokens' 64 low bytes|unit 1|..|steps: [inputs / 64][16] f32|
//
// 16-byte chunk c of token m lies at c ^ m / 2 % 4: the copy engine's 64-byte swizzle, by which wgmma reads without bank conflicts. Of a
// chunk's 16 inputs, byte 4 q + j is input {2q, 2q + 8, 2q + 1, 2q + 9}[j]: in this order a word of a unit has its codes (units.cuh), so
// that masks alone make bytes of them. There is room for 16 tokens, however many there are: in rows of the others gptq_batch leaves what
// comes out of theirs, and nobody uses it.
//
// Numbers  the largest of the 64 is LARGEST steps. So a value is off by 2^-16 of that, where f16 is off by 2^-12 of the value.
//          What is not finite makes the step so. (gptq_gemv and decode_step make two bytes of f16 where they read them, by arithmetic of
//          pairs: strip.cuh. These are made of f32, where it comes from.)
#pragma once
#include "units.cuh"

constexpr uint32_t PLANE_TOKENS = PEREGRINE_PLANE_TOKENS;
constexpr float LARGEST = 32639.f;  // 127 * 256 + 127: the nearest multiple of 256 fits its byte
constexpr float LEAST = 1e-30f;     // of 64 values that are less, all are zero: LARGEST by the largest of them might be no f32
constexpr uint32_t PLANE_BYTES = PLANE_TOKENS * UNIT_INPUTS;  // of a unit

// A chunk's place in its unit; the low bytes' is PLANE_BYTES further on.
__device__ __forceinline__ uint32_t plane_chunk(uint32_t token, uint32_t chunk) { return token * UNIT_INPUTS + (chunk ^ token / 2 % 4) * 16; }
__device__ __forceinline__ uint8_t* plane_unit(uint16_t* x, uint32_t unit) {
    return reinterpret_cast<uint8_t*>(x) + (size_t)unit * 2 * PLANE_BYTES;
}
__device__ __forceinline__ const float* plane_steps(const uint16_t* x, uint32_t inputs) {
    return reinterpret_cast<const float*>(x + (size_t)PLANE_TOKENS * inputs);
}
__device__ __forceinline__ float* plane_steps(uint16_t* x, uint32_t inputs) {
    return const_cast<float*>(plane_steps(const_cast<const uint16_t*>(x), inputs));
}

// The larger magnitude; NaN if one is.
__device__ __forceinline__ float larger(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(fabsf(a)), "f"(fabsf(b)));
    return r;
}

// Of 64 values whose largest magnitude is `most`.
struct PlaneStep {
    float step, inverse;
    __device__ __forceinline__ explicit PlaneStep(float most) : step(most * (1.f / LARGEST)), inverse(0.f) {
        asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(most));  // to 2^-23: one division less where others wait
        inverse = most > LEAST ? LARGEST * inverse : 0.f;
    }
    __device__ __forceinline__ int32_t operator()(float v) const { return __float2int_rn(v * inverse); }
};

// The low bytes of four values, and the high ones.
__device__ __forceinline__ uint32_t low_bytes(int32_t a, int32_t b, int32_t c, int32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
__device__ __forceinline__ uint32_t high_bytes(int32_t a, int32_t b, int32_t c, int32_t d) {
    return __byte_perm(__byte_perm(a + 128, b + 128, 0x0051), __byte_perm(c + 128, d + 128, 0x0051), 0x5410);
}
