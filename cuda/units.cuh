// units — the one layout of quantised weights, and the PTX instructions every matrix kernel is made of.
//
// A unit is 16 output rows x 64 inputs. A matrix [n, k] is [n / 16 row tiles][k / 64] units, so a row tile, or any run of
// units of it, is one contiguous piece of memory.
//
//   byte 0      codes, 512 bytes: lane l of a warp owns bytes 16 l .. 16 l + 15 = four words, word s for k16 step s
//   byte 512    scales, 8 x half2 (row g, row g + 8), g = 0..7; with scales_per_row 2 another 8 for inputs 32..63
//   then        zero points as f16 in the same order, only when has_zeros
//
// 512 + 32 bytes is 17 sectors of 32 bytes: a unit never shares a sector with its neighbour.
//
// Word s of lane l, g = l / 4, q = l % 4, k counted from 16 s (lowest nibble right):
//
//     nibble    7            6         5            4         3            2         1            0
//            (g+8,2q+9)  (g,2q+9)  (g+8,2q+1)  (g,2q+1)  (g+8,2q+8)  (g,2q+8)  (g+8,2q)    (g,2q)
//
// so that masks alone give the four A registers of mma.m16n8k16, two f16 each:
//     a0 = w & 0x000f000f          row g,     k 2q, 2q+1     the f16 subnormal code x 2^-24
//     a1 = w & 0x00f000f0          row g + 8, k 2q, 2q+1     code x 2^-20
//     a2 = w >> 8 & 0x000f000f     row g,     k 2q+8, 2q+9
//     a3 = w >> 8 & 0x00f000f0     row g + 8, k 2q+8, 2q+9
// Row g has one power of two and row g + 8 another, which are the two halves of an accumulator. The same registers are
// wgmma's A operand. Whether the tensor core keeps subnormals is checked at start-up (unpack_check.cu).
//
// Weight = scale x (code - zero). The zero point is the plain one (8 when symmetric), not AutoGPTQ's stored zero minus one.
//
// An f16 unit (embedding, head) is 2048 bytes: step s, lane l at byte 512 s + 16 l: the four A registers as they are. A packed one
// is 1536, see packed.cuh.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>
#include "gelu.cuh"
#include "kernels.h"

constexpr int UNIT_ROWS = PEREGRINE_UNIT_ROWS;
constexpr int UNIT_INPUTS = PEREGRINE_UNIT_INPUTS;
constexpr int UNIT_CODE_BYTES = UNIT_ROWS * UNIT_INPUTS / 2;
constexpr int UNIT_SCALE_BYTES = UNIT_ROWS * 2;
constexpr int TABLE_UNIT_BYTES = UNIT_ROWS * UNIT_INPUTS * 2;
constexpr int STEPS = UNIT_INPUTS / 16;  // k16 steps of a unit

constexpr float CODE_LOW_SCALE = 16777216.f;  // 2^24: undoes the subnormal of rows g
constexpr float CODE_HIGH_SCALE = 1048576.f;  // 2^20: and of rows g + 8

// Bytes of a unit with SCALES scales a row, and zero points or not.
template <int SCALES, bool ZEROS>
__host__ __device__ constexpr int unit_bytes() { return UNIT_CODE_BYTES + UNIT_SCALE_BYTES * SCALES * (ZEROS ? 2 : 1); }

// The four A registers of step word w, codes as f16 subnormals.
__device__ __forceinline__ void unpack_subnormal(uint32_t w, uint32_t a[4]) {
    a[0] = w & 0x000f000fu;
    a[1] = w & 0x00f000f0u;
    a[2] = (w >> 8) & 0x000f000fu;
    a[3] = (w >> 8) & 0x00f000f0u;
}

__device__ __forceinline__ uint32_t as_u32(__half2 h) { return *reinterpret_cast<uint32_t*>(&h); }
__device__ __forceinline__ __half2 as_half2(uint32_t u) { return *reinterpret_cast<__half2*>(&u); }

// (w & MASK) | 0x64006400 in one instruction, which takes one constant only: left alone the compiler makes two.
template <uint32_t MASK>
__device__ __forceinline__ uint32_t mask_or(uint32_t w) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(w), "n"(MASK), "r"(0x64006400u));
    return r;
}

// What unpack_exact adds, for zero points (row g, row g + 8).
struct ExactBias {
    __half2 low, high;
    __device__ __forceinline__ ExactBias() : low(as_half2(0xe408e408u)), high(as_half2(0xd480d480u)) {}  // of zero points 8
    __device__ __forceinline__ explicit ExactBias(__half2 zero)
        : low(__hsub2(__float2half2_rn(-1024.f), __low2half2(zero))), high(__hsub2(__float2half2_rn(-64.f), __high2half2(zero))) {}
};

// The A registers of step word w as the integers code - zero, exactly. 0x6400 | code is 1024 + code in f16, and with the code
// one nibble higher 1024 + 16 code; one add or multiply-add removes the rest.
__device__ __forceinline__ void unpack_exact(uint32_t w, const ExactBias& bias, uint32_t a[4]) {
    const __half2 sixteenth = __float2half2_rn(1.f / 16.f);
    const uint32_t v = w >> 8;
    a[0] = as_u32(__hadd2(as_half2(mask_or<0x000f000f>(w)), bias.low));
    a[1] = as_u32(__hfma2(as_half2(mask_or<0x00f000f0>(w)), sixteenth, bias.high));
    a[2] = as_u32(__hadd2(as_half2(mask_or<0x000f000f>(v)), bias.low));
    a[3] = as_u32(__hfma2(as_half2(mask_or<0x00f000f0>(v)), sixteenth, bias.high));
}

// The A registers of step word w as f16(scale * (code - zero)), AutoGPTQ's own definition of a weight.
__device__ __forceinline__ void unpack_weights(uint32_t w, __half2 scale, const ExactBias& bias, uint32_t a[4]) {
    unpack_exact(w, bias, a);
    const __half2 low = __low2half2(scale), high = __high2half2(scale);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = as_u32(__hmul2(as_half2(a[i]), i % 2 ? high : low));
}

// The A registers of step word w as f16(scale * (code - zero)), times 2^-24 (rows g) and 2^-20 (rows g + 8): codes are taken as the f16
// subnormals that they are. `scale` should be near the top of f16, see row_factors.cu. One multiply-add two weights, unless zero points
// are stored: zero x scale is not always an f16. `offset`: see subnormal_offset.
template <bool ZEROS>
__device__ __forceinline__ void unpack_scaled(uint32_t w, __half2 scale, __half2 offset, uint32_t a[4]) {
    const __half2 low = __low2half2(scale), high = __high2half2(scale);
    unpack_subnormal(w, a);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const __half2 by = i % 2 ? high : low, code = as_half2(a[i]), less = i % 2 ? __high2half2(offset) : __low2half2(offset);
        a[i] = as_u32(ZEROS ? __hmul2(__hadd2(code, less), by) : __hfma2(code, by, less));
    }
}
// What it adds: with zero points these, as subnormals; otherwise 8 scales.
template <bool ZEROS>
__device__ __forceinline__ __half2 subnormal_offset(__half2 scale, __half2 zero) {
    return __hmul2(ZEROS ? zero : scale, as_half2(ZEROS ? 0x80108001u : 0x80808008u));  // -(2^-24, 2^-20), 8 times that
}

// What sums of unpack_scaled's weights are multiplied by, rows g and g + 8; `factor` is what their scales were multiplied by twice: powers
// of two, from 1/2 to 2^15 (row_factors.cu), whose inverse is a matter of the exponent. Of 0, in the place of a row that is not there, it is
// none, and nobody uses such sums.
__device__ __forceinline__ float2 undo_factor(__half2 factor) {
    const float2 f = __half22float2(factor);
    const auto inverse = [](float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); };
    return make_float2(CODE_LOW_SCALE * inverse(f.x * f.x), CODE_HIGH_SCALE * inverse(f.y * f.y));
}

__device__ __forceinline__ uint32_t smem_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// c[16 x 8] += a[16 x 16] * b[16 x 8]; lane l holds c rows l/4 (c0, c1) and l/4 + 8 (c2, c3), columns 2 (l%4), + 1.
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    // Not volatile: a pure function of its operands, which the compiler may interleave with others.
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 f16 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t r[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// 16 bytes global -> shared; zeros are written instead when !valid (the address is then not read).
__device__ __forceinline__ void cp_async(uint32_t smem, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Weights are read once a step: keep them from displacing activations in L1 and, as far as the hint goes, in L2.
__device__ __forceinline__ uint4 load_weights(const uint8_t* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Where a row's sum goes; see GptqOutput.
__device__ __forceinline__ void store_output(const GptqOutput& y, uint32_t n, uint32_t tokens, uint32_t slice, uint32_t m,
                                             uint32_t row, float sum) {
    if (y.partials) {
        y.partials[((size_t)slice * tokens + m) * n + row] = sum;
        return;
    }
    if (y.bias) sum += y.bias[row];
    if (y.residual) {
        y.residual[(size_t)m * n + row] += sum;
    } else if (row < y.split_row) {
        y.out[(size_t)m * y.out_stride + row] = __half_as_ushort(__float2half_rn(sum));
    } else {
        y.gelu_out[(size_t)m * y.gelu_stride + row - y.split_row] = __half_as_ushort(__float2half_rn(gelu(sum)));
    }
}
