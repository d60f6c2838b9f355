// attn_decode — rotary positions, KV append and multi-query attention of a decode step's tokens, split over the context.
// Reference: src/reference.rs::rope, attention
// Shapes   qkv [tokens, heads + 2, 64] f16, caches [slots, max_context, 64] f16, out [tokens, out_stride] f16; up to 64 tokens.
// Mapping  block (part of the context, head tile, token) = four warps, each 16 heads of a token against up to 128 keys (attn_decode.cuh),
//          fewer where the context is short. With more blocks at work than there is room beside [qkv ; up], 27 to 32 tokens here, a block of
//          a short context has two head tiles, of two warps each. The warps' states are joined in shared memory, those of more than 512
//          keys through global memory too. The grid covers max_context (a graph must not depend on the position); blocks beyond the
//          context leave at once.
//          A block fits beside one of gptq_gemv or its like: it waits there for the queries, and asks L2 for the cached keys and values.
// Reads    tokens and cached keys before wait_previous(): what wrote them is complete when a kernel begins behind embed (launch.cuh).
// Awaited  it begins before the product in front has ended, when the rows of `qkv` are there, and the product behind it before it has,
//          since it says how far it is: ready.cuh.
// Floor    K and V of a slot once: 0.5 MB at 2048 keys, from L2, well under 1 us; what it takes is latency: launch, token, keys and
//          queries, up to four rounds of scores, softmax and values, and the merge.
// Measured in a step of one kernel an op at position 128, while weights of the next product come in: 4.2 to 5.9 us where a warp an item
//          took 7.6, 2.6 of them joining two chunks through global memory; the step 1.214 instead of 1.311 ms (1 token), 1.372 instead of
//          1.364 at position 1000, where eight chunks were and two blocks are joined. Alone, in a row, one token: 4.5 us at 128, 7.1 at
//          1024, 8.6 at 2047; 8 tokens: 10.0 at 1024. 5.8, 7.5, 9.1 and 11.0 before; H200.
//          16, 32, 64 texts in a row: 4.9, 5.3, 5.8 us at 128, 11.2, 11.9, 22.4 at 1024, where tokens read after the wait and no prefetch
//          took 5.1, 5.7, 6.8 and 11.5, 12.3, 22.3.
//          A layer of 32 texts in a harness, behind which [down | dense] does not wait: at 128 41.8 us with two head tiles a block, 44.5 with
//          one, since the last 28 blocks then begin, and with them the product, when the first have ended; at 200 42.5 and 45.5.
//          Ahead of the rest of [qkv ; up], steps by turns: 16 texts at 300, 1024 1.272, 1.505 ms where 1.283, 1.573; 32 at 1024, 1900 1.712,
//          2.026 where 1.751, 2.079 (fastest tenths). At 128 it cost 0.2 to 0.9 %, until [down | dense] had its first weights in L2: 1.208
//          for 1.214, 32 texts the same. Of a layer of 16 at 128, by stamps: queries 13.3 us after [qkv ; up] has its inputs, all done at
//          18.8 to 20.4, where 16.1, and 25.0 to 26.4.
//          Beside [qkv ; up] there is room for one block by registers, if a thread of that has more than 80: with 80 there were two on some
//          multiprocessors, where [down | dense] could not begin until both had ended: steps of 16 texts 1.335 for 1.271.
// Tried    before these blocks, alone: one token 3.2 us at position 0, 5.5 at 128, 8.8 at 2047. 4 warps a block that join through global
//          memory: 0.5 us more for one token, 4 % less for 64. A merge with one chunk under way and two fences around a relaxed
//          atomic, instead of two chunks and one acq_rel atomic: 10.4 us at 2047. No fence in attend_cached: the same within 0.1 us.
//          Steps of 16, 32, 64 texts at 128: six one-warp blocks a multiprocessor 1.76, 1.94, 2.40 ms where this grid took 1.72, 1.88,
//          2.19. One block a multiprocessor that takes item after item: 64 texts alone 10.5 us at 128, 52 at 1024. Keys and values of a
//          warp's first 32 keys in registers before the wait, a round ahead after it, 168 registers: 1.75 ms where 1.70 (16 texts), alone
//          18.4 us where 14.0 (32 texts at 1024). No prefetch: 1.60 ms where 1.55.
//          33, 40, 48, 64 texts at 128, each head tile by one warp, so that there are 80 blocks for 64, and [down | dense] does not wait
//          for attention, with 96 registers in gptq_batch: steps of 1.60, 1.64, 1.83, 1.97 ms by turns where 1.71, 1.77, 1.94, 2.22, in
//          another run 2.27 where 2.20 with 64 (power makes them differ); but at 1024 4.35 for 2.72 with 64 (and 104 registers), with 32
//          1.98 for 1.85, and the graph knows no position. Blocks for both in one grid, of which those not wanted leave: 48 texts 1.86 for
//          1.88, 64 2.09 for 2.18, at 280 and 900 2.25 for 2.26, 2.56 for 2.68, if those that stay come last; 1.93 for 1.92, 2.25 for 2.24
//          if in order; 64 2.36 for 2.20, 40 1.80 for 1.75 with a warp a tile behind blocks for long contexts.
//          [down | dense] that waits for [qkv ; up] itself and not for a word from here, ms for ms, 16 texts: by edges of the graph
//          (src/gpu/overtake.rs) 1.194 for 1.205, and without a fence in blocks that have no work 1.188. Attention in a stream of its own,
//          begun by a programmatic event, 1.196, if the norm is launched when attention's blocks have counted that they have begun, 1.209,
//          if when it has ended; if at once, all hangs: the next layer's [qkv ; up], it seems, waits for room in front of attention's blocks.
//          By an event of their launch in a stream 1.343: capturing makes it an edge that wait_previous() waits for. By a plain event 1.304;
//          overlapping the attention of the layer before 1.297. Without attention, and with that wait, 1.176, 1.348 (16, 32; wrong).
// Spills   12 bytes with two head tiles; 12 and 20 on sm_80.
#include "launch.cuh"
#include "attn_decode.cuh"
#include "ready.cuh"

namespace {

struct Plain {
    __device__ __forceinline__ void await(const uint16_t*) const {}
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

constexpr uint32_t WARPS = 4;
constexpr uint32_t MOST_ROUNDS = PEREGRINE_ATTN_CHUNK / ATTN_ROUND;  // of a warp

// Blocks that share the context of a token.
__host__ __device__ __forceinline__ uint32_t blocks_of(uint32_t position) {
    return (position / ATTN_ROUND + WARPS * MOST_ROUNDS) / (WARPS * MOST_ROUNDS);
}

__device__ __forceinline__ AttnToken token_of(const AttnDecodeParams& p, uint32_t m) {
    const uint4 t = __ldcg(reinterpret_cast<const uint4*>(p.token) + m);
    return attn_token(p, m, {t.x, t.y, t.z, t.w});
}
// Asks L2 for the cached ones of keys key0 .. end - 1, and their values.
__device__ __forceinline__ void prefetch_keys(const AttnDecodeParams& p, const AttnToken& t, uint32_t key0, uint32_t end) {
    for (uint32_t key = key0 + threadIdx.x % 32; key < min(end, t.first_new); key += 32) {
        const size_t at = ((size_t)t.slot * p.max_context + key) * HEAD_DIM;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.k_cache + at));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p.v_cache + at));
    }
}

// The words by which products know of attention, behind those of join_chunks.
__device__ __forceinline__ uint32_t* ready_words(const AttnDecodeParams& p) {
    return p.awaited ? p.arrivals + p.tokens * attn_head_tiles(p.heads) : nullptr;
}
// By the whole block, in front of the first read of `qkv`.
__device__ __forceinline__ void wait_qkv(const AttnDecodeParams& p, const uint32_t* ready) {
    if (!ready) return wait_previous();
    if (threadIdx.x == 0) ready_wait_qkv(ready, (p.heads + 2) * (HEAD_DIM / UNIT_ROWS));
    __syncthreads();
}
// By a warp that has stored its heads, or had none to store: one of `parts` parts is done. `first`: the first thread of those.
__device__ __forceinline__ void leave(uint32_t* ready, uint32_t parts, bool first) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ready_end(ready, 1);
    if (!ready) return;
    wait_previous();
    if (first) ready_before(ready, parts);
}

__global__ void __launch_bounds__(WARPS * 32, 512 / (WARPS * 32)) attn_decode_kernel(const __grid_constant__ AttnDecodeParams p) {
    overlap_next();
    __shared__ float4 states[WARPS / 2][ATTN_STATE_QUADS * 32];
    const uint32_t warp = threadIdx.x / 32;
    uint32_t* ready = ready_words(p);
    const AttnItem item = {blockIdx.z, blockIdx.y, blockIdx.x};
    const AttnToken t = token_of(p, item.token);
    const uint32_t blocks = min(blocks_of(t.position), gridDim.x);
    if (item.chunk >= blocks) {
        if (ready) __syncthreads();  // all have read their token
        if (threadIdx.x == 0) ready_idle(ready, 1);
        return;  // the grid is not over before those that wait
    }
    const uint32_t rounds = t.position / ATTN_ROUND + 1, own = (rounds + WARPS * blocks - 1) / (WARPS * blocks);
    const uint32_t first = (item.chunk * WARPS + warp) * own;
    if (item.head_tile == 0) prefetch_keys(p, t, first * ATTN_ROUND, (first + own) * ATTN_ROUND);
    wait_qkv(p, ready);
    AttnState state;
    if (first < rounds) attend_keys(state, p, item, t, first * ATTN_ROUND, min((first + own) * ATTN_ROUND, t.position + 1), Plain());
    // Warps 2 and 3 join 0 and 1, then 1 joins 0. Warps that have no keys are the last ones.
    static_assert(WARPS == 4, "no two joins use the same memory");
    const auto place = [&](uint32_t warp) { return states[warp % 2] + threadIdx.x % 32; };
#pragma unroll
    for (uint32_t distance = WARPS / 2; distance; distance /= 2) {
        if (warp >= distance && warp < 2 * distance) store_state(place(warp), state);
        __syncthreads();
        if (warp < distance && first + distance * own < rounds) {
            AttnQuads other;
            const float4* from = place(warp + distance);
#pragma unroll
            for (int i = 0; i < ATTN_STATE_QUADS; i++) other.quad[i] = from[i * 32];
            merge(state, other);
        }
    }
    if (warp > 0) return;
    if (blocks == 1 || join_chunks(state, p, item, blocks)) store_heads(state, p, item, ToRows{p.out, p.out_stride});
    // The first block always has work.
    leave(ready, gridDim.x * gridDim.y * gridDim.z, blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0);
}

// Short contexts of many tokens: a warp has all keys of a head tile.
__global__ void __launch_bounds__(WARPS * 32, 512 / (WARPS * 32)) attn_decode_solo_kernel(const __grid_constant__ AttnDecodeParams p) {
    overlap_next();
    const uint32_t number = blockIdx.x * WARPS + threadIdx.x / 32, tiles = attn_head_tiles(p.heads);
    uint32_t* ready = ready_words(p);
    const AttnItem item = {number / tiles, number % tiles, 0};
    const bool work = item.token < p.tokens;
    const AttnToken t = token_of(p, min(item.token, p.tokens - 1));
    if (work && item.head_tile == 0) prefetch_keys(p, t, 0, t.position);
    wait_qkv(p, ready);
    AttnState state;
    if (work) {
        attend_keys(state, p, item, t, 0, t.position + 1, Plain());
        store_heads(state, p, item, ToRows{p.out, p.out_stride});
    }
    leave(ready, gridDim.x * WARPS, number + threadIdx.x == 0);
}

// Whether more blocks have work than find room beside [qkv ; up], one a multiprocessor, and a warp's work is short: [down | dense] begins
// when all have begun.
bool solo(const AttnDecodeParams& p) {
    const uint32_t room = hopper_multiprocessors<attn_decode_solo_kernel>();
    return room && p.tokens * attn_head_tiles(p.heads) > room && p.reach <= PEREGRINE_ATTN_SOLO;
}

}  // namespace

extern "C" int32_t attn_decode(const AttnDecodeParams* p, const Launch* l) {
    if (p->tokens == 0 || p->tokens > PEREGRINE_STEP_TOKENS || p->heads == 0 || p->slots == 0 || p->max_context == 0 ||
        p->out_stride % 8 || p->reach == 0 || p->reach > p->max_context || attn_most_chunks(p->max_context) > ATTN_RUNS * 31)
        return PEREGRINE_BAD_SHAPE;
    const uint32_t tiles = attn_head_tiles(p->heads);
    if (solo(*p)) return launch(attn_decode_solo_kernel, dim3((p->tokens * tiles + WARPS - 1) / WARPS), WARPS * 32, 0, l, *p);
    return launch(attn_decode_kernel, dim3(blocks_of(p->reach - 1), tiles, p->tokens), WARPS * 32, 0, l, *p);
}
