// embed — x[m] = row token[m].id of the embedding, f32.   Reference: src/reference.rs::embed
// Reads one row of 9 KB a token out of the head's units: 4 bytes in every 64, 72 KB of sectors; nothing beside 111 MB a layer.
// Overlap  the kernel behind it begins when the one in front of it is complete.
// Mapping  one block a token; a thread fetches one pair of neighbouring inputs at a time.
#include "launch.cuh"
#include "table.cuh"

namespace {

constexpr int THREADS = 512;

__global__ void __launch_bounds__(THREADS) embed_kernel(const __grid_constant__ EmbedParams p) {
    // In this order, so that whatever begins behind this kernel begins when all before it is complete: attn_decode rests on that.
    wait_previous();
    overlap_next();
    const uint32_t m = blockIdx.x;
    const uint32_t id = p.token[m].id < p.vocab ? p.token[m].id : 0;
    const uint8_t* units = reinterpret_cast<const uint8_t*>(p.units);
    for (uint32_t pair = threadIdx.x; pair < p.hidden / 2; pair += THREADS)
        *reinterpret_cast<float2*>(p.x + (size_t)m * p.hidden + pair * 2) = table_pair(units, p.packed, id, pair, p.hidden);
}

}  // namespace

extern "C" int32_t embed(const EmbedParams* p, const Launch* l) {
    if (p->tokens == 0 || p->hidden % UNIT_INPUTS || p->vocab == 0 || p->vocab % UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    return launch(embed_kernel, dim3(p->tokens), THREADS, 0, l, *p);
}
