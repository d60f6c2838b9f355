// near — a matrix once more for gptq_batch: what its blocks read, in the order in which they read it, from their side of L2.
//
// A stage of a row tile, NEAR_UNITS units of 544 to 640 bytes, is one piece of 4 KB (sides.cuh) and one bulk copy. Even parts (Deal) are
// stream 0, which lies on side 0, odd ones stream 1; within a stream, with room for MOST_GROUPS groups of row tiles a part
//
//     part       |0                                           |2
//     slice      |0                       |1                  |0
//     stage      |0         |1         |..|0         |1       |
//     row tile   |0 1 ..  11|0 1 ..  11|  |0 1 ..  11|0 ..    |
//
// so that a block's next stage is what follows in its stream. Which share a block has it learns when it runs (claims.cuh).
//
// Cost     4.95 GB for the 3.55 GB of Falcon-7B's matrices, of which blocks read those 3.55.
// Why      reads of the near side take 1 to 2.5 pJ a bit less (sides.cuh), where steps of 16 and more texts run against the power limit, and
//          keep the link between the sides free. Measured: gptq_batch_wgmma.cu, Log and Start.
// Tried    a stage of all blocks side by side, then the next stage: 1.133, 1.298, 1.871 for 1.137, 1.305, 1.897 (16, 32, 64 texts, fastest
//          tenths), medians the same. Parts of two groups without room for a third, 4.5 GB: more instructions before a block's first copy.
#pragma once
#include "batch_share.cuh"
#include "claims.cuh"

constexpr uint32_t NEAR_UNITS = 6;  // of a stage
constexpr uint32_t NEAR_TILES = MOST_GROUPS * GROUP_TILES;

struct NearShare {
    uint32_t side, part, slice, warps;
    uint32_t piece;  // the first, in the stream of that side
};

struct Near {
    const uint8_t* base = nullptr;  // NULL: none
    uint32_t sides, slices, stages, parts, each, more, stage_bytes;
    uint64_t reciprocal;

    __host__ __device__ Near() {}
    Near(const GptqMatrix& w, const Slices& s, const Deal& d)
        : base(w.near), sides(w.sides), slices(s.count), stages((max(s.units, s.last_units) + NEAR_UNITS - 1) / NEAR_UNITS), parts(d.parts),
          each(d.each), more(d.more),
          stage_bytes(NEAR_UNITS * (UNIT_CODE_BYTES + UNIT_SCALE_BYTES * w.scales_per_row * (1 + w.has_zeros))), reciprocal(d.reciprocal) {}

    __host__ __device__ __forceinline__ uint32_t shares(uint32_t side) const { return (parts + 1 - side) / 2 * slices; }
    // Of both streams, each as long as the longer one.
    uint32_t pieces() const { return 2 * shares(0) * stages * NEAR_TILES; }
    __device__ __forceinline__ NearShare share(uint32_t side, uint32_t number) const {
        const uint32_t pair = (uint32_t)(number * reciprocal >> 32), part = pair * 2 + side;
        return {side, part, number - pair * slices, (each + (part < more)) * GROUP_TILES, number * stages * NEAR_TILES};
    }
    __device__ __forceinline__ const uint8_t* piece(uint32_t stream, uint32_t n) const {
        return base + (n * 2 + second_of_pair(sides, stream, n)) * (size_t)PIECE_BYTES;
    }
    // By a whole warp: the first stages of one share into L2, whichever block will have that.
    __device__ __forceinline__ void bring(uint32_t count) const {
        const uint32_t side = blockIdx.x % 2, number = blockIdx.x / 2, lane = threadIdx.x % 32;
        if (number >= shares(side)) return;
        const NearShare s = share(side, number);
        if (lane >= s.warps) return;
        for (uint32_t j = 0; j < min(count, stages); j++)
            prefetch_bulk(piece(side, s.piece + j * NEAR_TILES + lane), stage_bytes);
    }
};
