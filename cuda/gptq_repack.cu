// gptq_repack — AutoGPTQ's qweight, qzeros, scales to units.   Reference: src/repack.rs::gptq_repack
// Runs once a matrix at load. Several matrices may share one destination: [qkv ; up] by rows, [down | dense] by inputs.
// Reads    qweight [k / 8, n] (eight inputs a word, lowest nibble = lowest input), scales [groups, n], qzeros [groups, n / 8].
// Mapping  one warp = one unit, lane l writes its own 16 bytes; the eight g of a quad read neighbouring words. Each word is
//          fetched up to eight times, mostly from L1 and L2. Its time is small beside the upload's and was not measured apart.
// Act-order: input i of the destination is input source_input[i] of the file; the activations are permuted likewise (permute.cu).
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int WARPS = 8;

__device__ __forceinline__ uint32_t code_of(const GptqRepackParams& p, uint32_t row, uint32_t input) {
    const uint32_t k = p.source_input ? min(p.source_input[input], p.k - 1) : input;
    return p.qweight[(size_t)(k / 8) * p.n + row] >> (4 * (k % 8)) & 15;
}

__global__ void __launch_bounds__(WARPS * 32) gptq_repack_kernel(const __grid_constant__ GptqRepackParams p) {
    wait_previous();
    const uint32_t bytes = UNIT_CODE_BYTES + UNIT_SCALE_BYTES * p.scales_per_row * (1 + p.has_zeros);
    const uint32_t k_units = p.k / UNIT_INPUTS, matrix_units = p.matrix_k / UNIT_INPUTS;
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint32_t tile = blockIdx.y, u = blockIdx.x * WARPS + threadIdx.x / 32;
    if (u >= k_units) return;
    uint8_t* unit = p.units + ((size_t)(p.row0 / UNIT_ROWS + tile) * matrix_units + p.input0 / UNIT_INPUTS + u) * bytes;
    const uint32_t row = tile * UNIT_ROWS + g;

    uint32_t words[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const uint32_t k = u * UNIT_INPUTS + s * 16 + 2 * q;
        // The nibbles of units.cuh, from the lowest: inputs 2q, 2q + 8 in the low half word, the same plus 1 in the high one.
        uint32_t w = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t input = k + (i & 2 ? 8 : 0) + (i & 4 ? 1 : 0);
            w |= code_of(p, row + (i & 1 ? 8 : 0), input) << (4 * i);
        }
        words[s] = w;
    }
    *reinterpret_cast<uint4*>(unit + lane * 16) = make_uint4(words[0], words[1], words[2], words[3]);

    // Lane 8 h + g' writes the scale (and zero point) pair of rows g', g' + 8 and half h of the inputs.
    const uint32_t half = lane / 8, r = lane % 8;
    if (half >= p.scales_per_row) return;
    const uint32_t group = min(p.group[u * 2 + half], p.groups - 1);  // with one scale a row both halves have the same group
    uint16_t* scale = reinterpret_cast<uint16_t*>(unit + UNIT_CODE_BYTES + half * UNIT_SCALE_BYTES) + r * 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t n = tile * UNIT_ROWS + r + i * 8;
        scale[i] = p.scales[(size_t)group * p.n + n];
        if (p.has_zeros) {
            const uint32_t stored = p.qzeros[(size_t)group * (p.n / 8) + n / 8] >> (4 * (n % 8)) & 15;
            const uint32_t zero = (stored + p.zero_offset) & 15;  // masked as AutoGPTQ's kernels do
            scale[i + p.scales_per_row * UNIT_SCALE_BYTES / 2] = __half_as_ushort(__uint2half_rn(zero));
        }
    }
}

}  // namespace

extern "C" int32_t gptq_repack(const GptqRepackParams* p, const Launch* l) {
    if (p->n == 0 || p->n % UNIT_ROWS || p->k == 0 || p->k % UNIT_INPUTS || p->matrix_k % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    if (p->row0 % UNIT_ROWS || p->input0 % UNIT_INPUTS || p->input0 + p->k > p->matrix_k) return PEREGRINE_BAD_SHAPE;
    if (p->groups == 0 || (p->scales_per_row != 1 && p->scales_per_row != 2)) return PEREGRINE_BAD_SHAPE;
    if (p->has_zeros && !p->qzeros) return PEREGRINE_BAD_SHAPE;
    const dim3 grid((p->k / UNIT_INPUTS + WARPS - 1) / WARPS, p->n / UNIT_ROWS);
    return launch(gptq_repack_kernel, grid, WARPS * 32, 0, l, *p);
}
