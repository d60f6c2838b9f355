// layernorm — x += partials + bias, then out = (x - mean) / sqrt(variance + eps) * weight + bias.   Reference: reference.rs::layernorm
// Shapes   x [tokens, hidden] f32, hidden <= 8192 and % 4 == 0; partials [slices, tokens, hidden] f32; out f16.
// Mapping  one block of 512 threads a token; the row stays in registers, so mean and variance are two exact passes over them. The
//          residual and all its slices are asked for together.
// Tried    weight and bias loaded before the predecessor has finished: no difference at 1 token. One kernel for with and without slices:
//          50 us at 2048 tokens, since the slices' registers (74 in all) halve the occupancy.
// Numbers  partials are added in slice order and sums run in a fixed tree: same bits every run. Biased variance, as PyTorch's.
// Measured 4.1 us at 1 token with 5 slices, 27 us at 512, 20 us at 2048 without; H200.
// Cost     one token: 109 KB from L2 by one SM, a chain of latencies (load, two block sums, store), not bandwidth.
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int THREADS = 512;  // most of a block
constexpr int MAX_SLICES = 8;

// Sum over the warp; every lane gets it.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}
__device__ __forceinline__ float sum(float4 v) { return (v.x + v.y) + (v.z + v.w); }
__device__ __forceinline__ void add(float4& a, float4 b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; }
__device__ __forceinline__ float squares(float4 v, float mean) {
    v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean;
    return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
}

// Of some values: how many, their mean, and the sum of the squares of their differences from it.
struct Moments {
    float count, mean, squares;
};

// The row's blocks.
template <int BLOCKS>
struct Row {
    __device__ __forceinline__ static uint32_t rank() { return BLOCKS > 1 ? blockIdx.x % BLOCKS : 0; }
    __device__ __forceinline__ static void arrive() {
#if __CUDA_ARCH__ >= 900
        if (BLOCKS > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    }
    __device__ __forceinline__ static void wait() {
#if __CUDA_ARCH__ >= 900
        if (BLOCKS > 1) {
            asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
            return;
        }
#endif
        __syncthreads();
    }
    // Lane r's to block r.
    __device__ __forceinline__ static void give(Moments* to, const Moments& m) {
        const uint32_t lane = threadIdx.x % 32;
        if (lane >= BLOCKS) return;
#if __CUDA_ARCH__ >= 900
        if (BLOCKS > 1) {
            uint32_t at;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(smem_address(to)), "r"(lane));
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(m.count) : "memory");
            asm volatile("st.shared::cluster.f32 [%0 + 4], %1;" ::"r"(at), "f"(m.mean) : "memory");
            asm volatile("st.shared::cluster.f32 [%0 + 8], %1;" ::"r"(at), "f"(m.squares) : "memory");
            return;
        }
#endif
        *to = m;
    }
};

// VECTORS: float4 a thread.
template <bool PARTIALS, int BLOCKS, int VECTORS>
__global__ void __launch_bounds__(THREADS) layernorm_kernel(const __grid_constant__ LayernormParams p) {
    overlap_next();
    Row<BLOCKS>::arrive();
    constexpr int MOST = BLOCKS * THREADS / 32;
    __shared__ Moments shared[MOST];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const uint32_t vectors = p.hidden / 4, own = (vectors + BLOCKS - 1) / BLOCKS, first = Row<BLOCKS>::rank() * own;
    const uint32_t end = min(first + own, vectors);
    const size_t row = (size_t)(blockIdx.x / BLOCKS) * vectors;
    float4* x = reinterpret_cast<float4*>(p.x) + row;
    const float4* partials = reinterpret_cast<const float4*>(p.partials) + row;
    const size_t slice_stride = (size_t)p.tokens * vectors;
    float4 weight[VECTORS], bias[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const uint32_t e = min(first + i * blockDim.x + threadIdx.x, vectors - 1);
        if (BLOCKS > 1) weight[i] = __ldg(reinterpret_cast<const float4*>(p.weight) + e), bias[i] = __ldg(reinterpret_cast<const float4*>(p.bias) + e);
    }
    wait_previous();

    float4 v[VECTORS];
    float total = 0.f, mine = 0.f;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const uint32_t e = first + i * blockDim.x + threadIdx.x;
        if (e >= end) continue;
        v[i] = x[e];
        if (PARTIALS) {
            float4 part[MAX_SLICES];
#pragma unroll
            for (int s = 0; s < MAX_SLICES; s++)
                if (s < p.slices) part[s] = partials[s * slice_stride + e];
#pragma unroll
            for (int s = 0; s < MAX_SLICES; s++)
                if (s < p.slices) add(v[i], part[s]);
            if (p.partials_bias) add(v[i], reinterpret_cast<const float4*>(p.partials_bias)[e]);
            x[e] = v[i];
        }
        total += sum(v[i]), mine += 4.f;
    }
    Moments m = {warp_sum(mine), 0.f, 0.f};
    m.mean = warp_sum(total) / fmaxf(m.count, 1.f);
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (first + i * blockDim.x + threadIdx.x < end) m.squares += squares(v[i], m.mean);
    m.squares = warp_sum(m.squares);
    if (BLOCKS > 1) Row<BLOCKS>::wait();  // the others have begun
    Row<BLOCKS>::give(&shared[Row<BLOCKS>::rank() * warps + warp], m);
    Row<BLOCKS>::arrive();
    Row<BLOCKS>::wait();
    float weighed = 0.f, spread = 0.f;
    for (uint32_t w = lane; w < BLOCKS * warps; w += 32) weighed += shared[w].count * shared[w].mean;
    const float mean = warp_sum(weighed) / p.hidden;
    for (uint32_t w = lane; w < BLOCKS * warps; w += 32) {
        const float off = shared[w].mean - mean;
        spread += shared[w].squares + shared[w].count * off * off;
    }
    const float rstd = 1.f / sqrtf(warp_sum(spread) / p.hidden + p.epsilon);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const uint32_t e = first + i * blockDim.x + threadIdx.x;
        if (e >= end) continue;
        float4 w = weight[i], b = bias[i];
        if (BLOCKS == 1) w = __ldg(reinterpret_cast<const float4*>(p.weight) + e), b = __ldg(reinterpret_cast<const float4*>(p.bias) + e);
        __half2 lo = __floats2half2_rn((v[i].x - mean) * rstd * w.x + b.x, (v[i].y - mean) * rstd * w.y + b.y);
        __half2 hi = __floats2half2_rn((v[i].z - mean) * rstd * w.z + b.z, (v[i].w - mean) * rstd * w.w + b.w);
        reinterpret_cast<uint2*>(p.out)[row + e] = make_uint2(*reinterpret_cast<uint32_t*>(&lo), *reinterpret_cast<uint32_t*>(&hi));
    }
}

template <int BLOCKS, int VECTORS>
int32_t run(const LayernormParams* p, const Launch* l) {
    const uint32_t own = (p->hidden / 4 + BLOCKS - 1) / BLOCKS, threads = (own / VECTORS + 31) / 32 * 32;
    return launch(p->partials ? layernorm_kernel<true, BLOCKS, VECTORS> : layernorm_kernel<false, BLOCKS, VECTORS>, dim3(p->tokens * BLOCKS),
                  BLOCKS > 1 ? threads : THREADS, 0, l, *p, BLOCKS);
}

}  // namespace

extern "C" int32_t layernorm(const LayernormParams* p, const Launch* l) {
    if (p->tokens == 0 || p->hidden == 0 || p->hidden % 4 || p->hidden > THREADS * 4 * 4) return PEREGRINE_BAD_SHAPE;
    if (p->partials && p->slices > MAX_SLICES) return PEREGRINE_BAD_SHAPE;
#ifdef LN_ONE
    return run<1, 4>(p, l);
#else
    return p->tokens <= 64 ? run<4, 1>(p, l) : run<1, 4>(p, l);
#endif
}
