// attn_decode — multi-query attention of a few tokens by single warps: one item is (token, 16 heads, 128 keys).
//
// What a warp needs goes from global memory straight to the registers of mma.m16n8k16; there is no shared memory and no block
// barrier, so that any warp of any kernel can take an item. Lane l is g = l / 4, q = l % 4. Heads are M: rows g and g + 8 of a lane.
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
// Keys before the slot's first token of this call are in the cache. Those of the call's own tokens come from qkv and are rotated on
// the way, with the bits `rope` gives them; the item that holds its token's own key appends it. Chunks are counted from position
// 0, rounds are 32 keys: a token's result depends on its own context only, not on who is in the call with it.
//
// An item alone normalises and stores. Of several, each leaves its state in `partials`, and the last to arrive merges all in
// chunk order.
#pragma once
#include "attn.cuh"
#include "rope.cuh"

constexpr uint32_t ATTN_ROWS = 16;             // heads of an item
constexpr uint32_t ATTN_ROUND = 32;            // keys of a round
constexpr uint32_t ATTN_STATE_QUADS = 9;       // float4 of a lane's state
constexpr uint32_t ATTN_STATE_FLOATS = 32 * 4 * ATTN_STATE_QUADS;

struct AttnItem {
    uint32_t token, head_tile, chunk;
};

// What a call's token says to attention, clamped to what there is.
struct AttnToken {
    uint32_t position;
    uint32_t slot;
    uint32_t first;      // row of qkv of the slot's first token
    uint32_t first_new;  // its position: keys from here on are in qkv, not in the cache
};

__device__ __forceinline__ AttnToken attn_token(const AttnDecodeParams& p, uint32_t m, const StepToken& t) {
    AttnToken k;
    k.position = min(t.position, p.max_context - 1);
    k.slot = min(t.slot, p.slots - 1);
    const uint32_t before = min(m - min(t.first, m), k.position);
    k.first = m - before;
    k.first_new = k.position - before;
    return k;
}

__host__ __device__ __forceinline__ uint32_t attn_head_tiles(uint32_t heads) { return (heads + ATTN_ROWS - 1) / ATTN_ROWS; }
// Chunks of a token at `position`: its items are head tiles x chunks.
__host__ __device__ __forceinline__ uint32_t attn_chunks(uint32_t position) { return position / PEREGRINE_ATTN_CHUNK + 1; }

// The words of a lane of one row: chunks q and q + 4.
template <typename Load>
__device__ __forceinline__ void load_row(uint32_t w[8], const uint16_t* row, Load load) {
    const uint32_t q = threadIdx.x % 4;
    const uint4 low = load(row + q * 8), high = load(row + q * 8 + 32);
    w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w;
    w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
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

struct LoadCached {
    __device__ __forceinline__ uint4 operator()(const uint16_t* at) const { return __ldcg(reinterpret_cast<const uint4*>(at)); }
};

// One item's view of the keys and values of its token.
template <typename Fetch>
struct AttnContext {
    const AttnDecodeParams& p;
    const AttnToken& t;
    const Fetch& fetch;
    uint16_t *k_cache, *v_cache;  // of the slot
    const uint16_t* new_key;      // in qkv, of the token at first_new; its value follows
    uint32_t stride;              // of qkv
    bool appends;

    __device__ __forceinline__ const uint16_t* new_row(uint32_t key) const {
        const uint32_t at = min(max(key, t.first_new), t.position) - t.first_new;
        return new_key + (size_t)at * stride;
    }
    // Whether keys key0 .. key0 + n - 1 hold one that is in qkv; the same for all lanes.
    __device__ __forceinline__ bool holds_new(uint32_t key0, uint32_t n) const { return key0 + n > t.first_new && key0 <= t.position; }

    // The cached ones of 32 keys; others are left zero.
    __device__ __forceinline__ void load_keys(uint32_t k[4][8], uint32_t key0) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t key = key0 + j * 8 + threadIdx.x % 32 / 4;
#pragma unroll
            for (int i = 0; i < 8; i++) k[j][i] = 0;
            if (key < t.first_new) load_row(k[j], k_cache + (size_t)key * HEAD_DIM, LoadCached());
        }
    }
    // The values of k16 step `step` of the 32 keys, in the order 2q, 2q + 1, 2q + 8, 2q + 9.
    __device__ __forceinline__ uint32_t value_key(uint32_t key0, int step, int i) const {
        return key0 + step * 16 + threadIdx.x % 4 * 2 + i / 2 * 8 + i % 2;
    }
    __device__ __forceinline__ void load_values(uint4 v[2][4], uint32_t key0) const {
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t key = value_key(key0, s, i);
                v[s][i] = make_uint4(0, 0, 0, 0);
                if (key < t.first_new) v[s][i] = LoadCached()(v_cache + (size_t)key * HEAD_DIM + threadIdx.x % 32 / 4 * 8);
            }
    }
    // The keys of this call's tokens among the 32.
    __device__ __forceinline__ void add_new_keys(uint32_t k[4][8], uint32_t key0) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (!holds_new(key0 + j * 8, 8)) continue;
            const uint32_t key = key0 + j * 8 + threadIdx.x % 32 / 4;
            uint32_t w[8];
            float4 cs[4];
            load_angles(cs, p.table, min(key, t.position));
            load_row(w, new_row(key), fetch);
            rotate_row(w, cs);
            if (key >= t.first_new && key <= t.position) {
#pragma unroll
                for (int i = 0; i < 8; i++) k[j][i] = w[i];
            }
            if (appends && key == t.position) {
                uint4* to = reinterpret_cast<uint4*>(k_cache + (size_t)key * HEAD_DIM) + threadIdx.x % 4;
                to[0] = make_uint4(w[0], w[1], w[2], w[3]), to[4] = make_uint4(w[4], w[5], w[6], w[7]);
            }
        }
    }
    // And their values.
    __device__ __forceinline__ void add_new_values(uint4 v[2][4], uint32_t key0) const {
        const uint32_t at = threadIdx.x % 32 / 4 * 8;
#pragma unroll
        for (int s = 0; s < 2; s++) {
            if (!holds_new(key0 + s * 16, 16)) continue;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t key = value_key(key0, s, i);
                const uint4 w = fetch(new_row(key) + HEAD_DIM + at);
                if (key >= t.first_new && key <= t.position) v[s][i] = w;
                if (appends && key == t.position) *reinterpret_cast<uint4*>(v_cache + (size_t)key * HEAD_DIM + at) = w;
            }
        }
    }
};

// The A registers of the item's 16 heads, rotated; rows beyond the model are zero.
template <typename Fetch>
__device__ __forceinline__ void load_queries(uint32_t a[4][4], const AttnDecodeParams& p, const AttnItem& item, uint32_t position,
                                             const Fetch& fetch) {
    float4 cs[4];
    load_angles(cs, p.table, position);
    const uint16_t* queries = p.qkv + (size_t)item.token * (p.heads + 2) * HEAD_DIM;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t head = item.head_tile * ATTN_ROWS + threadIdx.x % 32 / 4 + r * 8;
        uint32_t w[8];
        load_row(w, queries + min(head, p.heads - 1) * HEAD_DIM, fetch);
        rotate_row(w, cs);
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 2][i % 2 * 2 + r] = head < p.heads ? w[i] : 0;
    }
}

// The 16 heads of an item against its keys.
template <typename Fetch>
__device__ __forceinline__ void attend_chunk(AttnState& state, const AttnDecodeParams& p, const AttnItem& item, const AttnToken& t,
                                             const Fetch& fetch) {
    const size_t slot = (size_t)t.slot * p.max_context * HEAD_DIM;
    const uint32_t stride = (p.heads + 2) * HEAD_DIM;
    const AttnContext<Fetch> context = {p, t, fetch, p.k_cache + slot, p.v_cache + slot,
                                        p.qkv + (size_t)t.first * stride + p.heads * HEAD_DIM, stride, item.head_tile == 0};
    const uint32_t last[2] = {t.position, t.position};
    const uint32_t begin = item.chunk * PEREGRINE_ATTN_CHUNK;
    const uint32_t end = min(begin + PEREGRINE_ATTN_CHUNK, t.position + 1);
    uint32_t k[4][8], query[4][4];
    context.load_keys(k, begin);
    load_queries(query, p, item, t.position, fetch);
    clear(state);
#pragma unroll 1
    for (uint32_t key0 = begin; key0 < end; key0 += ATTN_ROUND) {
        const bool holds_new = context.holds_new(key0, ATTN_ROUND);
        uint4 v[2][4];
        context.load_values(v, key0);
        if (holds_new) context.add_new_keys(k, key0);
        float score[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) score[j][c] = 0.f;
#pragma unroll
            for (int s = 0; s < 4; s++) mma(score[j], query[s], k[j][2 * s], k[j][2 * s + 1]);
        }
        soften<4>(state, score, key0, last);
        if (holds_new) context.add_new_values(v, key0);
        context.load_keys(k, key0 + ATTN_ROUND);  // none are cached behind the last round
#pragma unroll
        for (int s = 0; s < 2; s++) {
            uint32_t a[4];
            weights_of(a, score, s);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const uint32_t halves = j % 2 ? 0x7632 : 0x5410;
                const auto word = [j](const uint4& u) { return j / 2 == 0 ? u.x : j / 2 == 1 ? u.y : j / 2 == 2 ? u.z : u.w; };
                mma(state.out[j], a, __byte_perm(word(v[s][0]), word(v[s][1]), halves), __byte_perm(word(v[s][2]), word(v[s][3]), halves));
            }
        }
    }
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
        const float mine = exp2f(state.top[r] - joint), theirs = exp2f(top[r] - joint);
        state.top[r] = joint;
        state.sum[r] = state.sum[r] * mine + sum[r] * theirs;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float4& o = other.quad[j];
            state.out[j][r * 2] = state.out[j][r * 2] * mine + (r ? o.z : o.x) * theirs;
            state.out[j][r * 2 + 1] = state.out[j][r * 2 + 1] * mine + (r ? o.w : o.y) * theirs;
        }
    }
}

// Leaves the item's state for whoever arrives last. True for that one, whose state then is the whole token's.
__device__ __forceinline__ bool join_chunks(AttnState& state, const AttnDecodeParams& p, const AttnItem& item, uint32_t chunks) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t group = item.token * attn_head_tiles(p.heads) + item.head_tile;
    float4* partials = reinterpret_cast<float4*>(p.partials + (size_t)group * attn_chunks(p.max_context - 1) * ATTN_STATE_FLOATS) + lane;
    constexpr uint32_t chunk_quads = ATTN_STATE_FLOATS / 4;
    float4* mine = partials + item.chunk * chunk_quads;
#pragma unroll
    for (int j = 0; j < 8; j++) mine[j * 32] = make_float4(state.out[j][0], state.out[j][1], state.out[j][2], state.out[j][3]);
    mine[8 * 32] = make_float4(state.sum[0], state.sum[1], state.top[0], state.top[1]);
    __threadfence();  // the state is visible before the arrival is
    __syncwarp();
    uint32_t arrived = 0;
    if (lane == 0) arrived = atomicAdd(p.arrivals + group, 1);
    if (__shfl_sync(~0u, arrived, 0) != chunks - 1) return false;
    __threadfence();  // and the others' states are read after their arrivals
    if (lane == 0) p.arrivals[group] = 0;
    clear(state);
    AttnQuads now, next;
    load_quads(now, partials);
#pragma unroll 1
    for (uint32_t c = 1; c < chunks; c++) {
        load_quads(next, partials + c * chunk_quads);
        merge(state, now);
        now = next;
    }
    merge(state, now);
    return true;
}

// One item by one warp, all of whose lanes call it together; item.chunk < attn_chunks(t.position).
//   fetch(const uint16_t*) -> uint4: 16 bytes of qkv; called by all lanes together, always on an address inside qkv.
//   store(token, head, q, words[8]): dims 16q .. 16q + 15 of a head's output, eight pairs of f16; called by lanes that have the head.
template <typename Fetch, typename Store>
__device__ __forceinline__ void attn_decode_item(const AttnDecodeParams& p, const AttnItem& item, const AttnToken& t, const Fetch& fetch,
                                                 const Store& store) {
    AttnState state;
    attend_chunk(state, p, item, t, fetch);
    const uint32_t chunks = attn_chunks(t.position);
    if (chunks > 1 && !join_chunks(state, p, item, chunks)) return;
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
