// rope — rotates queries in place and the key into the cache, copies the value into the cache.   Reference: src/reference.rs::rope
// Shapes   qkv [tokens, heads + 2, 64] f16; caches [max_context, 64] f16; table [max_context, 32] (cos, sin) f32.
// Formula  half split over all 64 values: out[i] = v[i] cos - v[i+32] sin, out[i+32] = v[i+32] cos + v[i] sin.
// Mapping  one thread a pair (i, i + 32): 2336 pairs a token.
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int HALF = PEREGRINE_HEAD_DIM / 2;

__global__ void __launch_bounds__(THREADS) rope_kernel(const __grid_constant__ RopeParams p) {
    overlap_next();
    wait_previous();
    const uint32_t pair = blockIdx.x * THREADS + threadIdx.x, m = blockIdx.y;
    const uint32_t head = pair / HALF, i = pair % HALF;
    if (head >= p.heads + 2) return;
    const size_t position = min(p.token->position + m, p.max_context - 1);
    __half* row = reinterpret_cast<__half*>(p.qkv) + ((size_t)m * (p.heads + 2) + head) * PEREGRINE_HEAD_DIM;
    const __half v0 = row[i], v1 = row[i + HALF];
    if (head == p.heads + 1) {  // the value is not rotated
        __half* v = reinterpret_cast<__half*>(p.v_cache) + position * PEREGRINE_HEAD_DIM;
        v[i] = v0, v[i + HALF] = v1;
        return;
    }
    const float2 cs = reinterpret_cast<const float2*>(p.table)[position * HALF + i];
    const float a = __half2float(v0), b = __half2float(v1);
    __half* out = head < p.heads ? row : reinterpret_cast<__half*>(p.k_cache) + position * PEREGRINE_HEAD_DIM;
    out[i] = __float2half_rn(a * cs.x - b * cs.y);
    out[i + HALF] = __float2half_rn(b * cs.x + a * cs.y);
}

}  // namespace

extern "C" int32_t rope(const RopeParams* p, const Launch* l) {
    if (p->tokens == 0 || p->heads == 0 || p->max_context == 0) return PEREGRINE_BAD_SHAPE;
    const uint32_t pairs = (p->heads + 2) * HALF;
    return launch(rope_kernel, dim3((pairs + THREADS - 1) / THREADS, p->tokens), THREADS, 0, l, *p);
}
