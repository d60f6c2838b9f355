// head_near — the table once more for head of more than 8 tokens: what its blocks read, in the order in which they read it, from their side
// of L2.
//
// A slot is one unit (packed: two) of each row tile. Those of a group of four row tiles are whole pieces of 4 KB (sides.cuh): two (packed:
// three), a bulk copy each. Row tiles of even number are stream 0, which lies on side 0, odd ones stream 1. A stream is cut into shares as
// even as can be, of row tiles that follow one another in it; with room for the largest share, or for full chunks of eight groups, it is
//
//     share      |0                                                  |1
//     chunk      |0                                 |1 (if any) ..   |
//     slot       |0              |1              |..|                |
//     group      |0  1  ..  7    |0  1  ..  7    |  |
//     piece      |0 1 2|0 1 2|.. |
//
// Which share a block has it learns when it runs (claims.cuh).
// Cost     467 MB for Falcon-7B's packed table of 443 MB.
#pragma once
#include "claims.cuh"
#include "packed.cuh"

constexpr uint32_t HEAD_GROUP = 4;    // row tiles of a group, one a warp of a warpgroup
constexpr uint32_t HEAD_GROUPS = 8;   // of a chunk
constexpr uint32_t HEAD_CHUNK = HEAD_GROUP * HEAD_GROUPS;

// Units of a row tile in a slot, and bytes and pieces of a group's.
__host__ __device__ constexpr uint32_t head_slot_units(bool packed) { return packed ? 2 : 1; }
__host__ __device__ constexpr uint32_t head_slot_bytes(bool packed) { return head_slot_units(packed) * table_unit_bytes(packed); }
__host__ __device__ constexpr uint32_t head_pieces(bool packed) { return HEAD_GROUP * head_slot_bytes(packed) / PIECE_BYTES; }
static_assert(HEAD_GROUP * head_slot_bytes(true) % PIECE_BYTES == 0, "whole pieces");
static_assert(HEAD_GROUP * head_slot_bytes(false) % PIECE_BYTES == 0, "whole pieces");

struct HeadNear {
    const uint8_t* base;  // NULL: none
    uint32_t sides, all, blocks, chunks, groups, slots, pieces;

    HeadNear(const uint8_t* base, uint32_t sides, uint32_t vocab, uint32_t hidden, bool packed, uint32_t multiprocessors)
        : base(base), sides(sides), all(vocab / UNIT_ROWS), blocks(min(multiprocessors, all)), pieces(head_pieces(packed)) {
        slots = (hidden / UNIT_INPUTS + head_slot_units(packed) - 1) / head_slot_units(packed);
        const uint32_t least = max(shares(1), 1u), most = ((all + 1) / 2 + least - 1) / least;  // row tiles of a share at most
        chunks = (most + HEAD_CHUNK - 1) / HEAD_CHUNK, groups = chunks > 1 ? HEAD_GROUPS : (most + HEAD_GROUP - 1) / HEAD_GROUP;
    }
    __host__ __device__ __forceinline__ uint32_t shares(uint32_t side) const { return (blocks + 1 - side) / 2; }
    // The first row tile of a share, among those of its side.
    __host__ __device__ __forceinline__ uint32_t first(uint32_t side, uint32_t number) const {
        return number * ((all + 1 - side) / 2) / shares(side);
    }
    // Pieces of both streams, each as long as the longer one.
    uint32_t count() const { return 2 * shares(0) * chunks * slots * groups * pieces; }
    // Where piece `piece` of a group's slot is.
    __device__ __forceinline__ const uint8_t* at(uint32_t side, uint32_t number, uint32_t chunk, uint32_t slot, uint32_t group,
                                                 uint32_t piece) const {
        const uint32_t n = (((number * chunks + chunk) * slots + slot) * groups + group) * pieces + piece;
        return base + (n * 2 + second_of_pair(sides, side, n)) * (size_t)PIECE_BYTES;
    }
};
