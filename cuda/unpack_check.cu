// unpack_check — do this GPU's tensor cores keep f16 subnormals, and sums that f32 can hold?
// units.cuh feeds codes to the tensor core as f16 subnormals (code x 2^-24, code x 2^-20). PTX promises nothing about subnormal
// operands, so this is checked when a model is loaded: 16 codes x both nibble positions x every finite f16 activation, 2.0 M products,
// against the same product in f32 (exact: at most 15 significant bits).
// Nor does it promise that sums are exact where f32 can hold them, as decode_step's are, 15 * 64 * 16256 < 2^24 (decode_halves.cuh): that
// steps of few and of many tokens give the same bits follows from it. Checked for 8192 x 128 sums of 64 products, at their largest and
// less. On an H200 all are exact. What is counted is what is exact, so that a kernel that checks nothing passes for a GPU that cannot.
// Mapping  one warp a block of 8 activations (the columns); rows g hold code g, then code g + 8. Then a unit of codes and 8 columns of
//          activations of its own.
#include "launch.cuh"
#include "probes.h"
#include "units.cuh"

namespace {

constexpr int WARPS = 8;

__device__ __forceinline__ uint32_t exact_products(uint32_t first, uint32_t lane) {
    const uint32_t g = lane / 4, q = lane % 4;
    // Column n's activation stands at k = 0 alone, which lane 4 n holds in the low half of b0.
    const uint32_t b0 = q == 0 ? first + g : 0;
    uint32_t exact = 0;
    for (uint32_t half = 0; half < 2; half++) {
        const uint32_t code = g + half * 8;
        uint32_t a[4];
        unpack_subnormal(q == 0 ? code | code << 4 : 0, a);
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        mma(c, a, b0, 0);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint16_t bits = (uint16_t)(first + 2 * q + i % 2);
            if ((bits & 0x7c00) == 0x7c00) continue;  // infinity, NaN
            const float expected = __half2float(__ushort_as_half(bits)) * (float)code;
            exact += c[i] * (i < 2 ? CODE_LOW_SCALE : CODE_HIGH_SCALE) == expected;
        }
    }
    return exact;
}

// Code (k, row) and activation (k, column) of a warp's unit. Of the first warp all are the largest; others are hashes, which have fewer or
// more small activations. An activation has 11 significant bits, as an f16.
__device__ __forceinline__ uint32_t mixed(uint32_t unit, uint32_t k, uint32_t line) {
    uint32_t h = (unit * 64 + k) * 32 + line;
    h = (h ^ h >> 16) * 0x7feb352du, h = (h ^ h >> 15) * 0x846ca68bu;
    return h ^ h >> 16;
}
__device__ __forceinline__ uint32_t code_at(uint32_t unit, uint32_t k, uint32_t row) {
    return unit == 0 ? 15 : mixed(unit, k, row) % 16;
}
__device__ __forceinline__ int activation_at(uint32_t unit, uint32_t k, uint32_t column) {
    if (unit == 0) return 16256;
    const uint32_t h = mixed(unit, k, 16 + column), shift = h >> 11 & unit % 8;
    const int v = min(h % 2048, 2032u) * 8 >> shift;
    return h >> 31 ? -v : v;
}
__device__ __forceinline__ uint32_t half_of(int v) { return __half_as_ushort(__float2half_rn((float)v * (1.f / CODE_LOW_SCALE))); }

__device__ uint32_t exact_sums(uint32_t unit, uint32_t lane) {
    const uint32_t g = lane / 4, q = lane % 4;
    float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (uint32_t s = 0; s < STEPS; s++) {
        uint32_t word = 0, a[4], b[2] = {0, 0};
        for (uint32_t i = 0; i < 4; i++) {  // inputs 2q, 2q + 8, 2q + 1, 2q + 9, as units.cuh has them
            const uint32_t k = 16 * s + 2 * q + i % 2 * 8 + i / 2;
            word |= (code_at(unit, k, g) | code_at(unit, k, g + 8) << 4) << 8 * i;
            b[i % 2] |= half_of(activation_at(unit, k, g)) << i / 2 * 16;
        }
        unpack_subnormal(word, a);
        mma(c, a, b[0], b[1]);
    }
    uint32_t exact = 0;
    for (uint32_t i = 0; i < 4; i++) {
        int expected = 0;
#pragma unroll 1
        for (uint32_t k = 0; k < UNIT_INPUTS; k++)
            expected += (int)code_at(unit, k, g + i / 2 * 8) * activation_at(unit, k, 2 * q + i % 2);
        exact += c[i] * CODE_LOW_SCALE * (i < 2 ? CODE_LOW_SCALE : CODE_HIGH_SCALE) == (float)expected;
    }
    return exact;
}

__global__ void __launch_bounds__(WARPS * 32) unpack_check_kernel(const __grid_constant__ UnpackCheckParams p) {
    wait_previous();
    const uint32_t lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32;
    const uint32_t products = __reduce_add_sync(~0u, exact_products(warp * 8, lane)), sums = __reduce_add_sync(~0u, exact_sums(warp, lane));
    if (lane == 0) atomicAdd(p.exact, products), atomicAdd(p.exact + 1, sums);
}

}  // namespace

extern "C" int32_t unpack_check(const UnpackCheckParams* p, const Launch* l) {
    return launch(unpack_check_kernel, dim3(65536 / 8 / WARPS), WARPS * 32, 0, l, *p);
}

extern "C" const char* launch_error_name(int32_t code) { return cudaGetErrorString((cudaError_t)code); }
