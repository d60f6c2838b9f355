// table_pack — f16 units to packed units (packed.cuh), or word that some value has too many bits.   Reference: src/repack.rs::table_pack
// Mapping  one warp a unit; lane l packs the four A registers of each step into three words. Runs once a table, at load.
// Cost     1034 MB for Falcon-7B; not measured apart: all repacking of a load takes 8 ms.
#include "launch.cuh"
#include "packed.cuh"

namespace {

constexpr int WARPS = 8;

__global__ void __launch_bounds__(WARPS * 32) table_pack_kernel(const __grid_constant__ TablePackParams p) {
    wait_previous();
    const uint32_t lane = threadIdx.x % 32, u = blockIdx.x * WARPS + threadIdx.x / 32;
    if (u >= p.count) return;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(p.units) + (size_t)u * TABLE_UNIT_BYTES + lane * 16;
    uint32_t words[PACKED_WORDS][STEPS];
    bool fits = true;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + s * 512);
        const uint32_t a[4] = {v.x, v.y, v.z, v.w};
        uint32_t w[PACKED_WORDS];
        fits &= pack_table(a, w);
#pragma unroll
        for (int j = 0; j < PACKED_WORDS; j++) words[j][s] = w[j];
    }
    uint8_t* to = reinterpret_cast<uint8_t*>(p.packed) + (size_t)u * PACKED_UNIT_BYTES + lane * 16;
#pragma unroll
    for (int j = 0; j < PACKED_WORDS; j++)
        *reinterpret_cast<uint4*>(to + j * 512) = make_uint4(words[j][0], words[j][1], words[j][2], words[j][3]);
    if (!fits) *p.misfit = 1;
}

}  // namespace

extern "C" int32_t table_pack(const TablePackParams* p, const Launch* l) {
    if (p->count == 0) return PEREGRINE_BAD_SHAPE;
    return launch(table_pack_kernel, dim3((p->count + WARPS - 1) / WARPS), WARPS * 32, 0, l, *p);
}
