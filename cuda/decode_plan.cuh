// decode_plan — who does what in decode_step: roles of warps, shared memory, parameters, and which strips are whose.
//
//   warps 0..11   consumers   multiply; warp w has units 6 w .. 6 w + 5 of each strip. Four of them, a group, share a stage
//   warp  12      producer    8 lanes a group keep its ring full, a piece of memory each
//   warp  13      storer      adds the consumers' sums of a strip and sends them on
//   warps 14, 15  attention   one item (token, 16 heads, 128 or 256 keys) at a time, see attn_decode.cuh
//
//   ring   stage:  |group 0: 24 units|group 1: 24 units|group 2: 23 units|   a strip: 71 units of 544 bytes, 38.6 KB
//          DEPTH of these: 193 KB asked for ahead of need, which carries the stream over most waits
//   sums   [strip of the ring][warp][lane] as a lane of the product has them: of each of its tokens rows g and g + 8, f32
#pragma once
#include "attn_decode.cuh"
#include "bulk.cuh"
#include "decode_words.cuh"
#include "fixed.cuh"
#include "sides.cuh"

namespace {

constexpr uint32_t CONSUMERS = PEREGRINE_STEP_WARPS, PRODUCER = 12, STORER = 13, ATTENTION = 14, WARPS = 16;
constexpr uint32_t THREADS = WARPS * 32;
constexpr uint32_t GROUP_WARPS = 4;   // consumer warps that share a stage
constexpr uint32_t WARP_UNITS = 6;    // most units of a strip a warp owns
constexpr uint32_t GROUP_UNITS = GROUP_WARPS * WARP_UNITS;
constexpr uint32_t TOKENS = PEREGRINE_GEMV_TOKENS;
constexpr uint32_t HEAD_IN_FLIGHT = 2;  // copies of a group under way in the head, where nobody waits for anything else
constexpr uint32_t MOST_RUNS = 256;   // of strips: [qkv ; up]'s, one a slice at most, and the list's end
// Buffers that layers use in turn: one is written and read, one is cleared, and one is clear for sure.
constexpr uint32_t TURNS = PEREGRINE_STEP_TURNS;

template <bool ZEROS>
struct Shared {
    static constexpr int BYTES = unit_bytes<1, ZEROS>();
    static constexpr uint32_t STAGE_BYTES = GROUP_UNITS * BYTES;
    static constexpr uint32_t DEPTH = ZEROS ? 4 : 5;  // strips in the ring
    static constexpr uint32_t STAGES = DEPTH * CONSUMERS / GROUP_WARPS;
    uint8_t ring[STAGES][STAGE_BYTES];
    struct Few {
        float2 sums[DEPTH][CONSUMERS][32];
        uint32_t inputs[CONSUMERS][WARP_UNITS * 32];  // of one token
    };
    union {
        float4 many[DEPTH][CONSUMERS][32];  // sums of more than COLUMN_TOKENS tokens
        Few few;
    };
    alignas(16) float2 moments[2][CONSUMERS];
    StepToken token[TOKENS];
    uint32_t runs[MOST_RUNS];
    uint32_t block;  // the number of this block, see block_number
    uint64_t full[STAGES], empty[STAGES];
    uint64_t sums_full[DEPTH], sums_empty[DEPTH];
};

// The kernel's parameters, and what follows from them; both lie in constant memory, where they cost no registers.
struct Args : DecodeStepParams {
    uint32_t units;                    // of a strip: hidden / 64
    uint32_t owners, groups;           // consumer warps that have units, and groups that have such warps
    uint32_t qkv_size, wide_size;
    uint32_t qkv_tiles, wide_tiles;    // row tiles of [qkv ; up]; of [down | dense]
    uint32_t slices, head_tiles;
    uint32_t qkv_turn, wide_turn;      // values of one turn of `qkv` and `wide`
    AttnDecodeParams attn[PEREGRINE_STEP_LAYERS];
    uint32_t placed;                   // block_of says which block a multiprocessor is
    float hidden_share;                // 1 / hidden
    float inputs[CONSUMERS], last_share;  // inputs of a consumer warp's units, and 1 / those of the last owner
    explicit Args(const DecodeStepParams& p) : DecodeStepParams(p) {
        units = hidden / UNIT_INPUTS;
        owners = (units + WARP_UNITS - 1) / WARP_UNITS, groups = (units + GROUP_UNITS - 1) / GROUP_UNITS;
        qkv_size = (heads + 2) * PEREGRINE_HEAD_DIM, wide_size = ffn + hidden;
        qkv_tiles = (qkv_size + ffn) / UNIT_ROWS, wide_tiles = hidden / UNIT_ROWS;
        slices = ffn / hidden + 1, head_tiles = vocab / UNIT_ROWS;
        qkv_turn = TOKENS * qkv_size, wide_turn = TOKENS * wide_size;
        for (uint32_t l = 0; l < layers; l++)
            attn[l] = {DecodeStepParams::qkv + l % TURNS * qkv_turn, layer[l].k_cache, layer[l].v_cache, table, step->token, nullptr,
                       attn_partials, attn_arrivals, TOKENS, heads, 0, slots, max_context};
        hidden_share = 1.f / hidden;
        for (uint32_t w = 0; w < CONSUMERS; w++) inputs[w] = (min((w + 1) * WARP_UNITS, units) - min(w * WARP_UNITS, units)) * UNIT_INPUTS;
        last_share = 1.f / inputs[owners - 1];
    }
};

// Warps that read a stage of the ring; the stages of a strip are those of its groups, in order.
__device__ __forceinline__ uint32_t readers(const Args& p, uint32_t stage) {
    return min(GROUP_WARPS, p.owners - stage % p.groups * GROUP_WARPS);
}

// The number of this block. All blocks are resident, each alone on its multiprocessor, so each number is given once.
__device__ __forceinline__ uint32_t block_number(const Args& p) {
    uint32_t multiprocessor;
    asm("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
    return p.placed ? p.block_of[multiprocessor % PEREGRINE_STEP_SMS] : blockIdx.x;
}

// There are no more blocks than row tiles of [down | dense], so every block contributes to the residual in each layer: whoever has all
// of a layer's knows that every block has come as far, its storer included.
//
// The strips of a block. [qkv ; up]: every gridDim-th row tile, queries first, so that attention can begin early. [down | dense]: of the
// row tiles of its side (sides.cuh; even blocks have even ones) a run of the strips of all slices but the last, slice by slice, so that a
// block needs the inputs of one or two; then a run of the last slice (attention's output), which has until then to be ready.
struct Share {
    uint32_t block, blocks, tiles;  // of one side
    __device__ __forceinline__ Share(const Args& p, uint32_t block)
        : block(block / 2), blocks((gridDim.x + 1 - block % 2) / 2), tiles((p.wide_tiles + 1 - block % 2) / 2) {}
    // Where the share of the `ahead`-th block from this one on begins, of `count` strips.
    __device__ __forceinline__ uint32_t begin(uint32_t ahead, uint32_t count) const { return (block + ahead) * count / blocks; }
    // Of the strips of slices 0 .. slices - 2: slice * tiles + tile.
    __device__ __forceinline__ uint32_t first_run(uint32_t ahead, uint32_t slices) const { return begin(ahead, (slices - 1) * tiles); }
    // Of the last slice. Together with the other run a block has its even share of all strips.
    __device__ __forceinline__ uint32_t last_run(uint32_t ahead, uint32_t slices) const {
        return begin(ahead, slices * tiles) - first_run(ahead, slices);
    }
};
// With more than one token: whose norm a block computes, or a number beyond them.
__device__ __forceinline__ uint32_t norm_owner_of(uint32_t block) {
    const uint32_t apart = max(gridDim.x / TOKENS, 1u);
    return block % apart == 0 ? block / apart : TOKENS;
}

// How activations lie in `wide` and `final_norm`. Up to COLUMN_TOKENS tokens: one token's behind another's. More of them (MANY): half a
// unit of each of TOKENS tokens side by side, so that what a warp asks for in one instruction is four whole lines.
constexpr uint32_t HALF_UNIT = UNIT_INPUTS / 2;
template <bool MANY>
constexpr uint32_t HALF_STEP = MANY ? HALF_UNIT * TOKENS : HALF_UNIT;  // from half a unit to the next
template <bool MANY>
__device__ __forceinline__ uint32_t token_step(uint32_t size) { return MANY ? HALF_UNIT : size; }
// Value e of token m, of `size` values a token.
template <bool MANY>
__device__ __forceinline__ uint32_t value_at(uint32_t m, uint32_t e, uint32_t size) {
    return m * token_step<MANY>(size) + e / HALF_UNIT * HALF_STEP<MANY> + e % HALF_UNIT;
}

// The block's runs of strips as a list in shared memory, where loops over it need no registers: slice | tile / 2 << 8 | count << 20. The
// first is that of [qkv ; up], the last one is followed by 0.
constexpr uint32_t QKV_UP = 255;  // in place of a slice
__device__ __forceinline__ uint32_t run_slice(uint32_t run) { return run & 255; }
__device__ __forceinline__ uint32_t run_place(uint32_t run) { return run >> 8 & 4095; }
__device__ __forceinline__ uint32_t run_count(uint32_t run) { return run >> 20; }

__device__ __forceinline__ void plan_runs(const Args& p, uint32_t block, uint32_t (&runs)[MOST_RUNS]) {
    const auto run = [](uint32_t slice, uint32_t place, uint32_t count) { return slice | place << 8 | count << 20; };
    const Share share(p, block);
    runs[0] = run(QKV_UP, 0, (p.qkv_tiles - block + gridDim.x - 1) / gridDim.x);
    uint32_t n = 1, at = share.first_run(0, p.slices);
    const uint32_t end = share.first_run(1, p.slices);
    while (at < end) {
        const uint32_t slice = at / share.tiles, place = at - slice * share.tiles, count = min(share.tiles - place, end - at);
        runs[n++] = run(slice, place, count);
        at += count;
    }
    const uint32_t place = share.last_run(0, p.slices), count = share.last_run(1, p.slices) - place;
    if (count) runs[n++] = run(p.slices - 1, place, count);
    runs[n] = 0;
}
// Calls strip(tile, slice) for each strip of [down | dense] of the block.
template <typename Strip>
__device__ __forceinline__ void for_each_down_dense(const uint32_t (&runs)[MOST_RUNS], uint32_t block, Strip strip) {
#pragma unroll 1
    for (const uint32_t* run = runs + 1; *run; run++)
#pragma unroll 1
        for (uint32_t i = 0; i < run_count(*run); i++) strip((run_place(*run) + i) * 2 + block % 2, run_slice(*run));
}

// Stage `turn` of a group; the stages of a strip lie side by side.
__device__ __forceinline__ uint32_t stage_of(const Args& p, uint32_t turn, uint32_t group) { return turn * p.groups + group; }

// A bit a stage of a group: the parity of its next use, when the ring is about to reach `turn` at parity `phase`.
__device__ __forceinline__ uint32_t turn_phases(uint32_t turn, uint32_t phase) { return (phase ? ~0u : 0u) ^ ((1u << turn) - 1); }

}  // namespace
