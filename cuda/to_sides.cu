// to_sides — a matrix in units once more, by the sides of L2 (sides.cuh draws the order).   Reference: src/repack.rs::to_sides
// Shapes   any row tiles of a multiple of 16 bytes: 4-bit units, tables.
// Mapping  a thread moves 16 bytes, which never lie in two pieces; a block has a run of a row tile.
// Cost     reads and writes the matrix once: 7.9 GB for Falcon-7B, at load.
#include "launch.cuh"
#include "sides.cuh"

namespace {

constexpr uint32_t THREADS = 256;

__global__ void __launch_bounds__(THREADS) to_sides_kernel(const __grid_constant__ ToSidesParams p) {
    wait_previous();
    const uint32_t tile = blockIdx.y, at = (blockIdx.x * THREADS + threadIdx.x) * 16;
    if (at >= p.tile_bytes) return;
    const uint4 v = *reinterpret_cast<const uint4*>(p.units + (size_t)tile * p.tile_bytes + at);
    *reinterpret_cast<uint4*>(on_side(p.to, p.sides, stream_of(tile), place_of(tile) * p.tile_bytes + at)) = v;
}

}  // namespace

extern "C" int32_t to_sides(const ToSidesParams* p, const Launch* l) {
    if (p->tiles == 0 || p->tiles > 65535 || p->tile_bytes == 0 || p->tile_bytes % 16) return PEREGRINE_BAD_SHAPE;
    const uint64_t stream = (uint64_t)((p->tiles + 1) / 2) * p->tile_bytes;
    if (stream > (1u << 31) - PIECE_BYTES) return PEREGRINE_BAD_SHAPE;  // offsets have 32 bits
    const dim3 grid((p->tile_bytes / 16 + THREADS - 1) / THREADS, p->tiles);
    return launch(to_sides_kernel, grid, THREADS, 0, l, *p);
}
