// gptq_near — a matrix once more for gptq_batch, by the sides of L2 (near.cuh draws the order).   Reference: gptq_batch of plain units
// Shapes   those for which gptq_batch runs its sm_90a kernel, of NEAR_UNITS units a slice at least.
// Mapping  a block moves a stage of a row tile.
// Cost     reads and writes the matrix once, when there are more than 8 texts for the first time.
#include "launch.cuh"
#include "near.cuh"

// gptq_batch_wgmma.cu
uint32_t gptq_batch_wgmma_multiprocessors();

namespace {

constexpr uint32_t THREADS = 128;

struct NearParams {
    GptqMatrix w;
    uint8_t* to;
    Slices slices;
    Deal deal;
    Near near;
    uint32_t unit_bytes;
};

__global__ void __launch_bounds__(THREADS) gptq_near_kernel(const __grid_constant__ NearParams p) {
    wait_previous();
    const uint32_t side = blockIdx.x % 2, stage = blockIdx.y, lane = blockIdx.z;
    if (blockIdx.x / 2 >= p.near.shares(side)) return;
    const NearShare at = p.near.share(side, blockIdx.x / 2);
    const Share<NEAR_UNITS> s(Dealt(at.part, at.slice), p.slices, p.deal);
    const uint32_t tile = s.group * GROUP_TILES + lane;
    if (stage >= s.stages() || lane >= s.warps() || tile >= p.w.n / UNIT_ROWS) return;
    const uint8_t* from = p.w.units + ((size_t)tile * (p.w.k / UNIT_INPUTS) + s.unit(stage)) * p.unit_bytes;
    uint8_t* to = p.to + (p.near.piece(side, at.piece + stage * NEAR_TILES + lane) - p.near.base);
    const uint32_t bytes = min(NEAR_UNITS, s.count - stage * NEAR_UNITS) * p.unit_bytes;
    for (uint32_t i = threadIdx.x * 16; i < bytes; i += THREADS * 16)
        *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
}

NearParams params(GptqMatrix w, uint32_t slices, uint8_t* to, uint32_t sides, uint32_t multiprocessors) {
    w.near = to, w.sides = sides;
    const Slices cut(w, slices, NEAR_UNITS);
    const Deal deal(w, slices, multiprocessors);
    const uint32_t unit_bytes = UNIT_CODE_BYTES + UNIT_SCALE_BYTES * w.scales_per_row * (1 + w.has_zeros);
    return {w, to, cut, deal, Near(w, cut, deal), unit_bytes};
}

}  // namespace

extern "C" uint32_t gptq_near_pieces(const GptqMatrix* w, uint32_t slices) {
    const uint32_t multiprocessors = gptq_batch_wgmma_multiprocessors();
    if (!multiprocessors || !slices || w->n < UNIT_ROWS || w->k / UNIT_INPUTS < slices) return 0;
    const NearParams p = params(*w, slices, nullptr, 0, multiprocessors);
    if (min(p.slices.units, p.slices.last_units) < NEAR_UNITS || p.near.stage_bytes > PIECE_BYTES) return 0;
    return p.near.pieces() <= 2 * MOST_PIECES ? p.near.pieces() : 0;
}

extern "C" int32_t gptq_near(const GptqNearParams* p, const Launch* l) {
    if (!gptq_near_pieces(&p->w, p->slices)) return PEREGRINE_BAD_SHAPE;
    const NearParams g = params(p->w, p->slices, p->to, p->sides, gptq_batch_wgmma_multiprocessors());
    return launch(gptq_near_kernel, dim3(2 * g.near.shares(0), g.near.stages, NEAR_TILES), THREADS, 0, l, g);
}
