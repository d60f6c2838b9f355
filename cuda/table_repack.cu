// table_repack — a row-major f16 table (embedding, head) to f16 units.   Reference: src/repack.rs::table_repack
// One table of 591 MB serves embedding and head, so it is stored once, in the order the head's tensor cores want it. table_pack makes it
// 443 MB, where its values allow that.
// Mapping  one warp = one unit; lane l writes the four A registers of each k16 step, 16 bytes apart by 512.
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int WARPS = 8;

__global__ void __launch_bounds__(WARPS * 32) table_repack_kernel(const __grid_constant__ TableRepackParams p) {
    wait_previous();
    const uint32_t k_units = p.k / UNIT_INPUTS;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint32_t tile = blockIdx.y, u = blockIdx.x * WARPS + threadIdx.x / 32;
    if (u >= k_units) return;
    uint8_t* unit = reinterpret_cast<uint8_t*>(p.units) + ((size_t)(p.row0 / UNIT_ROWS + tile) * k_units + u) * TABLE_UNIT_BYTES;
    const uint16_t* low = p.table + (size_t)(tile * UNIT_ROWS + g) * p.k + u * UNIT_INPUTS + 2 * q;
    const uint16_t* high = low + (size_t)8 * p.k;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const uint32_t a0 = *reinterpret_cast<const uint32_t*>(low + s * 16), a2 = *reinterpret_cast<const uint32_t*>(low + s * 16 + 8);
        const uint32_t a1 = *reinterpret_cast<const uint32_t*>(high + s * 16), a3 = *reinterpret_cast<const uint32_t*>(high + s * 16 + 8);
        *reinterpret_cast<uint4*>(unit + s * 512 + lane * 16) = make_uint4(a0, a1, a2, a3);
    }
}

}  // namespace

extern "C" int32_t table_repack(const TableRepackParams* p, const Launch* l) {
    if (p->rows == 0 || p->rows % UNIT_ROWS || p->row0 % UNIT_ROWS || p->k == 0 || p->k % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    const dim3 grid((p->k / UNIT_INPUTS + WARPS - 1) / WARPS, p->rows / UNIT_ROWS);
    return launch(table_repack_kernel, grid, WARPS * 32, 0, l, *p);
}
