// unpack_check — do this GPU's tensor cores keep f16 subnormals?
// units.cuh feeds codes to the tensor core as f16 subnormals (code x 2^-24, code x 2^-20). PTX promises nothing about subnormal
// operands, so this is checked when a model is loaded: 16 codes x both nibble positions x every finite f16 activation, 2.0 M products,
// against the same product in f32 (exact: at most 15 significant bits).
// What is counted is what is exact, so that a kernel that checks nothing passes for a GPU that cannot.
// Mapping  one warp a block of 8 activations (the columns); rows g hold code g, then code g + 8.
#include "launch.cuh"
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

__global__ void __launch_bounds__(WARPS * 32) unpack_check_kernel(const __grid_constant__ UnpackCheckParams p) {
    wait_previous();
    const uint32_t lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32;
    const uint32_t exact = __reduce_add_sync(~0u, exact_products(warp * 8, lane));
    if (lane == 0) atomicAdd(p.exact, exact);
}

}  // namespace

extern "C" int32_t unpack_check(const UnpackCheckParams* p, const Launch* l) {
    return launch(unpack_check_kernel, dim3(65536 / 8 / WARPS), WARPS * 32, 0, l, *p);
}

extern "C" const char* launch_error_name(int32_t code) { return cudaGetErrorString((cudaError_t)code); }
