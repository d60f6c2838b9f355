// attn_decode — rotary positions, KV append and multi-query attention of a decode step's tokens, split over the context.
// Reference: src/reference.rs::rope, attention
// Shapes   qkv [tokens, heads + 2, 64] f16, caches [slots, max_context, 64] f16, out [tokens, out_stride] f16; up to 64 tokens.
// Mapping  one warp a block, 6 an SM at most, takes items of attn_decode.cuh (16 heads of a token against 128 keys) as long as there are
//          some: a graph must not depend on the position, and a product's blocks are to find room beside them.
// Floor    K and V of a slot once: 0.5 MB at 2048 keys, from L2, well under 1 us; what it takes is latency: launch, token, keys and
//          queries, four rounds of scores, softmax and values, and the merge, which reads 4.6 KB a chunk with one warp.
// Measured one token: 3.2 us at position 0, 5.3 at 127, 5.5 at 128, 6.8 at 1024, 8.8 at 2047. 8 tokens, of one slot or of eight: 6.0 at
//          128, 10.0 at 1024, 14.9 at 2047. 64 slots at 1024: 22.9. H200, launches back to back, overlapping; before more than
//          8 chunks (1024 keys) were merged in runs, and with a block an item of max_context. 16, 32, 64 slots at 190: 6.5, 7.0, 8.0 us,
//          where that grid took 6.7, 7.7, 10.9.
// Tried    4 warps a block: 0.5 us more for one token, 4 % less for 64. A merge with one chunk under way and two fences around a relaxed
//          atomic, instead of two chunks and one acq_rel atomic: 10.4 us at 2047. No fence in attend_cached: the same within 0.1 us.
#include "launch.cuh"
#include "attn_decode.cuh"

namespace {

constexpr uint32_t WORKERS = 6;  // a multiprocessor

struct Plain {
    template <int N>
    __device__ __forceinline__ void operator()(uint4 (&w)[N], const uint16_t* const (&at)[N]) const {
#pragma unroll
        for (int i = 0; i < N; i++) w[i] = *reinterpret_cast<const uint4*>(at[i]);
    }
};

struct ToRows {
    uint16_t* out;
    uint32_t stride;
    __device__ __forceinline__ void operator()(uint32_t token, uint32_t head, uint32_t q, const uint32_t w[8]) const {
        uint4* to = reinterpret_cast<uint4*>(out + (size_t)token * stride + head * HEAD_DIM + q * 16);
        to[0] = make_uint4(w[0], w[1], w[2], w[3]), to[1] = make_uint4(w[4], w[5], w[6], w[7]);
    }
};

// Lane l knows the call's tokens l and l + 32. Past L1, which may hold what was there before the predecessor ended.
struct Tokens {
    uint4 low, high;
    __device__ __forceinline__ explicit Tokens(const AttnDecodeParams& p) {
        const uint4* token = reinterpret_cast<const uint4*>(p.token);
        const uint32_t lane = threadIdx.x;
        low = __ldcg(token + min(lane, p.tokens - 1)), high = __ldcg(token + min(lane + 32, p.tokens - 1));
    }
    __device__ __forceinline__ uint32_t chunks(const AttnDecodeParams& p) const {
        return __reduce_max_sync(~0u, attn_chunks(min(max(low.y, high.y), p.max_context - 1)));
    }
    __device__ __forceinline__ AttnToken operator()(const AttnDecodeParams& p, uint32_t m) const {
        const auto word = [m](uint32_t low, uint32_t high) { return __shfl_sync(~0u, m < 32 ? low : high, m % 32); };
        return attn_token(p, m, {0, word(low.y, high.y), word(low.z, high.z), word(low.w, high.w)});
    }
};

// Worker i of n takes items i, i + n, ...: chunk by chunk, so that the first ones are spread over all workers.
__device__ __forceinline__ AttnItem attn_item(const AttnDecodeParams& p, uint32_t i) {
    const uint32_t tiles = attn_head_tiles(p.heads);
    return {i / tiles % p.tokens, i % tiles, i / (tiles * p.tokens)};
}

// Asks L2 for the keys and values of the worker's first item. What is read of tokens before the predecessor has ended may be wrong, and
// then is of no use, but nothing else.
__device__ __forceinline__ void prefetch_item(const AttnDecodeParams& p) {
    const AttnItem item = attn_item(p, blockIdx.x);
    const AttnToken token = Tokens(p)(p, item.token);
    const size_t first = (size_t)token.slot * p.max_context;
    for (uint32_t key = item.chunk * PEREGRINE_ATTN_CHUNK + threadIdx.x; key < min((item.chunk + 1) * PEREGRINE_ATTN_CHUNK, token.position);
         key += 32) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.k_cache + (first + key) * HEAD_DIM));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.v_cache + (first + key) * HEAD_DIM));
    }
}

__global__ void __launch_bounds__(32, 12) attn_decode_kernel(const __grid_constant__ AttnDecodeParams p) {
    overlap_next();
    prefetch_item(p);
    wait_previous();
    for (uint32_t i = blockIdx.x;; i += gridDim.x) {
        const Tokens tokens(p);
        const AttnItem item = attn_item(p, i);
        if (item.chunk >= tokens.chunks(p)) return;
        const AttnToken token = tokens(p, item.token);
        if (item.chunk < attn_chunks(token.position)) attn_decode_item<true>(p, item, token, Plain(), ToRows{p.out, p.out_stride});
    }
}

}  // namespace

extern "C" int32_t attn_decode(const AttnDecodeParams* p, const Launch* l) {
    if (p->tokens == 0 || p->tokens > PEREGRINE_STEP_TOKENS || p->heads == 0 || p->slots == 0 || p->max_context == 0 ||
        p->out_stride % 8 || attn_chunks(p->max_context - 1) > ATTN_RUNS * 31)
        return PEREGRINE_BAD_SHAPE;
    const uint32_t items = attn_chunks(p->max_context - 1) * attn_head_tiles(p->heads) * p->tokens;
    return launch(attn_decode_kernel, dim3(min(items, WORKERS * multiprocessors())), 32, 0, l, *p);
}
