// attn_decode — rotary positions, KV append and multi-query attention of a decode step's tokens, split over the context.
// Reference: src/reference.rs::rope, attention
// Shapes   qkv [tokens, heads + 2, 64] f16, caches [slots, max_context, 64] f16, out [tokens, out_stride] f16, or planes (planes.cuh); up
//          to 64 tokens.
// Mapping  block (part of the context, head tile, token) = four warps, each 16 heads of a token against up to 128 keys (attn_decode.cuh),
//          fewer where the context is short. The warps' states are joined in shared memory, those of more than 512 keys through global
//          memory too. The grid covers max_context (a graph must not depend on the position); blocks beyond the context leave at once.
//          Where those would be more than there is room for beside [qkv ; up], and `reach` says that contexts are short, a team of two
//          warps or one has all keys of a head tile, and a block two or four head tiles: 27 to 52 and 53 to 64 tokens here.
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
//          Of a layer of 64 at 128 by stamps, with four warps a head tile: [qkv ; up] stored at 25.3 us, attention begun 19 to 26, done 33.2,
//          and then alone had [down | dense] its inputs, at 34.1. Since that overtakes a warp a head tile: 2.021 ms for 2.114, 48 texts
//          (two warps) 1.733 for 1.832; fastest tenths 1.759 for 1.863, 1.519 for 1.660. At 512 to 632 64 2.356 for 2.358, 32 1.554 for
//          1.600, but at 900 2.830 for 2.551, 1.733 for 1.680: hence PEREGRINE_ATTN_SHORT.
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
//          A grid of four warps a head tile that covers `reach` alone, of which no block leaves at once: 16 texts at 512, 900 1.283, 1.400
//          for 1.250, 1.341, at 128 the same; not understood. Blocks for short and for long contexts in one grid, of which those not wanted
//          leave: 48, 64 texts at 128 1.86, 2.09 for 1.88, 2.18, at 900 2.56 for 2.68 (64).
//          [down | dense] that waits for [qkv ; up] itself and not for a word from here, ms for ms, 16 texts: by edges of the graph
//          (src/gpu/overtake.rs) 1.194 for 1.205, and without a fence in blocks that have no work 1.188. Attention in a stream of its own,
//          begun by a programmatic event, 1.196, if the norm is launched when attention's blocks have counted that they have begun, 1.209,
//          if when it has ended; if at once, all hangs: the next layer's [qkv ; up], it seems, waits for room in front of attention's blocks.
//          By an event of their launch in a stream 1.343: capturing makes it an edge that wait_previous() waits for. By a plain event 1.304;
//          overlapping the attention of the layer before 1.297. Without attention, and with that wait, 1.176, 1.348 (16, 32; wrong).
// Spills   8 and 16 bytes on sm_80, by teams of two warps and of one.
#include "launch.cuh"
#include "attn_decode.cuh"
#include "planes.cuh"
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

// As store_heads, as planes: a head is a unit of the inputs, of which each of four lanes has 16.
__device__ __forceinline__ void store_planes(const AttnState& state, const AttnDecodeParams& p, const AttnItem& item) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t q = threadIdx.x % 4, head = item.head_tile * ATTN_ROWS + threadIdx.x % 32 / 4 + r * 8;
        const float scale = 1.f / state.sum[r];
        const auto value = [&state, scale, r](int dim) { return state.out[dim % 8][r * 2 + dim / 8] * scale; };
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < 16; i++) most = larger(most, value(i));
        most = larger(most, __shfl_xor_sync(~0u, most, 1)), most = larger(most, __shfl_xor_sync(~0u, most, 2));
        if (head >= p.heads) continue;
        const PlaneStep step(most);
        int32_t v[16];
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = step(value(i));
        const auto word = [&v](int i, bool high) {
            const int a = v[2 * i], b = v[2 * i + 8], c = v[2 * i + 1], d = v[2 * i + 9];
            return high ? high_bytes(a, b, c, d) : low_bytes(a, b, c, d);
        };
        const uint32_t unit = p.first / UNIT_INPUTS + head;
        uint8_t* to = plane_unit(p.out, unit) + plane_chunk(item.token, q);
        *reinterpret_cast<uint4*>(to) = make_uint4(word(0, true), word(1, true), word(2, true), word(3, true));
        *reinterpret_cast<uint4*>(to + PLANE_BYTES) = make_uint4(word(0, false), word(1, false), word(2, false), word(3, false));
        if (q == 0) plane_steps(p.out, p.out_stride)[unit * PLANE_TOKENS + item.token] = step.step;
    }
}

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

// TEAM warps share an item, and a block has as many items as that leaves: all keys of each, unless one item has the whole block.
template <uint32_t TEAM>
__global__ void __launch_bounds__(WARPS * 32, 512 / (WARPS * 32)) attn_decode_kernel(const __grid_constant__ AttnDecodeParams p) {
    overlap_next();
    __shared__ float4 states[TEAM > 1 ? WARPS / 2 : 1][TEAM > 1 ? ATTN_STATE_QUADS * 32 : 1];
    const uint32_t warp = threadIdx.x / 32, member = warp % TEAM, tiles = attn_head_tiles(p.heads);
    uint32_t* ready = p.awaited ? p.arrivals + p.tokens * tiles : nullptr;
    const uint32_t number = blockIdx.y * (WARPS / TEAM) + warp / TEAM;  // of an item
    const AttnItem item =
        TEAM == WARPS ? AttnItem{blockIdx.z, blockIdx.y, blockIdx.x} : AttnItem{number / tiles, number % tiles, blockIdx.x};
    const AttnToken t = token_of(p, min(item.token, p.tokens - 1));
    const uint32_t blocks = TEAM == WARPS ? blocks_of(t.position) : 1;
    if (item.chunk >= blocks) {
        if (ready) __syncthreads();  // all have read their token
        if (threadIdx.x == 0) ready_idle(ready, WARPS / TEAM);
        return;  // the grid is not over before those that wait
    }
    // In the last block there may be no item left for some warps.
    const bool there = TEAM == WARPS || item.token < p.tokens;
    const uint32_t rounds = there ? t.position / ATTN_ROUND + 1 : 0;
    const uint32_t own = TEAM == 1 ? rounds : (rounds + TEAM * blocks - 1) / (TEAM * blocks), first = (item.chunk * TEAM + member) * own;
    if (there && item.head_tile == 0) prefetch_keys(p, t, first * ATTN_ROUND, (first + own) * ATTN_ROUND);
    if (ready) {
        if (threadIdx.x == 0) ready_wait_qkv(ready, (p.heads + 2) * (HEAD_DIM / UNIT_ROWS));
        __syncthreads();
    } else {
        wait_previous();
    }
    AttnState state;
    if (first < rounds) attend_keys(state, p, item, t, first * ATTN_ROUND, min((first + own) * ATTN_ROUND, t.position + 1), Plain());
    // Of four warps 2 and 3 join 0 and 1, then 1 joins 0; of two 1 joins 0. Warps that have no keys are the last ones.
    static_assert(WARPS == 4, "no two joins use the same memory");
    const auto place = [&](uint32_t warp) { return states[TEAM == WARPS ? warp % 2 : warp / 2] + threadIdx.x % 32; };
#pragma unroll
    for (uint32_t distance = TEAM / 2; distance; distance /= 2) {
        if (member >= distance && member < 2 * distance) store_state(place(warp), state);
        __syncthreads();
        if (member < distance && first + distance * own < rounds) {
            AttnQuads other;
            const float4* from = place(warp + distance);
#pragma unroll
            for (int i = 0; i < ATTN_STATE_QUADS; i++) other.quad[i] = from[i * 32];
            merge(state, other);
        }
    }
    if (member > 0) return;
    if (there && (blocks == 1 || join_chunks(state, p, item, blocks))) {
        if (TEAM == WARPS && p.planes) store_planes(state, p, item);
        else store_heads(state, p, item, ToRows{p.out, p.out_stride});
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) ready_end(ready, 1);
    if (!ready) return;
    wait_previous();
    // Of a block that always has work.
    const uint32_t parts = gridDim.x * gridDim.y * gridDim.z * (WARPS / TEAM);
    if (blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0) ready_before(ready, parts);
}

// As many warps as it takes to have no more blocks at work than find room beside [qkv ; up], one a multiprocessor: [down | dense] begins
// when all have begun. Of long contexts four, as few warps would have [down | dense] wait for them. Planes are of few tokens.
uint32_t team_of(const AttnDecodeParams& p) {
    const uint32_t items = p.tokens * attn_head_tiles(p.heads), room = hopper_multiprocessors<attn_decode_kernel<1>>();
    if (!room || items <= room || p.reach > PEREGRINE_ATTN_SHORT || p.planes) return 4;
    return items <= room * 2 ? 2 : 1;
}

}  // namespace

extern "C" int32_t attn_decode(const AttnDecodeParams* p, const Launch* l) {
    if (p->tokens == 0 || p->tokens > PEREGRINE_STEP_TOKENS || p->heads == 0 || p->slots == 0 || p->max_context == 0 ||
        p->out_stride % 8 || p->reach == 0 || p->reach > p->max_context || attn_most_chunks(p->max_context) > ATTN_RUNS * 31)
        return PEREGRINE_BAD_SHAPE;
    if (p->planes && (p->tokens > PLANE_TOKENS || p->out_stride % UNIT_INPUTS || p->first % UNIT_INPUTS ||
                      p->first + p->heads * HEAD_DIM > p->out_stride))
        return PEREGRINE_BAD_SHAPE;
    const uint32_t tiles = attn_head_tiles(p->heads), team = team_of(*p), own = WARPS / team;
    dim3 grid(1, (p->tokens * tiles + own - 1) / own);
    if (team == WARPS) grid = dim3(blocks_of(p->max_context - 1), tiles, p->tokens);
    const auto kernel = team == 4 ? attn_decode_kernel<4> : team == 2 ? attn_decode_kernel<2> : attn_decode_kernel<1>;
    return launch(kernel, grid, WARPS * 32, 0, l, *p);
}
