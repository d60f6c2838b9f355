// rope — rotates queries in place and the key into the cache, copies the value into the cache.   Reference: src/reference.rs::rope
// Shapes   qkv [tokens, heads + 2, 64] f16; caches [slots, max_context, 64] f16; table [max_context, 32] (cos, sin) f32.
// Formula  half split over all 64 values: out[i] = v[i] cos - v[i+32] sin, out[i+32] = v[i+32] cos + v[i] sin.
// Mapping  one thread a pair (i, i + 32): 2336 pairs a token. For prompts; attn_decode rotates on the way, by the same rope.cuh.
#include "launch.cuh"
#include "rope.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int HALF = PEREGRINE_HEAD_DIM / 2;

__global__ void __launch_bounds__(THREADS) rope_kernel(const __grid_constant__ RopeParams p) {
    overlap_next();
    wait_previous();
    const uint32_t pair = blockIdx.x * THREADS + threadIdx.x, m = blockIdx.y;
    const uint32_t head = pair / HALF, i = pair % HALF;
    if (head >= p.heads + 2) return;
    const size_t position = min(p.token[m].position, p.max_context - 1);
    const size_t cached = ((size_t)min(p.token[m].slot, p.slots - 1) * p.max_context + position) * PEREGRINE_HEAD_DIM;
    __half* row = reinterpret_cast<__half*>(p.qkv) + ((size_t)m * (p.heads + 2) + head) * PEREGRINE_HEAD_DIM;
    const __half v0 = row[i], v1 = row[i + HALF];
    if (head == p.heads + 1) {  // the value is not rotated
        __half* v = reinterpret_cast<__half*>(p.v_cache) + cached;
        v[i] = v0, v[i + HALF] = v1;
        return;
    }
    const float2 cs = reinterpret_cast<const float2*>(p.table)[position * HALF + i];
    const float2 turned = rotate(__half2float(v0), __half2float(v1), cs);
    __half* out = head < p.heads ? row : reinterpret_cast<__half*>(p.k_cache) + cached;
    out[i] = __float2half_rn(turned.x);
    out[i + HALF] = __float2half_rn(turned.y);
}

}  // namespace

extern "C" int32_t rope(const RopeParams* p, const Launch* l) {
    if (p->tokens == 0 || p->heads == 0 || p->slots == 0 || p->max_context == 0) return PEREGRINE_BAD_SHAPE;
    const uint32_t pairs = (p->heads + 2) * HALF;
    return launch(rope_kernel, dim3((pairs + THREADS - 1) / THREADS, p->tokens), THREADS, 0, l, *p);
}
