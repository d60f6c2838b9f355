// permute — out[m, i] = x[m, source[i]].   Reference: the gather in tests/gpu_ops/rows.rs
// Act-order checkpoints only: the inputs of a matrix are stored sorted by group, so its activations are gathered likewise.
#include "launch.cuh"

namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) permute_kernel(const __grid_constant__ PermuteParams p) {
    overlap_next();
    wait_previous();
    const uint32_t i = blockIdx.x * THREADS + threadIdx.x;
    if (i < p.n) p.out[(size_t)blockIdx.y * p.n + i] = p.x[(size_t)blockIdx.y * p.n + min(p.source[i], p.n - 1)];
}

}  // namespace

extern "C" int32_t permute(const PermuteParams* p, const Launch* l) {
    if (p->tokens == 0 || p->n == 0) return PEREGRINE_BAD_SHAPE;
    return launch(permute_kernel, dim3((p->n + THREADS - 1) / THREADS, p->tokens), THREADS, 0, l, *p);
}
