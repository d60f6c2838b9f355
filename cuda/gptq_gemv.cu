// gptq_gemv — y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units, 1 to 8 tokens.   Reference: src/reference.rs::gptq_matmul
// Shapes   [qkv ; up] 22848 x 4544, [down | dense] 4544 x 22720 (5 slices); any n % 16 == 0, k % 64 == 0.
// Reads    W once (unit layout, cuda/units.cuh), x [tokens, k] f16.   Writes see GptqOutput.
// Mapping  one block of 8 warps = one strip: 16 rows x one K slice of at most 72 units (71 for Falcon-7B: 38.6 KB). Warp w owns
//          units w, w + 8, ...: all their loads are issued at once, before the predecessor in the stream has finished
//          (weights are nobody's output), so a strip costs one memory latency and 3 blocks an SM keep 116 KB in flight.
//          Tokens are the N = 8 of mma.m16n8k16: one token costs what eight cost, with the same arithmetic in each column.
// Numbers  codes enter the tensor core as f16 subnormals (exact, units.cuh), 64 inputs are summed in f32 by the chain of four
//          mma, then scale * (chain - zero * sum of x). The warps' sums are added in warp order: same bits every run, and for a
//          token whether it comes alone or among eight.
// Floor    [qkv ; up] 55.2 MB, [down | dense] 54.9 MB: 11.7 us each at 4.70 TB/s.
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int TOKENS = PEREGRINE_GEMV_TOKENS;
constexpr int WARP_UNITS = PEREGRINE_SLICE_UNITS / WARPS;

// Bytes between the rows of two tokens in shared memory: 16 more than the data, so that ldmatrix's eight rows fall into
// different banks.
__host__ __device__ constexpr uint32_t row_bytes(uint32_t slice_units) { return slice_units * UNIT_INPUTS * 2 + 16; }

// Copies x[tokens][count units] to shared memory and sums each run of 64 / SCALES inputs; eight lanes share a unit.
template <int SCALES>
__device__ void stage_activations(const GptqMatmulParams& p, uint32_t unit0, uint32_t count, uint8_t* x_smem, uint32_t stride,
                                  float* sums) {
    const uint32_t chunks = count * 8;  // of 16 bytes, a token
    for (uint32_t base = 0; base < p.tokens * chunks; base += THREADS) {
        const uint32_t c = base + threadIdx.x;
        const bool valid = c < p.tokens * chunks;
        const uint32_t m = valid ? c / chunks : 0, j = valid ? c % chunks : 0;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (valid) {
            v = *reinterpret_cast<const uint4*>(p.x + (size_t)m * p.x_stride + (size_t)unit0 * UNIT_INPUTS + j * 8);
            *reinterpret_cast<uint4*>(x_smem + m * stride + j * 16) = v;
        }
        const __half2* h = reinterpret_cast<const __half2*>(&v);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 f = __half22float2(h[i]);
            sum += f.x + f.y;
        }
#pragma unroll
        for (int step = 1; step < 8 / SCALES; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (valid && j % (8 / SCALES) == 0) sums[j / (8 / SCALES) * TOKENS + m] = sum;
    }
}

template <int SCALES, bool ZEROS>
__global__ void __launch_bounds__(THREADS, SCALES == 1 && !ZEROS ? 3 : 2)
    gptq_gemv_kernel(const __grid_constant__ GptqMatmulParams p) {
    overlap_next();
    constexpr int BYTES = unit_bytes<SCALES, ZEROS>();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t k_units = p.w.k / UNIT_INPUTS;
    const uint32_t slice_units = (k_units + p.slices - 1) / p.slices;
    const uint32_t tile = blockIdx.x / p.slices, slice = blockIdx.x % p.slices;
    const uint32_t unit0 = slice * slice_units;
    const uint32_t count = min(slice_units, k_units - unit0);
    const uint8_t* strip = p.w.units + ((size_t)tile * k_units + unit0) * BYTES;

    uint4 codes[WARP_UNITS];
    __half2 scales[WARP_UNITS][SCALES], zeros[WARP_UNITS][SCALES];
#pragma unroll
    for (int i = 0; i < WARP_UNITS; i++) {
        const uint32_t u = warp + i * WARPS;
        if (u < count) codes[i] = load_weights(strip + u * BYTES + lane * 16);
    }
#pragma unroll
    for (int i = 0; i < WARP_UNITS; i++) {
        const uint32_t u = warp + i * WARPS;
#pragma unroll
        for (int h = 0; h < SCALES; h++) {
            const uint8_t* q = strip + u * BYTES + UNIT_CODE_BYTES + h * UNIT_SCALE_BYTES + lane / 4 * 4;
            if (u < count) {
                scales[i][h] = load_scales(q);
                if (ZEROS) zeros[i][h] = load_scales(q + SCALES * UNIT_SCALE_BYTES);
            }
        }
    }

    wait_previous();

    extern __shared__ __align__(16) uint8_t smem[];
    const uint32_t stride = row_bytes(slice_units);
    float* partial = reinterpret_cast<float*>(smem);          // [WARPS][16][TOKENS]
    float* sums = partial + WARPS * UNIT_ROWS * TOKENS;       // [slice_units * SCALES][TOKENS]
    uint8_t* zero_row = reinterpret_cast<uint8_t*>(sums + slice_units * SCALES * TOKENS);  // 16 bytes: the row of absent tokens
    uint8_t* x_smem = zero_row + 16;                           // [tokens][stride]
    if (threadIdx.x < 4) reinterpret_cast<uint32_t*>(zero_row)[threadIdx.x] = 0;
    // Columns of absent tokens are computed too and never stored; their sums must only be defined.
    for (uint32_t i = threadIdx.x; i < slice_units * SCALES * TOKENS; i += THREADS)
        if (i % TOKENS >= p.tokens) sums[i] = 0.f;
    stage_activations<SCALES>(p, unit0, count, x_smem, stride, sums);
    __syncthreads();

    const bool present = lane % 8 < p.tokens;
    const uint32_t row = present ? smem_address(x_smem + lane % 8 * stride) + lane / 8 * 16 : smem_address(zero_row);
    const uint32_t step = present ? 1 : 0;
    const uint32_t column = lane % 4 * 2;
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < WARP_UNITS; i++) {
        const uint32_t u = warp + i * WARPS;
        if (u >= count) break;
        const uint32_t words[4] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
#pragma unroll
        for (int h = 0; h < SCALES; h++) {
            float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int s = h * STEPS / SCALES; s < (h + 1) * STEPS / SCALES; s += 2) {
                uint32_t a[4], b[4];
                ldmatrix(b, row + step * (u * UNIT_INPUTS * 2 + s * 32));
                unpack_subnormal(words[s], a);
                mma(c, a, b[0], b[1]);
                unpack_subnormal(words[s + 1], a);
                mma(c, a, b[2], b[3]);
            }
            const float2 x_sum = *reinterpret_cast<const float2*>(sums + (u * SCALES + h) * TOKENS + column);
            const float2 scale = __half22float2(scales[i][h]);
            const float2 zero = ZEROS ? __half22float2(zeros[i][h]) : make_float2(8.f, 8.f);
            acc[0] += scale.x * fmaf(c[0], CODE_LOW_SCALE, -zero.x * x_sum.x);
            acc[1] += scale.x * fmaf(c[1], CODE_LOW_SCALE, -zero.x * x_sum.y);
            acc[2] += scale.y * fmaf(c[2], CODE_HIGH_SCALE, -zero.y * x_sum.x);
            acc[3] += scale.y * fmaf(c[3], CODE_HIGH_SCALE, -zero.y * x_sum.y);
        }
    }

    float2* mine = reinterpret_cast<float2*>(partial + (warp * UNIT_ROWS + lane / 4) * TOKENS + column);
    mine[0] = make_float2(acc[0], acc[1]);
    mine[8 * TOKENS / 2] = make_float2(acc[2], acc[3]);
    __syncthreads();
    if (threadIdx.x < UNIT_ROWS * p.tokens) {
        const uint32_t r = threadIdx.x % UNIT_ROWS, m = threadIdx.x / UNIT_ROWS;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[(w * UNIT_ROWS + r) * TOKENS + m];
        store_output(p.y, p.w.n, p.tokens, slice, m, tile * UNIT_ROWS + r, sum);
    }
}

template <int SCALES, bool ZEROS>
int32_t run(const GptqMatmulParams* p, const Launch* l) {
    const uint32_t slice_units = (p->w.k / UNIT_INPUTS + p->slices - 1) / p->slices;
    const size_t smem = (WARPS * UNIT_ROWS * TOKENS + (size_t)slice_units * SCALES * TOKENS) * sizeof(float) + 16 +
                        (size_t)p->tokens * row_bytes(slice_units);
    return launch(gptq_gemv_kernel<SCALES, ZEROS>, dim3(p->w.n / UNIT_ROWS * p->slices), THREADS, smem, l, *p);
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
