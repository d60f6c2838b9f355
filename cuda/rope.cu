// rope — rotates queries in place and the key into the cache, copies the value into the cache.   Reference: src/reference.rs::rope
// Shapes   qkv [tokens, heads + 2, 64] f16; caches [slots, max_context, 64] f16; table [max_context, 32] (cos, sin) f32.
// Formula  half split over all 64 values: out[i] = v[i] cos - v[i+32] sin, out[i+32] = v[i+32] cos + v[i] sin.
// Mapping  one thread 8 values of either half, 16 bytes each: 292 threads a token. For prompts; attn_decode rotates on the way, by the
//          same rope.cuh.
// Measured 2.0, 2.3, 3.7, 8.4 us at 65, 128, 512, 2048 tokens, in graphs, H200; one thread a pair: 1.9, 2.6, 7.0, 25.6.
#include "launch.cuh"
#include "rope.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int HALF = PEREGRINE_HEAD_DIM / 2;
constexpr int VALUES = 8;
constexpr int HEAD_THREADS = HALF / VALUES;

__global__ void __launch_bounds__(THREADS) rope_kernel(const __grid_constant__ RopeParams p) {
    overlap_next();
    wait_previous();
    const uint32_t thread = blockIdx.x * THREADS + threadIdx.x, token_threads = (p.heads + 2) * HEAD_THREADS;
    const uint32_t m = thread / token_threads, head = thread % token_threads / HEAD_THREADS, i = thread % HEAD_THREADS * VALUES;
    if (m >= p.tokens) return;
    const size_t position = min(p.token[m].position, p.max_context - 1);
    const size_t cached = ((size_t)min(p.token[m].slot, p.slots - 1) * p.max_context + position) * PEREGRINE_HEAD_DIM + i;
    uint16_t* row = p.qkv + ((size_t)m * (p.heads + 2) + head) * PEREGRINE_HEAD_DIM + i;
    uint4 low = *reinterpret_cast<const uint4*>(row), high = *reinterpret_cast<const uint4*>(row + HALF);
    uint16_t* out = head < p.heads ? row : (head == p.heads ? p.k_cache : p.v_cache) + cached;
    if (head <= p.heads) {  // the value is not rotated
        const float4* table = reinterpret_cast<const float4*>(reinterpret_cast<const float2*>(p.table) + position * HALF + i);
        __half *a = reinterpret_cast<__half*>(&low), *b = reinterpret_cast<__half*>(&high);
#pragma unroll
        for (int j = 0; j < VALUES; j += 2) {
            const float4 cs = table[j / 2];
            const float2 first = rotate(__half2float(a[j]), __half2float(b[j]), make_float2(cs.x, cs.y));
            const float2 second = rotate(__half2float(a[j + 1]), __half2float(b[j + 1]), make_float2(cs.z, cs.w));
            a[j] = __float2half_rn(first.x), a[j + 1] = __float2half_rn(second.x);
            b[j] = __float2half_rn(first.y), b[j + 1] = __float2half_rn(second.y);
        }
    }
    *reinterpret_cast<uint4*>(out) = low;
    *reinterpret_cast<uint4*>(out + HALF) = high;
}

}  // namespace

extern "C" int32_t rope(const RopeParams* p, const Launch* l) {
    if (p->tokens == 0 || p->heads == 0 || p->slots == 0 || p->max_context == 0) return PEREGRINE_BAD_SHAPE;
    const uint32_t threads = p->tokens * (p->heads + 2) * HEAD_THREADS;
    return launch(rope_kernel, dim3((threads + THREADS - 1) / THREADS), THREADS, 0, l, *p);
}
