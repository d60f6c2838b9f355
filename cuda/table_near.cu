// table_near — a table once more for head, by the sides of L2 (head_near.cuh draws the order).   Reference: head of plain units
// Shapes   those for which head runs its sm_90a kernel, in more than one block.
// Mapping  a block moves a piece.
// Cost     reads and writes the table once, when there are more than 8 texts for the first time.
#include "head_near.cuh"
#include "launch.cuh"

// head_wgmma.cu
uint32_t head_wgmma_multiprocessors();

namespace {

constexpr uint32_t THREADS = 256;  // 16 bytes each
static_assert(THREADS * 16 == PIECE_BYTES, "a piece a block");

struct NearParams {
    TableNearParams p;
    HeadNear near;
};

__global__ void __launch_bounds__(THREADS) table_near_kernel(const __grid_constant__ NearParams g) {
    wait_previous();
    const TableNearParams& p = g.p;
    const uint32_t side = blockIdx.z % 2, number = blockIdx.z / 2, slot = blockIdx.y % g.near.slots, chunk = blockIdx.y / g.near.slots;
    if (number >= g.near.shares(side)) return;
    const uint32_t group = blockIdx.x / g.near.pieces, piece = blockIdx.x % g.near.pieces, at = piece * PIECE_BYTES + threadIdx.x * 16;
    const uint32_t slot_bytes = head_slot_bytes(p.packed), unit_bytes = table_unit_bytes(p.packed), units = p.hidden / UNIT_INPUTS;
    const uint32_t place = g.near.first(side, number) + chunk * HEAD_CHUNK + group * HEAD_GROUP + at / slot_bytes;
    const uint32_t unit = slot * head_slot_units(p.packed) + at % slot_bytes / unit_bytes;
    if (place >= g.near.first(side, number + 1) || unit >= units) return;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(p.units) + ((size_t)(place * 2 + side) * units + unit) * unit_bytes;
    uint8_t* to = p.to + (g.near.at(side, number, chunk, slot, group, piece) - g.near.base) + threadIdx.x * 16;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from + at % unit_bytes);
}

HeadNear order(const TableNearParams* p) {
    return HeadNear(p->to, p->sides, p->vocab, p->hidden, p->packed, head_wgmma_multiprocessors());
}

}  // namespace

extern "C" uint32_t table_near_pieces(const TableNearParams* p) {
    if (head_wgmma_multiprocessors() < 2 || p->vocab < 2 * UNIT_ROWS || p->hidden < UNIT_INPUTS) return 0;
    const uint32_t count = order(p).count();
    return count <= 2 * MOST_PIECES ? count : 0;
}

extern "C" int32_t table_near(const TableNearParams* p, const Launch* l) {
    if (!table_near_pieces(p)) return PEREGRINE_BAD_SHAPE;
    const NearParams g = {*p, order(p)};
    const dim3 grid(g.near.groups * g.near.pieces, g.near.chunks * g.near.slots, 2 * g.near.shares(0));
    return launch(table_near_kernel, grid, THREADS, 0, l, g);
}
