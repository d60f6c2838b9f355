// attn_decode — multi-query attention of a few tokens by single warps: one item is (token, 16 heads, 128 or 256 keys).
//
// What a warp needs goes from global memory straight to the registers of mma.m16n8k16, without shared memory or a block barrier, so that
// any warp of any kernel can take an item. Lane l is g = l / 4, q = l % 4. Heads are M: rows g and g + 8 of a lane.
//
// Q K^T: the dot product may take the 64 dims in any order common to Q and K. A lane reads 16-byte chunks q and q + 4 of a row:
//
//     chunk of 8 dims      0   1   2   3   4   5   6   7         row: head g (g + 8) of Q, key g of an n8 tile of K
//     lane q               0   1   2   3   0   1   2   3
//     word of the lane    0-3  "   "   "  4-7  "   "   "         words 2s, 2s + 1: a0, a2 (a1, a3) resp. b0, b1 of k16 step s
//
// so a dim and its rotary partner 32 further on are words i and i + 4 of one lane, and each read takes whole sectors.
//
// P V: scores of two n8 tiles of keys are the A operand of one k16 step t: keys 16t + 2q, 2q + 1, 2q + 8, 2q + 9. The dims may be
// spread over the columns n of the eight n8 tiles j as we like: column n of tile j is dim 8n + j. A lane (column g) reads
//
//     V[key][8g .. 8g + 7], 16 bytes, of those four keys         two keys' halves j, byte-permuted: b0, b1 of tile j
//
// and accumulator c0, c1 (row g), c2, c3 (row g + 8) of tile j are dims 16q + j and 16q + 8 + j: a lane ends with 16 neighbouring
// dims of two rows.
//
// Keys before the slot's first token of this call are in the cache. Those of the call's own tokens come from qkv and are rotated on the
// way, with the bits `rope` gives them; the item that holds its token's own key appends it. Chunks are counted from position 0, rounds are
// 32 keys: a token's result depends on its own context only.
//
// An item alone normalises and stores. Of several, each leaves its state in `partials`, and the last to arrive merges all in chunk order,
// more than 8 of them (beyond 2048 tokens) in runs. Products that feed a sum are spelled out (__fmul_rn, __fmaf_rn), so that every kernel
// that takes items rounds alike. A kernel of 512 threads has 128 registers a thread, and that is what this is cut to.
#pragma once
#include "attn.cuh"
#include "rope.cuh"

constexpr uint32_t ATTN_ROWS = 16;             // heads of an item
constexpr uint32_t ATTN_ROUND = 32;            // keys of a round
constexpr uint32_t ATTN_LONG = 512;            // positions from here on have longer items
constexpr uint32_t ATTN_FLAT = 8;              // chunks that are merged at once
constexpr uint32_t ATTN_RUNS = 4;              // runs that more chunks are merged in, of at most 31
constexpr uint32_t ATTN_STATE_QUADS = 9;       // float4 of a lane's state
constexpr uint32_t ATTN_STATE_FLOATS = 32 * 4 * ATTN_STATE_QUADS;

struct AttnItem { uint32_t token, head_tile, chunk; };

struct AttnToken {  // what a call's token says to attention, clamped to what there is
    uint32_t position, slot;
    uint32_t first_new;  // position of the slot's first token in this call: keys from here on are in qkv, not in the cache
};

__device__ __forceinline__ AttnToken attn_token(const AttnDecodeParams& p, uint32_t m, const StepToken& t) {
    AttnToken k;
    k.position = min(t.position, p.max_context - 1);
    k.slot = min(t.slot, p.slots - 1);
    k.first_new = k.position - min(m - min(t.first, m), k.position);
    return k;
}

// Row of qkv of the first token of token m's slot: an item reads the keys and values of rows attn_first .. m.
__device__ __forceinline__ uint32_t attn_first(uint32_t m, const AttnToken& t) { return m - (t.position - t.first_new); }

__host__ __device__ __forceinline__ uint32_t attn_head_tiles(uint32_t heads) { return (heads + ATTN_ROWS - 1) / ATTN_ROWS; }
// Keys of an item of a token at `position`, which alone decides. Long contexts have fewer items: each has to be joined.
__host__ __device__ __forceinline__ uint32_t attn_keys(uint32_t position) { return PEREGRINE_ATTN_CHUNK * (position < ATTN_LONG ? 1 : 2); }
// Chunks of such a token: its items are head tiles x chunks. And the most of any in so long a context.
__host__ __device__ __forceinline__ uint32_t attn_chunks(uint32_t position) { return position / attn_keys(position) + 1; }
__host__ __device__ __forceinline__ uint32_t attn_most_chunks(uint32_t max_context) { return (max_context - 1) / PEREGRINE_ATTN_CHUNK + 1; }

// The words of a lane of one row, of chunks q and q + 4.
__device__ __forceinline__ void words_of(uint32_t w[8], const uint4& low, const uint4& high) {
    w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w, w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
}

// Cosines and sines of a lane's eight pairs at a position.
__device__ __forceinline__ void load_angles(float4 cs[4], const float* table, uint32_t position) {
    const float4* at = reinterpret_cast<const float4*>(table) + position * (HEAD_DIM / 4) + threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) cs[i] = __ldg(at + i);
}

__device__ __forceinline__ void rotate_row(uint32_t w[8], const float4 cs[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&w[i]));
        const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&w[i + 4]));
        const float2 x = rotate(a.x, b.x, make_float2(cs[i].x, cs[i].y)), y = rotate(a.y, b.y, make_float2(cs[i].z, cs[i].w));
        w[i] = pack(x.x, y.x), w[i + 4] = pack(x.y, y.y);
    }
}

__device__ __forceinline__ uint4 load_cached(const uint16_t* at) { return __ldcg(reinterpret_cast<const uint4*>(at)); }

// One item's view of the keys and values of its token.
template <typename Fetch>
struct AttnContext {
    const AttnDecodeParams& p;
    const AttnItem& item;
    const AttnToken& t;
    const Fetch& fetch;

    // The key of a token of this call, in qkv; its value follows. For a key that is none, another one's.
    __device__ __forceinline__ const uint16_t* new_row(uint32_t key) const {
        const uint32_t row = attn_first(item.token, t) + min(max(key, t.first_new), t.position) - t.first_new;
        return p.qkv + ((size_t)row * (p.heads + 2) + p.heads) * HEAD_DIM;
    }
    __device__ __forceinline__ bool is_new(uint32_t key) const { return key >= t.first_new && key <= t.position; }
    __device__ __forceinline__ bool appends(uint32_t key) const { return item.head_tile == 0 && key == t.position; }
    // Where a key or value is in the cache.
    __device__ __forceinline__ size_t cached(uint32_t key) const { return ((size_t)t.slot * p.max_context + key) * HEAD_DIM; }

    // Keys g of N n8 tiles from key0 on, the cached ones; zero otherwise. WHOLE: all are cached.
    template <int N, bool WHOLE>
    __device__ __forceinline__ void load_keys(uint32_t k[][8], uint32_t key0) const {
        const uint32_t key = key0 + threadIdx.x % 32 / 4;
        const uint16_t* row = p.k_cache + cached(key) + threadIdx.x % 4 * 8;
#pragma unroll
        for (int j = 0; j < N; j++) {
            uint4 low = make_uint4(0, 0, 0, 0), high = low;
            if (WHOLE || key + j * 8 < t.first_new)
                low = load_cached(row + j * 8 * HEAD_DIM), high = load_cached(row + j * 8 * HEAD_DIM + HEAD_DIM / 2);
            words_of(k[j], low, high);
        }
    }
    // The four values of a lane of the k16 step at key0, keys 2q, 2q + 1, 2q + 8, 2q + 9, in the same way.
    template <bool WHOLE>
    __device__ __forceinline__ void load_values(uint4 v[4], uint32_t key0) const {
        const uint32_t key = key0 + threadIdx.x % 4 * 2;
        const uint16_t* values = p.v_cache + cached(key) + threadIdx.x % 32 / 4 * 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = i / 2 * 8 + i % 2;
            v[i] = make_uint4(0, 0, 0, 0);
            if (WHOLE || key + at < t.first_new) v[i] = load_cached(values + at * HEAD_DIM);
        }
    }
    // Puts in the keys of this call's tokens among the 8 at key0.
    __device__ __forceinline__ void add_new_keys(uint32_t k[8], uint32_t key0) const {
        if (key0 + 8 <= t.first_new || key0 > t.position) return;
        const uint32_t key = key0 + threadIdx.x % 32 / 4;
        float4 cs[4];
        load_angles(cs, p.table, min(key, t.position));
        const uint16_t* row = new_row(key) + threadIdx.x % 4 * 8;
        const uint16_t* const at[2] = {row, row + HEAD_DIM / 2};
        uint4 half[2];
        fetch(half, at);
        uint32_t w[8];
        words_of(w, half[0], half[1]);
        rotate_row(w, cs);
#pragma unroll
        for (int i = 0; i < 8; i++) k[i] = is_new(key) ? w[i] : k[i];
        if (appends(key)) {
            uint4* to = reinterpret_cast<uint4*>(p.k_cache + cached(key)) + threadIdx.x % 4;
            to[0] = make_uint4(w[0], w[1], w[2], w[3]), to[4] = make_uint4(w[4], w[5], w[6], w[7]);
        }
    }
    // And their values among the 16 at key0.
    __device__ __forceinline__ void add_new_values(uint4 v[4], uint32_t key0) const {
        if (key0 + 16 <= t.first_new || key0 > t.position) return;
        const uint32_t part = threadIdx.x % 32 / 4 * 8;
        const uint16_t* at[4];
        uint4 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) at[i] = new_row(key0 + threadIdx.x % 4 * 2 + i / 2 * 8 + i % 2) + HEAD_DIM + part;
        fetch(w, at);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t key = key0 + threadIdx.x % 4 * 2 + i / 2 * 8 + i % 2;
            if (is_new(key)) v[i] = w[i];
            if (appends(key)) *reinterpret_cast<uint4*>(p.v_cache + cached(key) + part) = w[i];
        }
    }
};

// Scores of the 8 keys of an n8 tile.
__device__ __forceinline__ void score_keys(float score[4], const uint32_t query[4][4], const uint32_t k[8]) {
#pragma unroll
    for (int c = 0; c < 4; c++) score[c] = 0.f;
#pragma unroll
    for (int s = 0; s < 4; s++) mma(score, query[s], k[2 * s], k[2 * s + 1]);
}

// Adds 16 weighted values.
__device__ __forceinline__ void add_values(AttnState& state, const uint32_t a[4], const uint4 v[4]) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const uint32_t halves = j % 2 ? 0x7632 : 0x5410;
        const auto word = [j](const uint4& u) { return j / 2 == 0 ? u.x : j / 2 == 1 ? u.y : j / 2 == 2 ? u.z : u.w; };
        mma(state.out[j], a, __byte_perm(word(v[0]), word(v[1]), halves), __byte_perm(word(v[2]), word(v[3]), halves));
    }
}

// 32 keys that are all cached. `k` holds them, and afterwards those at `next`. The fence is for the compiler, which would else ask for the
// next keys while all values are still under way, and run out of registers.
template <typename Fetch>
__device__ __forceinline__ void attend_cached(AttnState& state, const uint32_t query[4][4], uint32_t k[4][8],
                                              const AttnContext<Fetch>& context, uint32_t key0, uint32_t next) {
    const uint32_t last[2] = {context.t.position, context.t.position};
    uint4 v[2][4];
    context.template load_values<true>(v[0], key0);
    float score[4][4];
#pragma unroll
    for (int j = 0; j < 4; j++) score_keys(score[j], query, k[j]);
    context.template load_values<true>(v[1], key0 + 16);
    soften<4, false>(state, score, key0, last);
    uint32_t a[2][4];
    weights_of(a[0], score, 0), weights_of(a[1], score, 1);
    add_values(state, a[0], v[0]);
    asm volatile("fence.acq_rel.cta;" ::: "memory");  // for the compiler alone, see above
    context.template load_keys<4, true>(k, next);
    add_values(state, a[1], v[1]);
}

// 32 keys some of which are in qkv, or beyond the token. What is beyond has no weight: zeros stand for it.
template <typename Fetch>
__device__ __forceinline__ void attend_new(AttnState& state, const uint32_t query[4][4], const AttnContext<Fetch>& context,
                                           uint32_t key0) {
    const uint32_t last[2] = {context.t.position, context.t.position};
    float score[4][4];
#pragma unroll
    for (int s = 0; s < 2; s++) {
        uint32_t k[2][8];
        context.template load_keys<2, false>(k, key0 + s * 16);
        context.add_new_keys(k[0], key0 + s * 16);
        context.add_new_keys(k[1], key0 + s * 16 + 8);
        score_keys(score[2 * s], query, k[0]), score_keys(score[2 * s + 1], query, k[1]);
    }
    uint4 v[2][4];
    context.template load_values<false>(v[0], key0);
    soften<4, true>(state, score, key0, last);
    uint32_t a[2][4];
    weights_of(a[0], score, 0), weights_of(a[1], score, 1);
    context.add_new_values(v[0], key0);
    context.template load_values<false>(v[1], key0 + 16);
    add_values(state, a[0], v[0]);
    context.add_new_values(v[1], key0 + 16);
    add_values(state, a[1], v[1]);
}

// The A registers of the item's 16 heads, rotated; rows beyond the model are zero.
template <typename Fetch>
__device__ __forceinline__ void load_queries(uint32_t a[4][4], const AttnDecodeParams& p, const AttnItem& item, uint32_t position,
                                             const Fetch& fetch) {
    float4 cs[4];
    load_angles(cs, p.table, position);
    const uint16_t* queries = p.qkv + (size_t)item.token * (p.heads + 2) * HEAD_DIM + threadIdx.x % 4 * 8;
    const uint32_t head = item.head_tile * ATTN_ROWS + threadIdx.x % 32 / 4;
    const uint16_t* row_a = queries + min(head, p.heads - 1) * HEAD_DIM;
    const uint16_t* row_b = queries + min(head + 8, p.heads - 1) * HEAD_DIM;
    const uint16_t* const at[4] = {row_a, row_a + HEAD_DIM / 2, row_b, row_b + HEAD_DIM / 2};
    uint4 half[4];
    fetch.await(row_a), fetch(half, at);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint32_t w[8];
        words_of(w, half[2 * r], half[2 * r + 1]);
        rotate_row(w, cs);
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 2][i % 2 * 2 + r] = head + r * 8 < p.heads ? w[i] : 0;
    }
}

// The 16 heads of an item against keys key0 .. end - 1 of its token; key0 is a multiple of ATTN_ROUND, end at most position + 1.
template <typename Fetch>
__device__ __forceinline__ void attend_keys(AttnState& state, const AttnDecodeParams& p, const AttnItem& item, const AttnToken& t,
                                            uint32_t key0, uint32_t end, const Fetch& fetch) {
    const AttnContext<Fetch> context = {p, item, t, fetch};
    const uint32_t cached_end = min(end, t.first_new) / ATTN_ROUND * ATTN_ROUND;
    uint32_t k[4][8], query[4][4];
    context.template load_keys<4, false>(k, key0 < cached_end ? key0 : t.first_new);
    load_queries(query, p, item, t.position, fetch);
    clear(state);
#pragma unroll 1
    for (; key0 < cached_end; key0 += ATTN_ROUND) {
        const uint32_t next = key0 + ATTN_ROUND;
        attend_cached(state, query, k, context, key0, next < cached_end ? next : key0);  // behind the last: any that are there
    }
#pragma unroll 1
    for (; key0 < end; key0 += ATTN_ROUND) attend_new(state, query, context, key0);
    state.sum[0] = row_sum(state.sum[0]), state.sum[1] = row_sum(state.sum[1]);
}

// A lane's state as float4s: in memory quad i of lane l is at i * 32 + l.
struct AttnQuads {
    float4 quad[ATTN_STATE_QUADS];
};

__device__ __forceinline__ void load_quads(AttnQuads& s, const float4* from) {
#pragma unroll
    for (int i = 0; i < ATTN_STATE_QUADS; i++) s.quad[i] = __ldcg(from + i * 32);
}

// Adds a chunk's state.
__device__ __forceinline__ void merge(AttnState& state, const AttnQuads& other) {
    const float4& ends = other.quad[8];
    const float sum[2] = {ends.x, ends.y}, top[2] = {ends.z, ends.w};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float joint = fmaxf(state.top[r], top[r]);
        const float mine = power2(state.top[r] - joint), theirs = power2(top[r] - joint);
        state.top[r] = joint;
        const auto join = [mine, theirs](float& a, float b) { a = __fmaf_rn(a, mine, __fmul_rn(b, theirs)); };
        join(state.sum[r], sum[r]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float4& o = other.quad[j];
            join(state.out[j][r * 2], r ? o.z : o.x), join(state.out[j][r * 2 + 1], r ? o.w : o.y);
        }
    }
}

// Counts up and gives what was there; what this warp wrote before is seen by whoever finds it counted.
__device__ __forceinline__ uint32_t arrive(uint32_t* word, uint32_t amount) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(amount) : "memory");
    return before;
}

__device__ __forceinline__ void store_state(float4* to, const AttnState& state) {
#pragma unroll
    for (int j = 0; j < 8; j++) to[j * 32] = make_float4(state.out[j][0], state.out[j][1], state.out[j][2], state.out[j][3]);
    to[8 * 32] = make_float4(state.sum[0], state.sum[1], state.top[0], state.top[1]);
}

// Merges `count` states, `stride` chunks apart, in order. Two are under way: one's latency is the cost of a merge.
__device__ __forceinline__ void merge_states(AttnState& state, const float4* from, uint32_t count, uint32_t stride) {
    constexpr uint32_t quads = ATTN_STATE_FLOATS / 4;
    clear(state);
    AttnQuads even, odd;
    load_quads(even, from);
#pragma unroll 1
    for (uint32_t i = 1; i < count; i += 2) {
        load_quads(odd, from + i * stride * quads);
        merge(state, even);
        load_quads(even, from + min(i + 1, count - 1) * stride * quads);  // behind the last: any that is there
        merge(state, odd);
    }
    if (count % 2) merge(state, even);
}

// Counts one arrival in a field of the group's word; true, for all lanes, if it is the last of `wanted`.
__device__ __forceinline__ bool arrive_last(uint32_t* word, uint32_t shift, uint32_t mask, uint32_t wanted) {
    // The lanes' states are visible before the arrival is, and the others' are read after theirs.
    __syncwarp();
    uint32_t before = 0;
    if (threadIdx.x % 32 == 0) before = arrive(word, 1u << shift);
    __syncwarp();
    return (__shfl_sync(~0u, before, 0) >> shift & mask) == wanted - 1;
}

// Leaves the item's state for whoever arrives last. True for that one, whose state then is the token's. Many chunks are merged in ATTN_RUNS
// runs side by side, and then those: one warp would need a round trip for every two.
__device__ __forceinline__ bool join_chunks(AttnState& state, const AttnDecodeParams& p, const AttnItem& item, uint32_t chunks) {
    const uint32_t group = item.token * attn_head_tiles(p.heads) + item.head_tile;
    float4* partials = reinterpret_cast<float4*>(p.partials + (size_t)group * attn_most_chunks(p.max_context) * ATTN_STATE_FLOATS) +
                       threadIdx.x % 32;
    const uint32_t run = chunks <= ATTN_FLAT ? 1 : (chunks + ATTN_RUNS - 1) / ATTN_RUNS;
    uint32_t* word = p.arrivals + group;  // five bits for each run, then a count of runs
    store_state(partials + item.chunk * (ATTN_STATE_FLOATS / 4), state);
    if (run > 1) {
        const uint32_t index = item.chunk / run, first = index * run, count = min(run, chunks - first);
        if (!arrive_last(word, 5 * index, 31, count)) return false;
        float4* own = partials + first * (ATTN_STATE_FLOATS / 4);
        merge_states(state, own, count, 1);
        store_state(own, state);
    }
    const uint32_t runs = (chunks + run - 1) / run;
    if (!arrive_last(word, 5 * ATTN_RUNS, ~0u, runs)) return false;
    if (threadIdx.x % 32 == 0) *word = 0;
    merge_states(state, partials, runs, run);
    return true;
}

// Normalises an item's heads and stores them; see attn_decode_item.
template <typename Store>
__device__ __forceinline__ void store_heads(const AttnState& state, const AttnDecodeParams& p, const AttnItem& item, const Store& store) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t head = item.head_tile * ATTN_ROWS + threadIdx.x % 32 / 4 + r * 8;
        const float scale = 1.f / state.sum[r];
        uint32_t words[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int j = i % 4 * 2, c = r * 2 + i / 4;
            words[i] = pack(state.out[j][c] * scale, state.out[j + 1][c] * scale);
        }
        if (head < p.heads) store(item.token, head, threadIdx.x % 4, words);
    }
}

// One item by one warp, all of whose lanes call it together; item.chunk < attn_chunks(t.position).
//   fetch(uint4 (&w)[N], const uint16_t* const (&at)[N]): N reads of 16 bytes of qkv, by all lanes together, of use or not; the first are
//       queries, and fetch.await(at) comes before them.
//   store(token, head, q, words[8]): dims 16q .. 16q + 15 of a head's output, eight pairs of f16; by lanes that have the head.
template <typename Fetch, typename Store>
__device__ __forceinline__ void attn_decode_item(const AttnDecodeParams& p, const AttnItem& item, const AttnToken& t, const Fetch& fetch,
                                                 const Store& store) {
    AttnState state;
    const uint32_t keys = attn_keys(t.position), key0 = item.chunk * keys;
    attend_keys(state, p, item, t, key0, min(key0 + keys, t.position + 1), fetch);
    const uint32_t chunks = attn_chunks(t.position);
    if (chunks == 1 || join_chunks(state, p, item, chunks)) store_heads(state, p, item, store);
}
