// gptq_batch — y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units, 1 to 72 tokens.   Reference: src/reference.rs::gptq_matmul
// Shapes   as gptq_gemv; tokens 1..72, made for 9..72 (16, 32, 64 or 72 columns). On sm_90a gptq_batch_wgmma.cu does the work instead.
// Reads    W once, x once an SM, through L2.   Writes see GptqOutput.
// Mapping  one block an SM keeps to one K slice and to 10 or 11 row tiles, so that no last wave is ragged: the sums of its rows for all
//          tokens are accumulators, one row tile a warp, for the whole slice (batch.cuh). They are stored through shared memory, so that
//          rows lie side by side.
// Numbers  as gptq_gemm: exact f16 integers code - zero, 64 (32) inputs summed by the tensor core, then acc += scale * chain in f32.
// Measured by wgmma on an H200, before gptq_batch_wgmma.cu: [qkv ; up] 22.1, 25.9, 36.9 us at 16, 32, 64 tokens. This form of it, by
//          mma.sync: unmeasured.
// Tried    all warps copy, a barrier for all a stage: 29, 34, 45 us ([qkv ; up]). Two groups of 12 warps that share the units of a stage:
//          22.9, 27.6 us at 16, 32 tokens. Stages of 2 units: 25.7, 29.2, 38.9 us.
// Spills   4 to 36 bytes on sm_80: group size 32 with more than 32 tokens, 72 tokens.
#include "batch.cuh"
#include "ready.cuh"

// gptq_batch_wgmma.cu
uint32_t gptq_batch_wgmma_multiprocessors();
int32_t gptq_batch_wgmma(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors);

namespace {

template <class Weights, int TOKENS>
using GptqShape = BatchShape<Weights, TOKENS, 4, false>;

// Floats between two tokens in the block's sums: 4 banks on from token to token, so that a warp's fragments hit each bank once.
constexpr int SUM_STRIDE = BATCH_WARPS * UNIT_ROWS + 4;

template <int TOKENS>
__device__ __forceinline__ void store_sums(const GptqMatmulParams& p, uint32_t slice, uint32_t tile, uint32_t end,
                                           const float (&acc)[TOKENS / 8][4]) {
    extern __shared__ __align__(1024) uint8_t smem[];
    float* sums = reinterpret_cast<float*>(smem);  // [TOKENS][SUM_STRIDE]
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();  // every warp has left the ring
    if (warp < BATCH_WARPS) {
        float* mine = sums + warp * UNIT_ROWS + lane / 4;
#pragma unroll
        for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) mine[(n * 8 + lane % 4 * 2 + e % 2) * SUM_STRIDE + e / 2 * 8] = acc[n][e];
    }
    __syncthreads();
    const uint32_t rows = (end - tile) * UNIT_ROWS;
    for (uint32_t m = warp; m < p.tokens; m += BATCH_THREADS / 32)
#pragma unroll 2
        for (uint32_t r = lane; r < rows; r += 32)
            store_output(p.y, p.w.n, p.tokens, slice, m, tile * UNIT_ROWS + r, sums[m * SUM_STRIDE + r]);
    if (p.announce && tile * UNIT_ROWS < p.y.split_row) {
        __syncthreads();
        if (threadIdx.x == 0) ready_count(p.announce, min(end, p.y.split_row / UNIT_ROWS) - tile);
    }
}

template <class Shape, int STAGES>
__global__ void __launch_bounds__(BATCH_THREADS, 1) gptq_batch_kernel(const __grid_constant__ GptqMatmulParams p) {
#if !PEREGRINE_WGMMA
    const uint32_t tiles = p.w.n / UNIT_ROWS, k_units = p.w.k / UNIT_INPUTS;
    const uint32_t slice_units = (k_units + p.slices - 1) / p.slices, slice = blockIdx.x % p.slices;
    const uint32_t part = blockIdx.x / p.slices, parts = gridDim.x / p.slices;
    const BatchSpan span = {p.w.units, p.x, k_units, p.x_stride, p.tokens, slice * slice_units,
                            min(slice_units, k_units - slice * slice_units), part * tiles / parts, (part + 1) * tiles / parts};
    multiply_batch<Shape, STAGES>(span, [&](uint32_t tile, uint32_t end, const float(&acc)[Shape::TOKENS / 8][4]) {
        store_sums<Shape::TOKENS>(p, slice, tile, end, acc);
    });
    if (threadIdx.x == 0) ready_leave(p.ready);
#endif
}

template <class Shape, int SHARED>
int32_t launch_shape(const GptqMatmulParams* p, const Launch* l, const BatchDevice& device) {
    constexpr int STAGES = batch_stages<Shape>(SHARED);
    static_assert(STAGES >= 2, "one stage to work on, one that is being filled");
    static_assert(Shape::TOKENS * SUM_STRIDE * sizeof(float) <= STAGES * Shape::STAGE_BYTES, "the ring has room for the sums");
    const uint32_t tiles = p->w.n / UNIT_ROWS, least = (tiles + BATCH_WARPS - 1) / BATCH_WARPS;
    const uint32_t parts = max(min((uint32_t)device.multiprocessors / p->slices, tiles), least);
    return launch(gptq_batch_kernel<Shape, STAGES>, dim3(parts * p->slices), BATCH_THREADS, ring_bytes<Shape, STAGES>, l, *p);
}

template <class Shape>
int32_t run(const GptqMatmulParams* p, const Launch* l) {
    BatchDevice device;
    const cudaError_t e = device.query();
    if (e != cudaSuccess) return (int32_t)e;
    return device.shared >= WIDE_SHARED ? launch_shape<Shape, WIDE_SHARED>(p, l, device)
                                        : launch_shape<Shape, NARROW_SHARED>(p, l, device);
}

template <class Weights>
int32_t run_tokens(const GptqMatmulParams* p, const Launch* l) {
    if (p->tokens <= 16) return run<GptqShape<Weights, 16>>(p, l);
    if (p->tokens <= 32) return run<GptqShape<Weights, 32>>(p, l);
    if (p->tokens <= 64) return run<GptqShape<Weights, 64>>(p, l);
    static_assert(PEREGRINE_BATCH_TOKENS == 72, "the widest");
    return run<GptqShape<Weights, 72>>(p, l);
}

}  // namespace

extern "C" int32_t gptq_batch(const GptqMatmulParams* p, const Launch* l) {
    const GptqMatrix& w = p->w;
    if (w.n == 0 || w.n % UNIT_ROWS || w.k == 0 || w.k % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    if (p->tokens == 0 || p->tokens > PEREGRINE_BATCH_TOKENS || p->x_stride % 8 || p->y.split_row % UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    const uint32_t k_units = w.k / UNIT_INPUTS;
    if (p->slices == 0 || (p->slices > 1 && !p->y.partials)) return PEREGRINE_BAD_SHAPE;
    if ((p->slices - 1) * ((k_units + p->slices - 1) / p->slices) >= k_units) return PEREGRINE_BAD_SHAPE;
    if (const uint32_t multiprocessors = gptq_batch_wgmma_multiprocessors()) return gptq_batch_wgmma(p, l, multiprocessors);
    if (p->planes || p->y.planes) return PEREGRINE_BAD_SHAPE;
    switch (w.scales_per_row * 2 + w.has_zeros) {
        case 2: return run_tokens<GptqUnits<1, false>>(p, l);
        case 3: return run_tokens<GptqUnits<1, true>>(p, l);
        case 4: return run_tokens<GptqUnits<2, false>>(p, l);
        case 5: return run_tokens<GptqUnits<2, true>>(p, l);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
