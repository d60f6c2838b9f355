// gptq_gemv — y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units, 1 to 8 tokens.   Reference: src/reference.rs::gptq_matmul
// Shapes   [qkv ; up] 22848 x 4544, [down | dense] 4544 x 22720 (5 slices); any n % 16 == 0, k % 64 == 0.
// Reads    W once (unit layout, cuda/units.cuh), x [tokens, k] f16.   Writes see GptqOutput.
// Mapping  a strip is 16 rows x one K slice of at most 72 units (71 for Falcon-7B: 38.6 KB, one contiguous piece). One block of 16 warps
//          an SM keeps to one slice and takes every so-manieth strip through a ring of three stages filled by cp.async: 77 KB in
//          flight, all the time. The first stages are asked for before the predecessor in the stream has finished (weights are
//          nobody's output). Warp w owns units w, w + 16, ... of every strip, so the B fragments of its inputs and their sums stay in
//          registers for the whole product: activations are read once a block, and none goes through shared memory.
//          Tokens are the N = 8 of mma.m16n8k16: one token costs what eight cost, with the same arithmetic in each column.
// Numbers  codes enter the tensor core as f16 subnormals (exact, units.cuh), 64 inputs are summed in f32 by the chain of four
//          mma, then scale * (chain - zero * sum of x). The warps' sums are added in warp order: same bits every run, and for a
//          token whether it comes alone or among eight.
// Floor    [qkv ; up] 55.2 MB, [down | dense] 54.9 MB: 11.7 us each at 4.70 TB/s.
// Tried    a block a strip, 3 blocks an SM, weights through registers: 21.6 us at 1 token, 64 us at 8 (each of 1428 blocks stages all
//          activations, and lives for one memory latency). Two blocks an SM looping over strips, the next strip loaded to registers
//          before this one is computed: 23.8 us at 1 token, 32 us at 8 (both strips' loads share the few scoreboards of a warp, so
//          waiting for this strip waits for the next one too).
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int WARPS = 16;
constexpr int THREADS = WARPS * 32;
constexpr int TOKENS = PEREGRINE_GEMV_TOKENS;
constexpr int WARP_UNITS = (PEREGRINE_SLICE_UNITS + WARPS - 1) / WARPS;
constexpr int STAGES = 3;
constexpr int PARTIAL_FLOATS = WARPS * UNIT_ROWS * TOKENS;

// The inputs of this warp's units for all tokens: B fragments, and the sum of each run of 64 / SCALES inputs for this lane's columns.
template <int SCALES>
struct WarpInputs {
    uint32_t b[WARP_UNITS][2 * STEPS];
    float2 sums[WARP_UNITS][SCALES];

    __device__ __forceinline__ void load(const GptqMatmulParams& p, uint32_t unit0, uint32_t count, uint32_t warp, uint32_t lane) {
        const uint32_t token = lane / 4, q = lane % 4;
        const uint16_t* x = p.x + (size_t)token * p.x_stride + (size_t)unit0 * UNIT_INPUTS + 2 * q;
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) {
            const uint32_t u = warp + i * WARPS;
            const bool present = token < p.tokens && u < count;
#pragma unroll
            for (int j = 0; j < 2 * STEPS; j++)
                b[i][j] = present ? *reinterpret_cast<const uint32_t*>(x + u * UNIT_INPUTS + j * 8) : 0;
        }
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
                float sum = 0.f;
#pragma unroll
                for (int j = h * 2 * STEPS / SCALES; j < (h + 1) * 2 * STEPS / SCALES; j++) {
                    const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&b[i][j]));
                    sum += f.x + f.y;
                }
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                // Token t's sum is in lanes 4 t ..; this lane's accumulators are of tokens 2 q and 2 q + 1.
                sums[i][h] = make_float2(__shfl_sync(~0u, sum, 8 * q), __shfl_sync(~0u, sum, 8 * q + 4));
            }
    }
};

// acc[16 rows x 8 tokens] += one unit * x.
template <int SCALES, bool ZEROS>
__device__ __forceinline__ void multiply_unit(float acc[4], const uint8_t* unit, const uint32_t b[2 * STEPS], const float2 sums[SCALES],
                                              uint32_t lane) {
    const uint4 codes = *reinterpret_cast<const uint4*>(unit + lane * 16);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int h = 0; h < SCALES; h++) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = h * STEPS / SCALES; s < (h + 1) * STEPS / SCALES; s++) {
            uint32_t a[4];
            unpack_subnormal(words[s], a);
            mma(c, a, b[2 * s], b[2 * s + 1]);
        }
        const uint8_t* q = unit + UNIT_CODE_BYTES + h * UNIT_SCALE_BYTES + lane / 4 * 4;
        const float2 scale = __half22float2(*reinterpret_cast<const __half2*>(q));
        const float2 zero =
            ZEROS ? __half22float2(*reinterpret_cast<const __half2*>(q + SCALES * UNIT_SCALE_BYTES)) : make_float2(8.f, 8.f);
        acc[0] += scale.x * fmaf(c[0], CODE_LOW_SCALE, -zero.x * sums[h].x);
        acc[1] += scale.x * fmaf(c[1], CODE_LOW_SCALE, -zero.x * sums[h].y);
        acc[2] += scale.y * fmaf(c[2], CODE_HIGH_SCALE, -zero.y * sums[h].x);
        acc[3] += scale.y * fmaf(c[3], CODE_HIGH_SCALE, -zero.y * sums[h].y);
    }
}

template <int SCALES, bool ZEROS>
__global__ void __launch_bounds__(THREADS, 1) gptq_gemv_kernel(const __grid_constant__ GptqMatmulParams p) {
    overlap_next();
    constexpr int BYTES = unit_bytes<SCALES, ZEROS>();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t tiles = p.w.n / UNIT_ROWS, k_units = p.w.k / UNIT_INPUTS;
    const uint32_t slice_units = (k_units + p.slices - 1) / p.slices;
    const uint32_t slice = blockIdx.x % p.slices, tile_step = gridDim.x / p.slices;
    const uint32_t unit0 = slice * slice_units;
    const uint32_t count = min(slice_units, k_units - unit0);
    const uint32_t first_tile = blockIdx.x / p.slices;

    extern __shared__ __align__(16) uint8_t smem[];
    float* partial = reinterpret_cast<float*>(smem);  // [2][WARPS][16][TOKENS]
    uint8_t* ring = smem + 2 * PARTIAL_FLOATS * sizeof(float);
    const uint32_t stage_bytes = slice_units * BYTES;
    const auto request = [&](uint32_t turn) {
        const uint32_t tile = first_tile + turn * tile_step;
        if (tile < tiles) {
            const uint8_t* strip = p.w.units + ((size_t)tile * k_units + unit0) * BYTES;
            const uint32_t to = smem_address(ring) + turn % STAGES * stage_bytes;
            for (uint32_t at = threadIdx.x * 16; at < count * BYTES; at += THREADS * 16) cp_async(to + at, strip + at);
        }
        cp_async_commit();
    };
    for (uint32_t turn = 0; turn < STAGES - 1; turn++) request(turn);

    wait_previous();
    WarpInputs<SCALES> x;
    x.load(p, unit0, count, warp, lane);

    for (uint32_t turn = 0;; turn++) {
        const uint32_t tile = first_tile + turn * tile_step;
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this strip is here; the one before is computed, and its stage free
        if (turn > 0 && threadIdx.x < UNIT_ROWS * p.tokens) {
            // The warps' sums of the strip before, in warp order. The two buffers take turns, so one barrier a strip is enough.
            const float* sums = partial + (turn - 1) % 2 * PARTIAL_FLOATS;
            const uint32_t r = threadIdx.x % UNIT_ROWS, m = threadIdx.x / UNIT_ROWS;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[(w * UNIT_ROWS + r) * TOKENS + m];
            store_output(p.y, p.w.n, p.tokens, slice, m, (tile - tile_step) * UNIT_ROWS + r, sum);
        }
        if (tile >= tiles) break;
        request(turn + STAGES - 1);

        const uint8_t* strip = ring + turn % STAGES * stage_bytes;
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) {
            const uint32_t u = warp + i * WARPS;
            if (u < count) multiply_unit<SCALES, ZEROS>(acc, strip + u * BYTES, x.b[i], x.sums[i], lane);
        }
        float2* mine = reinterpret_cast<float2*>(partial + turn % 2 * PARTIAL_FLOATS + (warp * UNIT_ROWS + lane / 4) * TOKENS + lane % 4 * 2);
        mine[0] = make_float2(acc[0], acc[1]);
        mine[8 * TOKENS / 2] = make_float2(acc[2], acc[3]);
    }
}

template <int SCALES, bool ZEROS>
int32_t run(const GptqMatmulParams* p, const Launch* l) {
    const uint32_t tiles = p->w.n / UNIT_ROWS;
    const uint32_t slice_units = (p->w.k / UNIT_INPUTS + p->slices - 1) / p->slices;
    const size_t smem = 2 * PARTIAL_FLOATS * sizeof(float) + (size_t)STAGES * slice_units * unit_bytes<SCALES, ZEROS>();
    int device = 0, multiprocessors = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return (int32_t)e;
    const uint32_t blocks_a_slice = min(max((uint32_t)multiprocessors / p->slices, 1u), tiles);
    return launch(gptq_gemv_kernel<SCALES, ZEROS>, dim3(blocks_a_slice * p->slices), THREADS, smem, l, *p);
}

}  // namespace

extern "C" int32_t gptq_gemv(const GptqMatmulParams* p, const Launch* l) {
    const GptqMatrix& w = p->w;
    if (w.n == 0 || w.n % UNIT_ROWS || w.k == 0 || w.k % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    if (p->tokens == 0 || p->tokens > TOKENS || p->x_stride % 8 || p->y.split_row % UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    const uint32_t k_units = w.k / UNIT_INPUTS;
    if (p->slices == 0 || (p->slices > 1 && !p->y.partials)) return PEREGRINE_BAD_SHAPE;
    const uint32_t slice_units = (k_units + p->slices - 1) / p->slices;
    if (slice_units > PEREGRINE_SLICE_UNITS || (p->slices - 1) * slice_units >= k_units) return PEREGRINE_BAD_SHAPE;
    switch (w.scales_per_row * 2 + w.has_zeros) {
        case 2: return run<1, false>(p, l);
        case 3: return run<1, true>(p, l);
        case 4: return run<2, false>(p, l);
        case 5: return run<2, true>(p, l);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
