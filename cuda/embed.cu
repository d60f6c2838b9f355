// embed — x[m] = row token[m].id of the embedding, f32.   Reference: src/reference.rs::embed
// Reads one row of 9 KB a token out of the head's f16 units: 4 bytes in every 64, 72 KB of sectors; nothing beside 111 MB a layer.
// Mapping  one block a token; a thread fetches one pair of neighbouring inputs at a time.
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int THREADS = 512;

__global__ void __launch_bounds__(THREADS) embed_kernel(const __grid_constant__ EmbedParams p) {
    overlap_next();
    wait_previous();
    const uint32_t m = blockIdx.x;
    const uint32_t id = p.token[m].id < p.vocab ? p.token[m].id : 0;
    const uint32_t k_units = p.hidden / UNIT_INPUTS;
    const uint8_t* tile = reinterpret_cast<const uint8_t*>(p.units) + (size_t)(id / UNIT_ROWS) * k_units * TABLE_UNIT_BYTES;
    const uint32_t g = id % 8, high_row = id % UNIT_ROWS / 8;
    for (uint32_t pair = threadIdx.x; pair < p.hidden / 2; pair += THREADS) {
        // Input k = 2 pair: unit, k16 step, half of the step (register a2/a3), q. See units.cuh.
        const uint32_t u = pair / 32, s = pair / 8 % 4, high_k = pair / 4 % 2, q = pair % 4;
        const uint8_t* at = tile + (size_t)u * TABLE_UNIT_BYTES + s * 512 + (g * 4 + q) * 16 + (high_k * 2 + high_row) * 4;
        const float2 v = __half22float2(*reinterpret_cast<const __half2*>(at));
        *reinterpret_cast<float2*>(p.x + (size_t)m * p.hidden + pair * 2) = v;
    }
}

}  // namespace

extern "C" int32_t embed(const EmbedParams* p, const Launch* l) {
    if (p->tokens == 0 || p->hidden % UNIT_INPUTS || p->vocab == 0 || p->vocab % UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    return launch(embed_kernel, dim3(p->tokens), THREADS, 0, l, *p);
}
