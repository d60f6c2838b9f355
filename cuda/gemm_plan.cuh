// gemm_plan — which part of a product each block of gptq_gemm's sm_90a kernel computes.
//
// A tile is ROWS rows times some tokens, summed over all units of its K slice. One block a multiprocessor stays for the whole product:
//   whole   tiles dealt out in turn, one block a tile: block b has b, b + blocks, ...
//   shared  the tiles left over, where dealing would leave multiprocessors idle: their units, tile after tile, are one line that is cut
//           into equal parts, one a block. A tile that is cut belongs to the block with its first units, which adds the others' sums to
//           its own in the order of the units: same bits every run. The others compute that part first of their share, the owner last
//           of its own, so it seldom waits; and it waits for lower block numbers only, which were started before it.
// Tokens run fastest in the order of tiles: blocks at work at the same time share rows, and the tokens' activations stay in L2.
// A plan says how long it takes, which is how the size of the tiles is chosen.
#pragma once
#include <stdint.h>
#include "kernels.h"

// gptq_gemm on sm_90a, for a shape gptq_gemm has found right (gptq_gemm_wgmma.cu).
int32_t gptq_gemm_wgmma(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors);
// Multiprocessors of the current device if it can run that, else 0.
uint32_t gptq_gemm_wgmma_multiprocessors();

// Warpgroups of a block whose tiles have so many tokens: their sums, two units of weights and addresses must fit the registers.
constexpr uint32_t gemm_groups(uint32_t tokens) { return tokens <= 160 ? 3 : 2; }

struct GemmPlan {
    uint32_t groups, tokens;  // of a tile: groups x 64 rows
    uint32_t row_tiles, token_tiles, slices;
    uint32_t k_units, slice_units;  // of the matrix; of a K slice, the last may have fewer
    uint32_t whole, shared;         // tiles; shared is 0 when there are several slices
    uint32_t blocks;

    // Shared tiles need room for sums, which the caller may not have given.
    GemmPlan(const GptqMatmulParams& p, uint32_t groups, uint32_t tokens, uint32_t multiprocessors)
        : groups(groups), tokens(tokens), row_tiles((p.w.n + groups * 64 - 1) / (groups * 64)),
          token_tiles((p.tokens + tokens - 1) / tokens), slices(p.slices), k_units(p.w.k / PEREGRINE_UNIT_INPUTS) {
        constexpr uint32_t LEAST_UNITS = 4;      // of a block's share
        constexpr uint32_t EXCHANGE_UNITS = 10;  // that a block could multiply while sums go from some blocks to others
        slice_units = (k_units + slices - 1) / slices;
        const uint32_t tiles = row_tiles * token_tiles * slices, rounds = tiles / multiprocessors, rest = tiles % multiprocessors;
        whole = tiles;
        const uint32_t idle = rest ? multiprocessors - rest : 0;  // blocks in the last round of whole tiles
        if (p.split_sums && p.split_flags && slices == 1 && idle * k_units > EXCHANGE_UNITS * multiprocessors) {
            whole -= rest;
            // Of few tiles each would be cut into many parts, for one block to add up: cut a round more.
            if (rounds > 0 && rest * 8 < multiprocessors) whole -= multiprocessors;
            // Every block must get a part: owners wait for all that follow.
            if (whole > 0 && (tiles - whole) * k_units < LEAST_UNITS * multiprocessors) whole = tiles;
        }
        shared = tiles - whole;
        // Where every block has a whole tile, or the line is long enough, all multiprocessors get one.
        const uint32_t parts = whole ? whole : (shared * k_units + LEAST_UNITS - 1) / LEAST_UNITS;
        blocks = parts < multiprocessors ? parts : multiprocessors;
    }

    // Time on the H200, in cycles: within 4 % of most of what was measured, for choosing between tiles. A unit takes 2 a token and
    // warpgroup and some that tensor cores stand still; storing a tile, and giving and taking the sums of shared ones, go by tokens.
    uint32_t cycles() const {
        const uint32_t still = groups == 2 ? (tokens < 256 ? 40 : 20) : tokens < 112 ? 316 - tokens * 11 / 5 : 70;
        const uint32_t unit = groups * tokens * 2 + still, store = 1000 + tokens * 33;
        const uint32_t rounds = (whole + blocks - 1) / blocks;
        uint32_t all = 6600 + rounds * (slice_units * unit + store);
        if (shared) all += shared * k_units / blocks * unit + store + 3000 + tokens * 12 * (shared < blocks ? blocks : shared) / shared;
        return all;
    }

    // First unit of block b's part of the line.
    __host__ __device__ uint32_t share(uint32_t b) const { return (uint32_t)((uint64_t)shared * k_units * b / blocks); }
    // Whether block b's part begins within a tile, so that it gives the sums of that to the tile's owner.
    __host__ __device__ bool gives(uint32_t b) const { return share(b) % k_units != 0 && share(b) < share(b + 1); }
    // One more than the last block with a part of a shared tile.
    __host__ __device__ uint32_t shares_end(uint32_t tile) const {
        const uint64_t end = (uint64_t)(tile - whole + 1) * k_units;
        uint32_t b = (uint32_t)(end * blocks / ((uint64_t)shared * k_units));
        while (b > 0 && share(b - 1) >= end) b--;
        while (b < blocks && share(b) < end) b++;
        return b;
    }
};

// A run of units of one tile.
struct GemmSegment {
    uint32_t tile, begin, end;  // units
    bool owner;                 // holds the tile's first unit: stores the tile
    bool complete;              // holds its last unit too
};

// The segments of a block, in order. `share_index` counts blocks backwards, so that owners wait for lower block numbers.
class GemmWalk {
    const GemmPlan& plan;
    uint32_t tile, at, stop;

public:
    __device__ __forceinline__ GemmWalk(const GemmPlan& plan, uint32_t share_index)
        : plan(plan), tile(blockIdx.x), at(plan.share(share_index)), stop(plan.share(share_index + 1)) {}

    __device__ __forceinline__ bool next(GemmSegment& s) {
        if (tile < plan.whole) {
            const uint32_t slice = tile / (plan.row_tiles * plan.token_tiles);
            s.tile = tile;
            s.begin = slice * plan.slice_units;
            s.end = min(s.begin + plan.slice_units, plan.k_units);
            s.owner = s.complete = true;
            tile += plan.blocks;
            return true;
        }
        if (at == stop) return false;
        s.tile = plan.whole + at / plan.k_units;
        s.begin = at % plan.k_units;
        s.end = min(plan.k_units, s.begin + stop - at);
        s.owner = s.begin == 0;
        s.complete = s.end == plan.k_units;
        at += s.end - s.begin;
        return true;
    }
};
