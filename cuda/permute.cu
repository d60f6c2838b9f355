// permute — out[m, i] = x[m, source[i]].   Reference: the gather in tests/gpu_ops/rows.rs
// Act-order checkpoints only: the inputs of a matrix are stored sorted by group, so its activations are gathered likewise.
// Shapes   x, out [tokens, n] f16, n % 8 == 0; source [n].
// Mapping  a block keeps the rows of ROWS tokens in shared memory, whose banks take random reads of 2 bytes better than the L1 does,
//          and writes a part of their outputs, 8 values a thread and row at a time. Few tokens: many blocks share a row.
// Floor    4 bytes a value: 186 MB for 2048 tokens of 22720, 42 us at 4.45 TB/s.
// Measured warm, H200: 22720 values of 1, 128, 2048 tokens 3.1, 5.8, 63 us; 4544 of them 3.1, 3.0, 11 us.
// Tried    a thread a value, gathered from memory: 3.2, 18.5, 290 us. A prompt of 2048 tokens took 9.6 ms more for act-order, now 2.3.
#include "launch.cuh"

namespace {

constexpr uint32_t THREADS = 512;
constexpr uint32_t VALUES = 8;             // of a thread at a time
constexpr uint32_t BLOCKS = 264;           // enough for the GPU, two a multiprocessor
constexpr size_t SMEM_BYTES = 227 * 1024;  // most of a block; on sm_80 the launch says if it is too much

template <int ROWS>
__global__ void __launch_bounds__(THREADS) permute_kernel(const __grid_constant__ PermuteParams p) {
    overlap_next();
    extern __shared__ __align__(16) uint16_t row[];  // [ROWS][n]
    const uint32_t vectors = p.n / VALUES, first = blockIdx.y * ROWS, rows = min((uint32_t)ROWS, p.tokens - first);
    wait_previous();
    const uint4* x = reinterpret_cast<const uint4*>(p.x + (size_t)first * p.n);
    for (uint32_t i = threadIdx.x; i < rows * vectors; i += THREADS) reinterpret_cast<uint4*>(row)[i] = x[i];
    __syncthreads();
    uint4* out = reinterpret_cast<uint4*>(p.out + (size_t)first * p.n);
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < vectors; i += gridDim.x * THREADS) {
        const uint4* source = reinterpret_cast<const uint4*>(p.source) + 2 * i;
        const uint4 a = __ldg(source), b = __ldg(source + 1);
        const uint32_t last = p.n - 1;
        const uint32_t at[VALUES] = {min(a.x, last), min(a.y, last), min(a.z, last), min(a.w, last),
                                     min(b.x, last), min(b.y, last), min(b.z, last), min(b.w, last)};
#pragma unroll
        for (uint32_t r = 0; r < ROWS; r++) {
            if (r >= rows) break;
            const uint16_t* from = row + r * p.n;
            uint32_t word[VALUES / 2];
#pragma unroll
            for (int v = 0; v < VALUES / 2; v++) word[v] = from[at[2 * v]] | (uint32_t)from[at[2 * v + 1]] << 16;
            out[r * vectors + i] = make_uint4(word[0], word[1], word[2], word[3]);
        }
    }
}

template <int ROWS>
int32_t run(const PermuteParams* p, const Launch* l) {
    const uint32_t groups = (p->tokens + ROWS - 1) / ROWS;
    const uint32_t most = (p->n / VALUES + THREADS - 1) / THREADS, wanted = (BLOCKS + groups - 1) / groups;
    return launch(permute_kernel<ROWS>, dim3(min(most, wanted), groups), THREADS, (size_t)ROWS * p->n * 2, l, *p);
}

}  // namespace

extern "C" int32_t permute(const PermuteParams* p, const Launch* l) {
    if (p->tokens == 0 || p->n == 0 || p->n % VALUES || (size_t)p->n * 2 > SMEM_BYTES) return PEREGRINE_BAD_SHAPE;
    // Two rows share the reading of `source`; of few tokens each is for several blocks, and of wide ones two would leave a multiprocessor
    // one block.
    return p->tokens < BLOCKS || (size_t)p->n * 8 > SMEM_BYTES ? run<1>(p, l) : run<2>(p, l);
}
