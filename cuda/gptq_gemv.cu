// gptq_gemv — y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units, 1 to 8 tokens.   Reference: src/reference.rs::gptq_matmul
// Shapes   [qkv ; up] 22848 x 4544, [down | dense] 4544 x 22720 (5 slices); any n % 16 == 0, k % 64 == 0.
// Reads    W once (unit layout, cuda/units.cuh), x [tokens, k] f16.   Writes see GptqOutput.
// Mapping  a strip is 16 rows x one K slice of at most 72 units (71 for Falcon-7B: 38.6 KB, one contiguous piece). One block of 16 warps
//          an SM keeps to one slice and takes every n-th strip. A warp owns the same 4 or 5 units of every strip: it streams them
//          through a ring of its own (three stages of cp.async, no barrier with other warps), and keeps the B fragments of their
//          inputs and the inputs' sums in registers for the whole product. 77 KB are in flight an SM, all the time; the first stages
//          are asked for before the predecessor in the stream has finished (weights are nobody's output).
//          The warps' sums of SLOTS strips are collected in shared memory, then all threads add and store them.
//          Tokens are the N = 8 of mma.m16n8k16: one token costs what eight cost, with the same arithmetic in each column.
// Numbers  codes enter the tensor core as f16 subnormals (exact, units.cuh), 64 inputs are summed in f32 by two chains of two
//          mma, one of which begins at -zero * sum of x, then scaled (strip.cuh). The warps' sums are added in warp order: same bits
//          every run, and for a token whether it comes alone or among eight.
// Floor    [qkv ; up] 55.2 MB, [down | dense] 54.9 MB: 11.7 us each at 4.70 TB/s.
// Measured [qkv ; up] 16.4 us, [down | dense] 15.8 us at 1 token (75 and 77 % of the read ceiling), 19.8 and 19.4 us at 8; H200, cold L2,
//          back to back (`cargo bench --bench kernels Gemv`); with one chain of four mma. Two are unmeasured here, see decode_step.
// Tried    a block a strip, 3 blocks an SM, weights through registers: 21.6 us at 1 token, 64 us at 8 (each of 1428 blocks stages all
//          activations, and lives for one memory latency). Two blocks an SM looping over strips, the next strip loaded to registers
//          before this one is computed: 23.8 us at 1 token, 32 us at 8 (probably since both strips' loads share the few scoreboards
//          of a warp, so that waiting for this strip waits for the next one too). One ring for the block, a barrier a strip: 19.9 us at
//          1, 22.8 us at 8.
// Spills   up to 16 bytes, where a row has two scales or zero points.
#include "launch.cuh"
#include "strip.cuh"

namespace {

constexpr int WARPS = 16;
constexpr int THREADS = WARPS * 32;
constexpr int TOKENS = PEREGRINE_GEMV_TOKENS;
constexpr int WARP_UNITS = (PEREGRINE_SLICE_UNITS + WARPS - 1) / WARPS;
constexpr int STAGES = 3;
constexpr int PARTIAL_FLOATS = WARPS * UNIT_ROWS * TOKENS;  // of one strip

// Strips whose sums are collected before they are stored: as many as leave the ring and them within the 163 KB of sm_80.
template <int BYTES>
constexpr int SLOTS = BYTES <= 544 ? 4 : BYTES <= 576 ? 3 : 1;

// Units of a slice that warp w owns: first (w) .. first (w + 1).
__device__ __forceinline__ uint32_t first_unit(uint32_t warp, uint32_t count) { return warp * count / WARPS; }

// The inputs of this warp's `units` units, from unit0 on.
template <int SCALES, bool ZEROS>
__device__ __forceinline__ void load_inputs(StripInputs<WARP_UNITS, SCALES, ZEROS>& x, const GptqMatmulParams& p, uint32_t unit0,
                                            uint32_t units, uint32_t lane) {
    const uint32_t token = lane / 4, q = lane % 4;
    const uint16_t* from = p.x + (size_t)token * p.x_stride + (size_t)unit0 * UNIT_INPUTS + 2 * q;
#pragma unroll
    for (int i = 0; i < WARP_UNITS; i++) {
        const bool present = token < p.tokens && i < units;
#pragma unroll
        for (int j = 0; j < 2 * STEPS; j++)
            x.b[i][j] = present ? *reinterpret_cast<const uint32_t*>(from + i * UNIT_INPUTS + j * 8) : 0;
    }
    x.add_up();
}

// Adds the warps' sums of `strips` strips, in warp order, and stores them. `tile` is the first strip's.
__device__ void store_strips(const GptqMatmulParams& p, const float* partial, uint32_t strips, uint32_t tile, uint32_t tile_step,
                             uint32_t slice) {
    for (uint32_t i = threadIdx.x; i < strips * p.tokens * UNIT_ROWS; i += THREADS) {
        const uint32_t r = i % UNIT_ROWS, m = i / UNIT_ROWS % p.tokens, strip = i / (UNIT_ROWS * p.tokens);
        const float* sums = partial + strip * PARTIAL_FLOATS + r * TOKENS + m;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w * UNIT_ROWS * TOKENS];
        store_output(p.y, p.w.n, p.tokens, slice, m, (tile + strip * tile_step) * UNIT_ROWS + r, sum);
    }
}

template <int SCALES, bool ZEROS>
__global__ void __launch_bounds__(THREADS, 1) gptq_gemv_kernel(const __grid_constant__ GptqMatmulParams p) {
    overlap_next();
    constexpr int BYTES = unit_bytes<SCALES, ZEROS>();
    constexpr int STAGE_BYTES = WARP_UNITS * BYTES;
    constexpr int LAST = WARP_UNITS - 1;  // a warp of a full slice owns LAST or WARP_UNITS units
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t tiles = p.w.n / UNIT_ROWS, k_units = p.w.k / UNIT_INPUTS;
    const uint32_t slice_units = (k_units + p.slices - 1) / p.slices;
    const uint32_t slice = blockIdx.x % p.slices, tile_step = gridDim.x / p.slices;
    const uint32_t count = min(slice_units, k_units - slice * slice_units);
    const uint32_t unit0 = slice * slice_units + first_unit(warp, count);
    const uint32_t units = first_unit(warp + 1, count) - first_unit(warp, count);

    extern __shared__ __align__(16) uint8_t smem[];
    float* partial = reinterpret_cast<float*>(smem);  // [SLOTS][WARPS][16][TOKENS]
    const uint8_t* ring = smem + SLOTS<BYTES> * PARTIAL_FLOATS * sizeof(float) + warp * STAGES * STAGE_BYTES;
    const uint32_t ring_address = smem_address(ring);
    uint32_t wanted_tile = blockIdx.x / p.slices, wanted_stage = 0;
    const uint8_t* source = p.w.units + ((size_t)wanted_tile * k_units + unit0) * BYTES + lane * 16;
    const auto request = [&] {
        if (wanted_tile < tiles) {
            const uint32_t to = ring_address + wanted_stage * STAGE_BYTES + lane * 16;
#pragma unroll
            for (int i = 0; i < (STAGE_BYTES + 511) / 512; i++)
                if (i * 512 + lane * 16 < units * BYTES) cp_async(to + i * 512, source + i * 512);
        }
        cp_async_commit();
        wanted_tile += tile_step;
        source += (size_t)tile_step * k_units * BYTES;
        wanted_stage = wanted_stage + 1 == STAGES ? 0 : wanted_stage + 1;
    };
    for (int i = 0; i < STAGES - 1; i++) request();

    wait_previous();
    StripInputs<WARP_UNITS, SCALES, ZEROS> x;
    load_inputs(x, p, unit0, units, lane);

    uint32_t stage = 0, slot = 0;
    for (uint32_t tile = blockIdx.x / p.slices; tile < tiles; tile += tile_step) {
        cp_async_wait<STAGES - 2>();
        __syncwarp();  // every lane's part of this stage is here, and every lane has left the stage that is refilled
        request();
        const uint8_t* strip = ring + stage * STAGE_BYTES;
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
        if (units >= LAST) {
            // No branch between the units, so that they overlap.
#pragma unroll
            for (int i = 0; i < LAST; i++) multiply_unit(acc, strip + i * BYTES, x, i, lane);
            if (units > LAST) multiply_unit(acc, strip + LAST * BYTES, x, LAST, lane);
        } else {
#pragma unroll
            for (int i = 0; i < LAST; i++)
                if (i < units) multiply_unit(acc, strip + i * BYTES, x, i, lane);
        }
        scale_rows(acc);
        stage = stage + 1 == STAGES ? 0 : stage + 1;

        float* sums = partial + slot * PARTIAL_FLOATS + (warp * UNIT_ROWS + lane / 4) * TOKENS + lane % 4 * 2;
        *reinterpret_cast<float2*>(sums) = make_float2(acc[0], acc[1]);
        *reinterpret_cast<float2*>(sums + 8 * TOKENS) = make_float2(acc[2], acc[3]);
        if (++slot == SLOTS<BYTES> || tile + tile_step >= tiles) {
            __syncthreads();
            store_strips(p, partial, slot, tile - (slot - 1) * tile_step, tile_step, slice);
            __syncthreads();  // before the slots are written again
            slot = 0;
        }
    }
}

template <int SCALES, bool ZEROS>
int32_t run(const GptqMatmulParams* p, const Launch* l) {
    constexpr int BYTES = unit_bytes<SCALES, ZEROS>();
    constexpr size_t smem = SLOTS<BYTES> * PARTIAL_FLOATS * sizeof(float) + (size_t)WARPS * STAGES * WARP_UNITS * BYTES;
    static_assert(smem <= 163 * 1024, "sm_80 has no more");
    int device = 0, multiprocessors = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return (int32_t)e;
    const uint32_t blocks_a_slice = min(max((uint32_t)multiprocessors / p->slices, 1u), p->w.n / UNIT_ROWS);
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
