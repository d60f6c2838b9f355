// layernorm — x += partials + bias, then out = (x - mean) / sqrt(variance + eps) * weight + bias.   Reference: reference.rs::layernorm
// Shapes   x [tokens, hidden] f32, hidden <= 8192 and % 4 == 0; partials [slices, tokens, hidden] f32; out f16, or planes (planes.cuh).
// Mapping  one block of 512 threads a token; to 64 tokens on sm_90 a cluster of four blocks, one float4 a thread. The row stays in
//          registers. The residual and all its slices are asked for together; a cluster asks for weight and bias before the predecessor
//          has finished.
// Numbers  each warp gives the mean of its values and the sum of squares about it, in two passes over registers; these are joined in a
//          fixed order, about the first warp's mean (count * (mean - that)^2 more), as are slices: same bits every run. Biased variance,
//          as PyTorch's.
// Exchange each warp sends its moments to the four blocks of its row by st.async, which an mbarrier of each counts: no barrier of the
//          cluster stands between the sums and the outputs.
// Measured launches in a row, 5 slices, H200: 2.8, 3.4, 3.8 us at 16, 32, 64 tokens (one block a token: 3.6, 3.6, 3.9). Between two
//          products under load the stores of one and the loads of the next are 4 us apart, where one block a token took 7. Before the
//          cluster: 27 us at 512 tokens, 20 us at 2048 without slices.
//          Steps of 16 texts by turns: 1.245 ms where the moments were joined in two passes and by a barrier of the cluster, 1.239 in one
//          pass, 1.230 by st.async as well.
// Tried    sums of a warp in one pass, about one lane's mean: the same. Eight blocks a row: 1.202 for 1.205, 32 texts 1.370 for 1.351. That
//          a block waits for the slices' own values, not for the grid: 1.287 for 1.266. With 40 registers, so that a block fits beside one
//          of gptq_batch at once: 1.290 for 1.265; with so much shared memory that it never does: 1.300. Two blocks a row beyond 32 tokens, two
//          float4 a thread, so that each has a multiprocessor of its own: 1.804 for 1.757 with 48 texts, 2.075 for 2.064 with 64 (medians).
//          What-if: each warp takes its own moments for the row's, so that nothing is exchanged: 1.131 for 1.150 (16), 1.295 for 1.308 (32,
//          fastest tenths), medians of 32 1.483 for 1.511. A product that takes mean and deviation into its own sums uses that up: inputs
//          scaled by those of the layer before, by blocks that know nothing of each other, and a [qkv ; up] that has the row's own from
//          moments, scales its sums by the ratio and adds products of the norm's weight and bias, 1.138 for 1.143, 1.325 for 1.324, 1.790
//          for 1.791 (64), errors as now; with moments of each warp, 36 a row, 1.168 for 1.137, 1.330 for 1.306, 1.88 for 1.73.
//          One kernel for with and without slices: 50 us at 2048 tokens, since the slices' registers halve the occupancy.
// Cost     one token: 109 KB from L2, a chain of latencies (load, exchange of sums, store), not bandwidth.
#include "bulk.cuh"
#include "launch.cuh"
#include "planes.cuh"

namespace {

constexpr int THREADS = 512;  // most of a block
constexpr int VECTORS = 4;    // float4 a thread, where one block has the row: hidden <= 512 * 4 * 4
constexpr int CLUSTER = 4;    // blocks of a row, where tokens are few
constexpr uint32_t FEW_TOKENS = PEREGRINE_STEP_TOKENS;
constexpr int MAX_SLICES = 8;
static_assert(CLUSTER * THREADS >= THREADS * VECTORS, "one float4 a thread is enough");

// Sum over the warp; every lane gets it.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}
__device__ __forceinline__ float4 load(const float* from, uint32_t e) { return __ldg(reinterpret_cast<const float4*>(from) + e); }
__device__ __forceinline__ float sum(float4 v) { return (v.x + v.y) + (v.z + v.w); }
__device__ __forceinline__ void add(float4& a, float4 b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; }
__device__ __forceinline__ float squares(float4 v, float mean) {
    v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean;
    return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
}

// Of some values: how many, their mean, and the sum of the squares of their differences from it.
struct alignas(16) Moments {
    float count, mean, squares, none;
};

// The row's blocks, and the exchange of their warps' moments.
template <int BLOCKS>
struct Row {
    __device__ __forceinline__ static uint32_t rank() { return BLOCKS > 1 ? blockIdx.x % BLOCKS : 0; }
    // By all threads at the top. `all` waits for all warps' moments.
    __device__ __forceinline__ static void begin(uint64_t& all) {
#if __CUDA_ARCH__ >= 900
        if (BLOCKS == 1) return;
        if (threadIdx.x == 0) {
            barrier_init(&all, 1);
            barrier_init_done();
            barrier_expect(&all, BLOCKS * (blockDim.x / 32) * sizeof(Moments));
        }
        __syncwarp();
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    }
    // By all threads, in front of `give`: the others' barriers are there.
    __device__ __forceinline__ static void others_have_begun() {
#if __CUDA_ARCH__ >= 900
        if (BLOCKS > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    }
    // Lane r's to block r.
    __device__ __forceinline__ static void give(Moments* to, const Moments& m, uint64_t& all) {
        const uint32_t lane = threadIdx.x % 32;
        if (lane >= BLOCKS) return;
#if __CUDA_ARCH__ >= 900
        if (BLOCKS > 1) {
            const auto there = [&](const void* shared) {
                uint32_t at;
                asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(smem_address(shared)), "r"(lane));
                return at;
            };
            asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                         ::"r"(there(to)), "f"(m.count), "f"(m.mean), "f"(m.squares), "f"(m.none), "r"(there(&all)) : "memory");
            return;
        }
#endif
        *to = m;
    }
    // All warps' moments are here.
    __device__ __forceinline__ static void wait(uint64_t& all) {
#if __CUDA_ARCH__ >= 900
        if (BLOCKS > 1) {
            barrier_wait_cluster(&all, 0);
            return;
        }
#endif
        __syncthreads();
    }
};

// float4 of a block, of planes in whole units.
__host__ __device__ __forceinline__ uint32_t own_vectors(const LayernormParams& p, uint32_t blocks) {
    constexpr uint32_t unit = UNIT_INPUTS / 4;
    const uint32_t own = (p.hidden / 4 + blocks - 1) / blocks;
    return p.planes ? (own + unit - 1) / unit * unit : own;
}

// Four values of a row, number e of its float4, as planes. A half warp has a unit, four lanes a chunk of it: lane t inputs 4 t .. 4 t + 3.
// With lane t ^ 2 it makes two words of each plane, and stores one of them.
__device__ __forceinline__ void store_planes(const LayernormParams& p, float4 v, uint32_t e) {
    const uint32_t lane = threadIdx.x % 32, mask = 0xffffu << (lane & 16), row = blockIdx.x / CLUSTER;
    float most = larger(larger(v.x, v.y), larger(v.z, v.w));
#pragma unroll
    for (int step = 8; step; step /= 2) most = larger(most, __shfl_xor_sync(mask, most, step));
    const PlaneStep step(most);
    const int32_t a = step(v.x), b = step(v.y), c = step(v.z), d = step(v.w);
    const bool late = lane & 2;
    const auto word = [mask, late](uint32_t bytes) {
        const uint32_t other = __shfl_xor_sync(mask, bytes, 2);
        return late ? __byte_perm(other, bytes, 0x7362) : __byte_perm(bytes, other, 0x5140);
    };
    uint8_t* to = plane_unit(p.out, e / 16) + plane_chunk(row, e % 16 / 4) + (lane % 2 * 2 + late) * 4;
    *reinterpret_cast<uint32_t*>(to) = word(high_bytes(a, b, c, d));
    *reinterpret_cast<uint32_t*>(to + PLANE_BYTES) = word(low_bytes(a, b, c, d));
    if (e % 16 == 0) plane_steps(p.out, p.hidden)[e / 16 * PLANE_TOKENS + row] = step.step;
}

template <bool PARTIALS, int BLOCKS, int VECTORS>
__global__ void __launch_bounds__(THREADS) layernorm_kernel(const __grid_constant__ LayernormParams p) {
    overlap_next();
    constexpr int MOST = BLOCKS * THREADS / 32;
    __shared__ Moments shared[MOST];
    __shared__ uint64_t all;
    Row<BLOCKS>::begin(all);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const uint32_t vectors = p.hidden / 4, own = own_vectors(p, BLOCKS), first = Row<BLOCKS>::rank() * own;
    const uint32_t end = min(first + own, vectors);
    const size_t row = (size_t)(blockIdx.x / BLOCKS) * vectors;
    float4* x = reinterpret_cast<float4*>(p.x) + row;
    const float4* partials = reinterpret_cast<const float4*>(p.partials) + row;
    const size_t slice_stride = (size_t)p.tokens * vectors;
    float4 weight[VECTORS], bias[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const uint32_t e = min(first + i * blockDim.x + threadIdx.x, vectors - 1);
        if (BLOCKS > 1) weight[i] = load(p.weight, e), bias[i] = load(p.bias, e);
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
        }
        total += sum(v[i]), mine += 4.f;
    }
    Moments m = {warp_sum(mine), 0.f, 0.f, 0.f};
    m.mean = warp_sum(total) / fmaxf(m.count, 1.f);
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (first + i * blockDim.x + threadIdx.x < end) m.squares += squares(v[i], m.mean);
    m.squares = warp_sum(m.squares);
    Row<BLOCKS>::others_have_begun();
    Row<BLOCKS>::give(&shared[Row<BLOCKS>::rank() * warps + warp], m, all);
    Row<BLOCKS>::wait(all);
    // In one pass, about the mean of one of the warps: it is one of these, so what cancels is little.
    const float about = shared[0].mean;
    float weighed = 0.f, spread = 0.f;
    for (uint32_t w = lane; w < BLOCKS * warps; w += 32) {
        const float off = shared[w].mean - about;
        weighed += shared[w].count * off, spread += shared[w].squares + shared[w].count * off * off;
    }
    const float shift = warp_sum(weighed) / p.hidden, mean = about + shift;
    const float rstd = 1.f / sqrtf(fmaxf(warp_sum(spread) / p.hidden - shift * shift, 0.f) + p.epsilon);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        const uint32_t e = first + i * blockDim.x + threadIdx.x;
        if (e >= end) continue;
        if (PARTIALS) x[e] = v[i];
        float4 w = weight[i], b = bias[i];
        if (BLOCKS == 1) w = load(p.weight, e), b = load(p.bias, e);
        if (BLOCKS > 1 && p.planes) {
            store_planes(p, make_float4((v[i].x - mean) * rstd * w.x + b.x, (v[i].y - mean) * rstd * w.y + b.y,
                                        (v[i].z - mean) * rstd * w.z + b.z, (v[i].w - mean) * rstd * w.w + b.w), e);
            continue;
        }
        __half2 lo = __floats2half2_rn((v[i].x - mean) * rstd * w.x + b.x, (v[i].y - mean) * rstd * w.y + b.y);
        __half2 hi = __floats2half2_rn((v[i].z - mean) * rstd * w.z + b.z, (v[i].w - mean) * rstd * w.w + b.w);
        reinterpret_cast<uint2*>(p.out)[row + e] = make_uint2(*reinterpret_cast<uint32_t*>(&lo), *reinterpret_cast<uint32_t*>(&hi));
    }
}

template <int BLOCKS, int VECTORS>
int32_t run(const LayernormParams* p, const Launch* l, uint32_t threads) {
    const auto kernel = p->partials ? layernorm_kernel<true, BLOCKS, VECTORS> : layernorm_kernel<false, BLOCKS, VECTORS>;
    return launch(kernel, dim3(p->tokens * BLOCKS), threads, 0, l, *p, BLOCKS);
}

}  // namespace

extern "C" int32_t layernorm(const LayernormParams* p, const Launch* l) {
    if (p->tokens == 0 || p->hidden == 0 || p->hidden % 4 || p->hidden > THREADS * VECTORS * 4) return PEREGRINE_BAD_SHAPE;
    if (p->partials && p->slices > MAX_SLICES) return PEREGRINE_BAD_SHAPE;
    if (p->planes && (p->tokens > PLANE_TOKENS || p->hidden % UNIT_INPUTS || !hopper_multiprocessors<layernorm_kernel<true, CLUSTER, 1>>()))
        return PEREGRINE_BAD_SHAPE;
    if (p->tokens > FEW_TOKENS || !hopper_multiprocessors<layernorm_kernel<true, CLUSTER, 1>>()) return run<1, VECTORS>(p, l, THREADS);
    const uint32_t own = own_vectors(*p, CLUSTER);  // one a thread
    if (own > THREADS) return PEREGRINE_BAD_SHAPE;
    return run<CLUSTER, 1>(p, l, (own + 31) / 32 * 32);
}
