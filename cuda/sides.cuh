// sides — how decode_step's weights lie in memory: on the side of L2 whose multiprocessors read them.
//
// Hopper's L2 has two sides, and each multiprocessor is at one of them. What is on the other side comes over a link between them, which
// carries 2.46 TB/s of the 4.7 that memory gives: with half of all reads from the other side it is nearly full, and everybody waits in
// line. The side changes from one piece of 4 KB to the next, by a parity of address bits (src/gpu/sides.rs finds which).
//
// So a matrix is two streams of bytes that share its memory by pieces: even row tiles, one behind the other, are stream 0, odd ones
// stream 1. Of pieces 2 p and 2 p + 1 one is piece p of stream 0 and the other of stream 1, by the parity of bits `sides` of the pair's
// offset. In a buffer that `DevBuf::on_sides` made, stream s is on side s.
//
//     pieces of 4 KB         | 0   1 | 2   3 | 4   5 | 6   7 | ...
//     parity of the pair         0       1       1       0
//     stream and its piece   |0.0 1.0|1.1 0.1|1.2 0.2|0.3 1.3|       two pieces of a stream may be neighbours: 1.0 and 1.1, 0.2 and 0.3
//
// Measured (H200, 132 blocks that do nothing but stream, two copies of 12 KB in three rings each, random bytes; power is the board's)
//                                       TB/s   W           pJ a bit
//          12 KB, wherever they lie     4.36   627, 639    18.0, 18.3
//          pieces, wherever they lie    4.29   654, 660    19.1, 19.2
//          pieces of the near side      4.51   602, 564    16.7, 15.6
//          pieces of the far side       2.46   496, 479    25.2, 24.3
// Tried    This order for the kernels of other batch sizes too: a copy of their stages, 1 to 3 KB a row tile, is then two copies more often
//          than not, and the copy engine takes as long for each: 16, 32, 64 texts 1.53, 1.89, 2.60 ms with blocks at the side of their row
//          tiles (a number of their side's half taken by an atomic), 1.58, 1.91, 2.65 with blocks anywhere, where plain units take 1.40,
//          1.75, 2.34; a prompt of 128 tokens 4.2 ms for 3.2. So decode_step has a copy of its own.
//          gptq_batch's own order (near.cuh) for decode_step: 0.944 for 0.934, 4 tokens 0.991 for 0.977, 8 the same.
#pragma once
#include "kernels.h"

constexpr uint32_t PIECE_BYTES = PEREGRINE_PIECE_BYTES;
constexpr uint32_t MOST_PIECES = 1u << 18;  // of a stream: offsets have 32 bits

// Whether piece `piece` of stream `stream` is the second of its pair.
__device__ __forceinline__ uint32_t second_of_pair(uint32_t sides, uint32_t stream, uint32_t piece) {
    return (__popc(piece * (2 * PIECE_BYTES) & sides) + stream) % 2;
}
// Byte `offset` of stream `stream` of the matrix at `base`. What follows it in the stream follows it in memory up to the piece's end.
__device__ __forceinline__ uint8_t* on_side(uint8_t* base, uint32_t sides, uint32_t stream, uint32_t offset) {
    const uint32_t piece = offset / PIECE_BYTES;
    return base + (piece * 2 + second_of_pair(sides, stream, piece)) * (size_t)PIECE_BYTES + offset % PIECE_BYTES;
}
// The stream of a row tile, and where it begins there, in row tiles.
__device__ __forceinline__ uint32_t stream_of(uint32_t tile) { return tile % 2; }
__device__ __forceinline__ uint32_t place_of(uint32_t tile) { return tile / 2; }
