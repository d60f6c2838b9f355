// gptq_gemm — y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units, any number of tokens.   Reference: reference.rs::gptq_matmul
// Shapes   as gptq_gemv; tokens 1..2048, made for more than 64 (gptq_batch). On sm_90a gptq_gemm_wgmma.cu does the work instead.
// Reads    W once per 128 (with two scales a row 64) tokens, x once per 128 rows, through L2.   Writes see GptqOutput.
// Mapping  one block = 128 rows x TOKENS tokens, 8 warps as 4 (rows) x 2 (tokens): a warp has 32 rows x TOKENS / 2. k advances by
//          one unit (64 inputs) a step; three steps of cp.async are in flight. Weights are mma's A operand: a warp unpacks its two
//          row tiles once a unit and uses them for all its tokens.
// Numbers  codes are turned into the exact f16 integers code - zero; 64 (32) inputs are summed by the tensor core, then
//          acc += scale * chain in f32: no f16 rounding of a weight, and no long tensor-core chain (its f32 adds truncate).
// Shared   activations [TOKENS][64] f16, 16-byte chunk c of token t at c ^ (t % 8): ldmatrix reads without bank conflicts.
// Measured 222 TFLOP/s ([qkv ; up]) and 237 (5 slices) at 512 tokens, 229 and 218 at 2048, 166 and 174 at 128; H200, compiled for
//          compute_80: 24 to 41 % of what torch.matmul does there with f16 weights and wgmma. One block of 8 warps an SM issues in 40 %
//          of the cycles: latencies, probably of unpacking and barriers, are not hidden.
// Tried    addresses computed anew each step and two chains of mma at a time: 576 and (unsliced) 882 us at 512 tokens, now 487 and 753.
// Floor    27.1 TFLOP for 2048 tokens of Falcon-7B: 36 ms at 750 TFLOP/s; mma.sync is said to reach about 60 % of wgmma on Hopper.
#include "gemm_plan.cuh"
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int BLOCK_TILES = 8;  // row tiles: 128 rows
constexpr int WARP_TILES = 2;
constexpr int STAGES = 4;
constexpr int COLUMN_PAIR = 2;  // n8 tiles whose chains run side by side

// What one thread copies of each stage: pointers for unit 0, fixed for the whole product, so that a step costs a few adds.
template <int BYTES, int TOKENS>
struct StageSource {
    static constexpr int UNIT_CHUNKS = BYTES / 16;                                                // of a row tile
    static constexpr int W_CHUNKS = (BLOCK_TILES * UNIT_CHUNKS + THREADS - 1) / THREADS;          // a thread, at most
    static constexpr int X_CHUNKS = TOKENS * 8 / THREADS;
    const uint8_t* w[W_CHUNKS];
    const uint16_t* x[X_CHUNKS];
    bool w_valid[W_CHUNKS], x_valid[X_CHUNKS];

    __device__ StageSource(const GptqMatmulParams& p, uint32_t tile0, uint32_t token0) {
        const uint32_t tiles = p.w.n / UNIT_ROWS, k_units = p.w.k / UNIT_INPUTS;
#pragma unroll
        for (int i = 0; i < W_CHUNKS; i++) {
            const uint32_t c = i * THREADS + threadIdx.x, t = c / UNIT_CHUNKS, j = c % UNIT_CHUNKS;
            w_valid[i] = tile0 + t < tiles;
            w[i] = p.w.units + (size_t)(w_valid[i] ? tile0 + t : 0) * k_units * BYTES + j * 16;
        }
#pragma unroll
        for (int i = 0; i < X_CHUNKS; i++) {
            const uint32_t c = i * THREADS + threadIdx.x, t = token0 + c / 8;
            x_valid[i] = t < p.tokens;
            x[i] = p.x + (size_t)(x_valid[i] ? t : 0) * p.x_stride + c % 8 * 8;
        }
    }

    // Asks for unit u.
    __device__ void request(uint32_t stage, uint32_t u) const {
#pragma unroll
        for (int i = 0; i < W_CHUNKS; i++) {
            const uint32_t c = i * THREADS + threadIdx.x;
            if (c < BLOCK_TILES * UNIT_CHUNKS) cp_async(stage + c * 16, w[i] + (size_t)u * BYTES, w_valid[i]);
        }
#pragma unroll
        for (int i = 0; i < X_CHUNKS; i++) {
            const uint32_t c = i * THREADS + threadIdx.x, t = c / 8;
            const uint32_t to = stage + BLOCK_TILES * BYTES + t * 128 + ((c % 8) ^ (t % 8)) * 16;
            cp_async(to, x[i] + (size_t)u * UNIT_INPUTS, x_valid[i]);
        }
    }
};

// The B registers of two n8 tiles, tokens `token0 ..` of a stage.
__device__ __forceinline__ void load_columns(uint32_t b[COLUMN_PAIR][8], uint32_t x, uint32_t token0, uint32_t lane) {
#pragma unroll
    for (int q = 0; q < COLUMN_PAIR; q++) {
        const uint32_t t = token0 + q * 8 + lane % 8;
        ldmatrix(b[q], x + t * 128 + ((lane / 8) ^ (t % 8)) * 16);
        ldmatrix(b[q] + 4, x + t * 128 + ((lane / 8 + 4) ^ (t % 8)) * 16);
    }
}

template <int SCALES, bool ZEROS, int TOKENS>
__global__ void __launch_bounds__(THREADS, 1) gptq_gemm_kernel(const __grid_constant__ GptqMatmulParams p) {
    overlap_next();
    constexpr int BYTES = unit_bytes<SCALES, ZEROS>();
    constexpr int STAGE_BYTES = BLOCK_TILES * BYTES + TOKENS * 128;
    constexpr int COLUMNS = TOKENS / 16;  // n8 tiles of a warp
    extern __shared__ __align__(16) uint8_t smem[];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t warp_tile = warp / 2 * WARP_TILES, warp_token = warp % 2 * (TOKENS / 2);
    const uint32_t token0 = blockIdx.x * TOKENS, tile0 = blockIdx.y * BLOCK_TILES, slice = blockIdx.z;
    const uint32_t k_units = p.w.k / UNIT_INPUTS, slice_units = (k_units + p.slices - 1) / p.slices;
    const uint32_t begin = slice * slice_units, end = min(begin + slice_units, k_units);

    const StageSource<BYTES, TOKENS> source(p, tile0, token0);
    float acc[WARP_TILES][COLUMNS][4] = {};
    wait_previous();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (begin + i < end) source.request(smem_address(smem) + i * STAGE_BYTES, begin + i);
        cp_async_commit();
    }
    for (uint32_t u = begin; u < end; u++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // unit u has arrived for all, and all have left the stage that is refilled below
        if (u + STAGES - 1 < end)
            source.request(smem_address(smem) + (u - begin + STAGES - 1) % STAGES * STAGE_BYTES, u + STAGES - 1);
        cp_async_commit();

        const uint8_t* stage = smem + (u - begin) % STAGES * STAGE_BYTES;
        uint32_t a[WARP_TILES][STEPS][4];
        float2 scale[WARP_TILES][SCALES];
#pragma unroll
        for (int t = 0; t < WARP_TILES; t++) {
            const uint8_t* unit = stage + (warp_tile + t) * BYTES;
            const uint4 codes = *reinterpret_cast<const uint4*>(unit + lane * 16);
            const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
                const uint8_t* q = unit + UNIT_CODE_BYTES + h * UNIT_SCALE_BYTES + lane / 4 * 4;
                scale[t][h] = __half22float2(*reinterpret_cast<const __half2*>(q));
                const __half2 zero = ZEROS ? *reinterpret_cast<const __half2*>(q + SCALES * UNIT_SCALE_BYTES) : __float2half2_rn(8.f);
                const ExactBias bias(zero);
#pragma unroll
                for (int s = h * STEPS / SCALES; s < (h + 1) * STEPS / SCALES; s++) unpack_exact(words[s], bias, a[t][s]);
            }
        }
        const uint32_t x = smem_address(stage + BLOCK_TILES * BYTES);
        uint32_t b[2][COLUMN_PAIR][8];  // of this pair of columns and the next
        load_columns(b[0], x, warp_token, lane);
#pragma unroll
        for (int j = 0; j < COLUMNS; j += COLUMN_PAIR) {
            const int now = j / COLUMN_PAIR % 2;
            if (j + COLUMN_PAIR < COLUMNS) load_columns(b[1 - now], x, warp_token + (j + COLUMN_PAIR) * 8, lane);
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
                // Four chains at once (two row tiles, two columns): one chain is a sequence of latencies.
                constexpr int CHAIN = STEPS / SCALES;
                float c[WARP_TILES][COLUMN_PAIR][4] = {};
#pragma unroll
                for (int s = h * CHAIN; s < (h + 1) * CHAIN; s++)
#pragma unroll
                    for (int i = 0; i < WARP_TILES; i++)
#pragma unroll
                        for (int q = 0; q < COLUMN_PAIR; q++) mma(c[i][q], a[i][s], b[now][q][2 * s], b[now][q][2 * s + 1]);
#pragma unroll
                for (int i = 0; i < WARP_TILES; i++)
#pragma unroll
                    for (int q = 0; q < COLUMN_PAIR; q++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            acc[i][j + q][e] = fmaf(e < 2 ? scale[i][h].x : scale[i][h].y, c[i][q][e], acc[i][j + q][e]);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) {
        const uint32_t tile = tile0 + warp_tile + i;
        if (tile >= p.w.n / UNIT_ROWS) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const uint32_t row = tile * UNIT_ROWS + lane / 4 + c / 2 * 8;
                const uint32_t m = token0 + warp_token + j * 8 + lane % 4 * 2 + c % 2;
                if (m < p.tokens) store_output(p.y, p.w.n, p.tokens, slice, m, row, acc[i][j][c]);
            }
    }
}

template <int SCALES, bool ZEROS, int TOKENS>
int32_t run(const GptqMatmulParams* p, const Launch* l) {
    constexpr size_t smem = (size_t)STAGES * (BLOCK_TILES * unit_bytes<SCALES, ZEROS>() + TOKENS * 128);
    const dim3 grid((p->tokens + TOKENS - 1) / TOKENS, (p->w.n / UNIT_ROWS + BLOCK_TILES - 1) / BLOCK_TILES, p->slices);
    return launch(gptq_gemm_kernel<SCALES, ZEROS, TOKENS>, grid, THREADS, smem, l, *p);
}

template <int SCALES, bool ZEROS>
int32_t run_tokens(const GptqMatmulParams* p, const Launch* l) {
    // With two scales a row (group 32) the 128-token tile would spill.
    return run<SCALES, ZEROS, SCALES == 1 ? 128 : 64>(p, l);
}

}  // namespace

extern "C" int32_t gptq_gemm(const GptqMatmulParams* p, const Launch* l) {
    const GptqMatrix& w = p->w;
    if (w.n == 0 || w.n % UNIT_ROWS || w.k == 0 || w.k % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    if (p->tokens == 0 || p->x_stride % 8 || p->y.split_row % UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    const uint32_t k_units = w.k / UNIT_INPUTS;
    if (p->slices == 0 || (p->slices > 1 && !p->y.partials)) return PEREGRINE_BAD_SHAPE;
    if ((p->slices - 1) * ((k_units + p->slices - 1) / p->slices) >= k_units) return PEREGRINE_BAD_SHAPE;
    if (const uint32_t multiprocessors = gptq_gemm_wgmma_multiprocessors()) return gptq_gemm_wgmma(p, l, multiprocessors);
    switch (w.scales_per_row * 2 + w.has_zeros) {
        case 2: return run_tokens<1, false>(p, l);
        case 3: return run_tokens<1, true>(p, l);
        case 4: return run_tokens<2, false>(p, l);
        case 5: return run_tokens<2, true>(p, l);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
