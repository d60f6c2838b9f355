// head — logits[m, v] = sum_k x[m, k] * E[v, k], table in units (f16 or packed), f32 logits, 1 to 64 tokens. Reference: reference.rs::head
// Shapes   E 65024 x 4544; any vocab % 16 == 0, hidden % 64 == 0.
// Mapping  to 8 tokens: one block of 8 warps = 16 rows of the vocabulary (145 KB, packed 109); warp w owns units w, w + 8, ...; loads of
//          BATCH units are issued together, the first batch before the predecessor has finished. Sums in f32, warps added in warp order.
//          9 to 64 tokens: on sm_90a head_wgmma.cu does the work; elsewhere one block an SM, its share of the rows in passes of up to 12
//          row tiles (batch.cuh), one pass over the table.
// Numbers  packed units give the same bits as f16 ones: all their products are 8 times as large.
// Floor    590.9 MB: 126 us at 4.70 TB/s; packed 443.2 MB: 94 us.
// Measured f16 139 us at 1 token (94 % of the read ceiling), 151 us at 8; packed, two events included, which are 2 us: 108, 124 us; H200.
#include "batch.cuh"
#include "head_output.cuh"

// head_wgmma.cu
uint32_t head_wgmma_multiprocessors();
int32_t head_wgmma(const HeadParams* p, const Launch* l, uint32_t multiprocessors);

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int TOKENS = PEREGRINE_GEMV_TOKENS;
constexpr int BATCH = 3;  // units: 12 loads of 16 bytes in flight a lane

__host__ __device__ constexpr uint32_t row_bytes(uint32_t hidden) { return hidden * 2 + 16; }

template <bool PACKED>
__device__ __forceinline__ void load_batch(TableWords<PACKED> a[BATCH], const uint8_t* tile, uint32_t first, uint32_t units, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
        const uint32_t u = first + i * WARPS;
        if (u >= units) break;
#pragma unroll
        for (int j = 0; j < TableWords<PACKED>::COUNT; j++)
            a[i].v[j] = load_weights(tile + (size_t)u * table_unit_bytes(PACKED) + j * 512 + lane * 16);
    }
}

template <bool PACKED>
__global__ void __launch_bounds__(THREADS, 2) head_kernel(const __grid_constant__ HeadParams p) {
    overlap_next();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t units = p.hidden / UNIT_INPUTS;
    const uint8_t* tile = reinterpret_cast<const uint8_t*>(p.units) + (size_t)blockIdx.x * units * table_unit_bytes(PACKED);
    TableWords<PACKED> batch[BATCH];
    load_batch(batch, tile, warp, units, lane);

    wait_previous();
    extern __shared__ __align__(16) uint8_t smem[];
    float* partial = reinterpret_cast<float*>(smem);  // [WARPS][16][TOKENS]
    uint8_t* zero_row = smem + WARPS * UNIT_ROWS * TOKENS * sizeof(float);
    uint8_t* x_smem = zero_row + 16;
    const uint32_t stride = row_bytes(p.hidden), chunks = p.hidden / 8;
    if (threadIdx.x < 4) reinterpret_cast<uint32_t*>(zero_row)[threadIdx.x] = 0;
    for (uint32_t c = threadIdx.x; c < p.tokens * chunks; c += THREADS)
        *reinterpret_cast<uint4*>(x_smem + c / chunks * stride + c % chunks * 16) = reinterpret_cast<const uint4*>(p.x)[c];
    __syncthreads();

    const bool present = lane % 8 < p.tokens;
    const uint32_t row = present ? smem_address(x_smem + lane % 8 * stride) + lane / 8 * 16 : smem_address(zero_row);
    const uint32_t step = present ? 1 : 0;
    float c[4] = {0.f, 0.f, 0.f, 0.f};
    for (uint32_t first = warp; first < units; first += WARPS * BATCH) {
        if (first != warp) load_batch(batch, tile, first, units, lane);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const uint32_t u = first + i * WARPS;
            if (u >= units) break;
            // A chain of one unit, then an f32 add: the tensor core's own adds truncate.
            float unit_sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int s = 0; s < STEPS; s += 2) {
                uint32_t b[4], a[2][4];
                ldmatrix(b, row + step * (u * UNIT_INPUTS * 2 + s * 32));
                batch[i].unpack(s, a[0]), batch[i].unpack(s + 1, a[1]);
                mma(unit_sum, a[0], b[0], b[1]);
                mma(unit_sum, a[1], b[2], b[3]);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) c[j] += unit_sum[j];
        }
    }

    float2* mine = reinterpret_cast<float2*>(partial + (warp * UNIT_ROWS + lane / 4) * TOKENS + lane % 4 * 2);
    mine[0] = make_float2(c[0], c[1]);
    mine[8 * TOKENS / 2] = make_float2(c[2], c[3]);
    __syncthreads();
    if (threadIdx.x < UNIT_ROWS * p.tokens) {
        const uint32_t r = threadIdx.x % UNIT_ROWS, m = threadIdx.x / UNIT_ROWS;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += partial[(w * UNIT_ROWS + r) * TOKENS + m];
        p.logits[(size_t)m * p.vocab + blockIdx.x * UNIT_ROWS + r] = sum * table_scale(PACKED);
    }
}

template <class Shape, int STAGES>
__global__ void __launch_bounds__(BATCH_THREADS, 1) head_batch_kernel(const __grid_constant__ HeadParams p) {
#if !PEREGRINE_WGMMA
    overlap_next();
    const uint32_t tiles = p.vocab / UNIT_ROWS, units = p.hidden / UNIT_INPUTS;
    const BatchSpan span = {reinterpret_cast<const uint8_t*>(p.units), p.x, units, p.hidden, p.tokens, 0, units,
                            blockIdx.x * tiles / gridDim.x, (blockIdx.x + 1) * tiles / gridDim.x};
    multiply_batch<Shape, STAGES>(span, [&](uint32_t tile, uint32_t end, const float(&acc)[Shape::TOKENS / 8][4]) {
        const uint32_t mine = tile + threadIdx.x / 32;
        if (mine < end) store_logits<Shape::TOKENS>(p, p.logits + mine * UNIT_ROWS, acc, table_scale(Shape::Weights::PACKED));
    });
#endif
}

template <bool PACKED, int BATCH_TOKENS, int SHARED>
int32_t launch_batch(const HeadParams* p, const Launch* l, const BatchDevice& device) {
    using Shape = BatchShape<TableUnits<PACKED>, BATCH_TOKENS, 1, true>;
    constexpr int STAGES = batch_stages<Shape>(SHARED);
    const uint32_t blocks = min((uint32_t)device.multiprocessors, p->vocab / UNIT_ROWS);
    return launch(head_batch_kernel<Shape, STAGES>, dim3(blocks), BATCH_THREADS, ring_bytes<Shape, STAGES>, l, *p);
}

template <bool PACKED, int BATCH_TOKENS>
int32_t run_batch(const HeadParams* p, const Launch* l) {
    BatchDevice device;
    const cudaError_t e = device.query();
    if (e != cudaSuccess) return (int32_t)e;
    return device.shared >= WIDE_SHARED ? launch_batch<PACKED, BATCH_TOKENS, WIDE_SHARED>(p, l, device)
                                        : launch_batch<PACKED, BATCH_TOKENS, NARROW_SHARED>(p, l, device);
}

template <bool PACKED>
int32_t run(const HeadParams* p, const Launch* l) {
    if (p->tokens > 32) return run_batch<PACKED, 64>(p, l);
    if (p->tokens > 16) return run_batch<PACKED, 32>(p, l);
    if (p->tokens > TOKENS) return run_batch<PACKED, 16>(p, l);
    const size_t smem = WARPS * UNIT_ROWS * TOKENS * sizeof(float) + 16 + (size_t)p->tokens * row_bytes(p->hidden);
    return launch(head_kernel<PACKED>, dim3(p->vocab / UNIT_ROWS), THREADS, smem, l, *p);
}

}  // namespace

extern "C" int32_t head(const HeadParams* p, const Launch* l) {
    if (p->tokens == 0 || p->tokens > PEREGRINE_HEAD_TOKENS || p->hidden == 0 || p->hidden % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    if (p->vocab == 0 || p->vocab % UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    if (p->tokens > TOKENS)
        if (const uint32_t multiprocessors = head_wgmma_multiprocessors()) return head_wgmma(p, l, multiprocessors);
    return p->packed ? run<true>(p, l) : run<false>(p, l);
}
