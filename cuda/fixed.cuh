// fixed — activations as fixed point in two digits, a signed byte each, for products of bytes. Used by gptq_gemv and decode_step.
//
// x = step * v, one step for a token's inputs of a warp, and v = BASE * high + low. What a kernel takes for BASE and step is its own.
#pragma once
#include "units.cuh"

// c[16 x 8] += a[16 x 32] * b[32 x 8], bytes; a is unsigned.
__device__ __forceinline__ void mma_bytes(uint32_t c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
constexpr uint32_t COLUMN_TOKENS = 4;  // whose two digits are a tile of 8 columns

// The largest of the words' low halves and of their high ones, so far. It is no number if one of them is none.
__device__ __forceinline__ uint32_t most(uint32_t top, uint32_t pair) {
    return as_u32(__hmax2_nan(as_half2(top), __habs2(as_half2(pair))));
}
__device__ __forceinline__ uint32_t most(uint32_t top, const uint4& v) { return most(most(most(most(top, v.x), v.y), v.z), v.w); }
__device__ __forceinline__ bool are_numbers(uint32_t top) { return __hbeq2(as_half2(top), as_half2(top)); }
// Of the larger half, as f32; bits are in the order of values that are not negative, NaN last.
__device__ __forceinline__ uint32_t bits_of(uint32_t top) {
    return __float_as_uint(__half2float(__hmax_nan(__low2half(as_half2(top)), __high2half(as_half2(top)))));
}

constexpr uint32_t PICK_HIGH = 0x5140, PICK_LOW = 0x7362;  // of two `bytes_of`, in the order of the codes

// The digits of two inputs as lower bytes; `inverse`: the high digit's steps in 1. 1536 and an integer of 8 bits is an f16 with the integer
// in its lower byte; what it leaves is exact, or, where `inverse` is no power of two, but for 2^-13 of a high digit's step.
template <int BASE>
__device__ __forceinline__ void split_pair(uint32_t pair, __half2 inverse, uint32_t& high, uint32_t& low) {
    const __half2 x = as_half2(pair), zero = __float2half2_rn(1536.f), h = __hfma2(x, inverse, zero);
    const __half2 left = __hfma2(x, inverse, __hsub2(zero, h));
    high = as_u32(h), low = as_u32(__hfma2(left, __float2half2_rn(BASE), zero));
}
// Bytes of two inputs: high, high, low, low.
template <int BASE>
__device__ __forceinline__ uint32_t bytes_of(uint32_t pair, __half2 inverse) {
    uint32_t high, low;
    split_pair<BASE>(pair, inverse, high, low);
    return __byte_perm(high, low, 0x6420);
}
// Inputs 2q, 2q + 1 and 2q + 8, 2q + 9, as bytes in the order of the codes.
template <int BASE>
__device__ __forceinline__ void both(uint32_t even, uint32_t odd, __half2 inverse, uint32_t& high, uint32_t& low) {
    uint32_t high_even, low_even, high_odd, low_odd;
    split_pair<BASE>(even, inverse, high_even, low_even), split_pair<BASE>(odd, inverse, high_odd, low_odd);
    high = __byte_perm(high_even, high_odd, 0x6240), low = __byte_perm(low_even, low_odd, 0x6240);
}
// Of the words of both planes this lane keeps its column's, and gives the other to lane ^ 4, which has the unit's other half.
__device__ __forceinline__ void keep_plane(uint32_t (&b)[STEPS], int s, uint32_t own, uint32_t given, bool low) {
    const uint32_t got = __shfl_xor_sync(~0u, given, 4);
    b[s] = low ? got : own, b[2 + s] = low ? own : got;
}
