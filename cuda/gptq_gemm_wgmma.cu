// gptq_gemm_wgmma — gptq_gemm on sm_90a: y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units, any number of tokens.
// Reference: reference.rs::gptq_matmul
#include "bulk.cuh"
#include "chain.cuh"
#include "gemm_plan.cuh"
#include "launch.cuh"
#include "tma.cuh"

#ifndef GELU
#define GELU gelu_quick
#endif
namespace {

constexpr int SHARED_BYTES = 227 * 1024;
constexpr int TRANSPOSE_BYTES = 512;  // a warp: 16 tokens x 16 rows of f16

// A block has GROUPS warpgroups that multiply, 64 rows each, and one that fetches.
template <int SCALES_, bool ZEROS_, int TOKENS_>
struct GemmShape {
    static constexpr int SCALES = SCALES_, TOKENS = TOKENS_;
    static constexpr bool ZEROS = ZEROS_;
    using Units = GptqUnits<SCALES, ZEROS>;
    static constexpr int GROUPS = TOKENS > 128 ? 2 : 4;
    static constexpr int THREADS = (GROUPS + 1) * 128;
    static constexpr int FETCH_REGISTERS = GROUPS == 2 ? 40 : 32, MULTIPLY_REGISTERS = GROUPS == 2 ? 232 : 112;
    static constexpr int TILE_UNITS = GROUPS * 4;  // row tiles of 16
    static_assert(TILE_UNITS * UNIT_ROWS * TOKENS <= PEREGRINE_GEMM_TILE && GROUPS <= PEREGRINE_GEMM_GROUPS, "what the caller makes room for");
    static constexpr int X_BYTES = TOKENS * TOKEN_BYTES;
    static constexpr int W_BYTES = TILE_UNITS * Units::BYTES;
    static constexpr int STAGE_BYTES = (X_BYTES + W_BYTES + 1023) / 1024 * 1024;
    static constexpr int EXTRA_BYTES = GROUPS * 4 * TRANSPOSE_BYTES + 1024;  // and barriers
    static constexpr int FIT = (SHARED_BYTES - EXTRA_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FIT < 16 ? FIT : 16;
    using Sums = float[TOKENS / 8][4];
};

struct GemmParams {
    CUtensorMap w, x;  // [row tiles][k units][unit words] u32; [tokens][k] f16
    GptqMatmulParams p;
    GemmPlan plan;
};

#if PEREGRINE_WGMMA

// A place in the ring of stages. `full` is passed when a stage's copies are in, `empty` when all warps that multiply have left it.
template <class Shape>
struct Ring {
    uint8_t* stages;
    uint64_t* barriers;  // [STAGES] full, [STAGES] empty
    uint32_t slot = 0, parity = 0;

    __device__ __forceinline__ explicit Ring(uint8_t* smem)
        : stages(smem), barriers(reinterpret_cast<uint64_t*>(smem + Shape::STAGES * Shape::STAGE_BYTES + Shape::GROUPS * 4 * TRANSPOSE_BYTES)) {}
    __device__ __forceinline__ uint8_t* stage() const { return stages + slot * Shape::STAGE_BYTES; }
    __device__ __forceinline__ uint64_t* full() const { return barriers + slot; }
    __device__ __forceinline__ uint64_t* empty() const { return barriers + Shape::STAGES + slot; }
    __device__ __forceinline__ void advance() {
        if (++slot == Shape::STAGES) slot = 0, parity ^= 1;
    }
    // Leaves the stage BACK before this one.
    template <int BACK>
    __device__ __forceinline__ void release() const {
        barrier_arrive(barriers + Shape::STAGES + (slot < BACK ? slot + Shape::STAGES : slot) - BACK);
    }
};

struct TilePlace {
    uint32_t tile0, token0, slice;  // row tile of 16
    __device__ __forceinline__ TilePlace(const GemmPlan& plan, uint32_t tile, uint32_t tile_units, uint32_t tokens)
        : tile0(tile / plan.token_tiles % plan.row_tiles * tile_units), token0(tile % plan.token_tiles * tokens),
          slice(tile / plan.token_tiles / plan.row_tiles) {}
};

// The thread that asks for all stages. Weights are nobody's output, so a first ring of them is asked for before the predecessor in the
// stream has finished.
template <class Shape>
__device__ __forceinline__ void fetch(const GemmParams& g, Ring<Shape> ring, uint32_t share_index) {
    const uint64_t w_hint = g.plan.token_tiles == 1 ? L2_EVICT_FIRST : L2_NORMAL;
    const auto fetch_weights = [&](const Ring<Shape>& at, const TilePlace& place, uint32_t unit) {
        barrier_expect(at.full(), Shape::X_BYTES + Shape::W_BYTES);
        copy_box(smem_address(at.stage()) + Shape::X_BYTES, g.w, 0, unit, place.tile0, at.full(), w_hint);
    };
    prefetch_map(g.w);
    prefetch_map(g.x);
    GemmSegment s;
    uint32_t early = 0;  // stages whose weights were asked for
    {
        Ring<Shape> ahead = ring;
        for (GemmWalk walk(g.plan, share_index); early < Shape::STAGES && walk.next(s);) {
            const TilePlace place(g.plan, s.tile, Shape::TILE_UNITS, Shape::TOKENS);
            for (uint32_t u = s.begin; u < s.end && early < Shape::STAGES; u++, early++) {
                fetch_weights(ahead, place, u);
                ahead.advance();
            }
        }
    }
    wait_previous();
    for (GemmWalk walk(g.plan, share_index); walk.next(s);) {
        const TilePlace place(g.plan, s.tile, Shape::TILE_UNITS, Shape::TOKENS);
        for (uint32_t u = s.begin; u < s.end; u++) {
            if (early == 0) {
                barrier_wait(ring.empty(), ring.parity ^ 1);
                fetch_weights(ring, place, u);
            } else {
                early--;
            }
            copy_box(smem_address(ring.stage()), g.x, u * UNIT_INPUTS, place.token0, ring.full(), L2_NORMAL);
            ring.advance();
        }
    }
}

// The A registers of a unit: f16(scale * (code - zero)), AutoGPTQ's own weight.
template <class Shape>
__device__ __forceinline__ void unpack(const typename Shape::Units::Raw& raw, uint32_t (&a)[STEPS][4]) {
    const uint32_t words[4] = {raw.codes.x, raw.codes.y, raw.codes.z, raw.codes.w};
#pragma unroll
    for (int h = 0; h < Shape::SCALES; h++) {
        const ExactBias bias(raw.zero[h]);
        const __half2 low = __low2half2(raw.scale[h]), high = __high2half2(raw.scale[h]);
#pragma unroll
        for (int s = h * STEPS / Shape::SCALES; s < (h + 1) * STEPS / Shape::SCALES; s++) {
            unpack_exact(words[s], bias, a[s]);
#pragma unroll
            for (int i = 0; i < 4; i++) a[s][i] = as_u32(__hmul2(as_half2(a[s][i]), i % 2 ? high : low));
        }
    }
}

// acc = this warp's rows times the stage's tokens, over `units` stages. While the tensor cores work on one unit, the next is unpacked
// into the other set of registers.
template <class Shape>
__device__ __forceinline__ void multiply(typename Shape::Sums& acc, Ring<Shape>& ring, uint32_t units, uint32_t offset) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t a[2][STEPS][4] = {};
    typename Shape::Units::Raw raw;
    barrier_wait(ring.full(), ring.parity);
    raw.load(ring.stage() + offset, lane);
    unpack<Shape>(raw, a[0]);
    uint32_t u = 0;
    const auto step = [&](uint32_t (&now)[STEPS][4], uint32_t (&next)[STEPS][4]) {
        const uint64_t x = wgmma_descriptor(smem_address(ring.stage()));
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < STEPS; s++) wgmma(acc, now[s], x + s * 2, s > 0 || u > 0);
        wgmma_commit();
        ring.advance();
        if (u + 1 < units) {
            barrier_wait(ring.full(), ring.parity);
            raw.load(ring.stage() + offset, lane);
        }
        wgmma_wait<1>();
        // The compiler does not know that the registers were in use until here.
#pragma unroll
        for (int s = 0; s < STEPS; s++) asm volatile("" : "+r"(next[s][0]), "+r"(next[s][1]), "+r"(next[s][2]), "+r"(next[s][3])::"memory");
        if (u > 0 && lane == 0) ring.template release<2>();
        unpack<Shape>(raw, next);
    };
    for (;;) {
        step(a[0], a[1]);
        if (++u == units) break;
        step(a[1], a[0]);
        if (++u == units) break;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++) asm volatile("" : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])::"memory");
    if (lane == 0) ring.template release<1>();
}

__device__ __forceinline__ void warpgroup_barrier(uint32_t group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Sums of a part of a tile that another block stores: [share index][warpgroup][float4][thread].
template <class Shape>
__device__ __forceinline__ float4* split_sums(const GptqMatmulParams& p, uint32_t share_index, uint32_t group) {
    return reinterpret_cast<float4*>(p.split_sums) + ((size_t)share_index * Shape::GROUPS + group) * (Shape::TOKENS / 8) * 128 +
           threadIdx.x % 128;
}

template <class Shape>
__device__ __forceinline__ void give_sums(const GptqMatmulParams& p, const typename Shape::Sums& acc, uint32_t share_index, uint32_t group) {
    float4* to = split_sums<Shape>(p, share_index, group);
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++) __stcg(to + n * 128, make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]));
    __threadfence();
    warpgroup_barrier(group);
    if (threadIdx.x % 128 == 0)
        asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(p.split_flags + share_index * PEREGRINE_GEMM_GROUPS + group) : "memory");
}

// Adds what block `share_index` gave, and clears its flag for the next launch.
template <class Shape>
__device__ __forceinline__ void take_sums(const GptqMatmulParams& p, typename Shape::Sums& acc, uint32_t share_index, uint32_t group) {
    uint32_t* flag = p.split_flags + share_index * PEREGRINE_GEMM_GROUPS + group;
    if (threadIdx.x % 128 == 0) {
        uint32_t given;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(given) : "l"(flag) : "memory");
        while (!given);
        *flag = 0;
    }
    warpgroup_barrier(group);
    const float4* from = split_sums<Shape>(p, share_index, group);
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++) {
        const float4 v = __ldcg(from + n * 128);
        acc[n][0] += v.x, acc[n][1] += v.y, acc[n][2] += v.z, acc[n][3] += v.w;
    }
}

// GELU by erfc(z) = t (c1 + t (c2 + ...)) exp(-z^2), t = 1 / (1 + p z), z = |v| / sqrt 2 (Abramowitz and Stegun 7.1.26: within 1.5e-7);
// 14 instructions where erff takes some 30, and no branch.
__device__ __forceinline__ float gelu_quick(float v) {
    float t, e;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(fabsf(v), 0.3275911f * 0.70710678f, 1.f)));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * v * (-0.5f * 1.44269504f)));
    const float half_erfc = t * e * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 0.5307027145f, -0.7265760135f), 0.7107068705f), -0.142248368f), 0.127414796f);
    return fmaxf(v, 0.f) - fabsf(v) * half_erfc;
}

// One row tile's sums as f16, 16 tokens at a time through shared memory, so that a token's 16 rows are stored as one sector.
template <int TOKENS>
__device__ __forceinline__ void store_halves(const GptqMatmulParams& p, uint32_t row, uint32_t token0, const float (&acc)[TOKENS / 8][4],
                                             uint8_t* transpose) {
    const uint32_t lane = threadIdx.x % 32;
    const GptqOutput& y = p.y;
    const bool plain = row < y.split_row;
    const float bias_low = y.bias ? y.bias[row + lane / 4] : 0.f, bias_high = y.bias ? y.bias[row + lane / 4 + 8] : 0.f;
    uint16_t* out = plain ? y.out + row : y.gelu_out + (row - y.split_row);
    const uint32_t stride = plain ? y.out_stride : y.gelu_stride;
    // Matrix i of the four: rows 8 (i % 2), tokens 8 (i / 2); lane l names token l % 8 of matrix l / 8.
    const uint32_t to = smem_address(transpose) + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16;
    const auto pair = [&](float v0, float v1, float bias) {
        v0 += bias, v1 += bias;
        if (!plain) v0 = GELU(v0), v1 = GELU(v1);
        return as_u32(__floats2half2_rn(v0, v1));
    };
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
        const uint32_t r[4] = {pair(acc[n][0], acc[n][1], bias_low), pair(acc[n][2], acc[n][3], bias_high),
                               pair(acc[n + 1][0], acc[n + 1][1], bias_low), pair(acc[n + 1][2], acc[n + 1][3], bias_high)};
        __syncwarp();
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                     "r"(r[3]) : "memory");
        __syncwarp();
        const uint4 v = *reinterpret_cast<const uint4*>(transpose + lane * 16);
        const uint32_t m = token0 + n * 8 + lane / 2;
        if (m < p.tokens) *reinterpret_cast<uint4*>(out + (size_t)m * stride + lane % 2 * 8) = v;
    }
}

// One row tile's sums as f32: to the partials, or added to the residual, where each element has this one writer.
template <int TOKENS>
__device__ __forceinline__ void store_floats(const GptqMatmulParams& p, uint32_t slice, uint32_t row, uint32_t token0,
                                             const float (&acc)[TOKENS / 8][4]) {
    const uint32_t lane = threadIdx.x % 32, row_low = row + lane / 4;
    const bool partials = p.y.partials;
    float* out = partials ? p.y.partials + (size_t)slice * p.tokens * p.w.n : p.y.residual;
    const float bias[2] = {!partials && p.y.bias ? p.y.bias[row_low] : 0.f, !partials && p.y.bias ? p.y.bias[row_low + 8] : 0.f};
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t m = token0 + n * 8 + lane % 4 * 2 + e % 2;
            if (m >= p.tokens) continue;
            float* to = out + (size_t)m * p.w.n + row_low + e / 2 * 8;
            if (partials) *to = acc[n][e];
            else asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(acc[n][e] + bias[e / 2]) : "memory");
        }
}

template <class Shape>
__device__ __forceinline__ void multiply_segments(const GemmParams& g, Ring<Shape> ring, uint32_t share_index, uint32_t group) {
    const uint32_t unit = threadIdx.x / 32;  // this warp's of a stage
    uint8_t* transpose = ring.stages + Shape::STAGES * Shape::STAGE_BYTES + unit * TRANSPOSE_BYTES;
    GemmSegment s;
#ifdef STAG
    if (group % 2) { const uint32_t t0 = clock(); barrier_wait(ring.full(), 0); while (clock() - t0 < STAG) ; }
#endif
    for (GemmWalk walk(g.plan, share_index); walk.next(s);) {
        typename Shape::Sums acc;
        multiply<Shape>(acc, ring, s.end - s.begin, Shape::X_BYTES + unit * Shape::Units::BYTES);
        if (!s.owner) {
            give_sums<Shape>(g.p, acc, share_index, group);
            continue;
        }
        const uint32_t tile_end = (s.tile - g.plan.whole + 1) * g.plan.k_units;
        for (uint32_t other = share_index + 1; !s.complete && other < g.plan.blocks && g.plan.share(other) < tile_end; other++)
            take_sums<Shape>(g.p, acc, other, group);
        const TilePlace place(g.plan, s.tile, Shape::TILE_UNITS, Shape::TOKENS);
        const uint32_t row = (place.tile0 + unit) * UNIT_ROWS;
        if (row >= g.p.w.n) continue;
        if (g.p.y.partials || g.p.y.residual) store_floats<Shape::TOKENS>(g.p, place.slice, row, place.token0, acc);
        else store_halves<Shape::TOKENS>(g.p, row, place.token0, acc, transpose);
    }
}

#endif

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) gptq_gemm_wgmma_kernel(const __grid_constant__ GemmParams g) {
#if PEREGRINE_WGMMA
    overlap_next();
    extern __shared__ __align__(1024) uint8_t smem[];
    Ring<Shape> ring(smem);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::STAGES; i++) {
            barrier_init(ring.barriers + i, 1);
            barrier_init(ring.barriers + Shape::STAGES + i, Shape::GROUPS * 4);
        }
        barrier_init_done();
    }
    __syncthreads();
    const uint32_t share_index = gridDim.x - 1 - blockIdx.x, group = threadIdx.x / 128;
    if (group == Shape::GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::FETCH_REGISTERS));
        if (threadIdx.x == Shape::GROUPS * 128) fetch<Shape>(g, ring, share_index);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::MULTIPLY_REGISTERS));
        wait_previous();
        multiply_segments<Shape>(g, ring, share_index, group);
    }
#endif
}

template <class Shape>
int32_t run(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    constexpr uint32_t WORDS = Shape::Units::BYTES / 4;
    const bool halves = !p->y.partials && !p->y.residual;
    if (halves && (p->y.out_stride % 8 || p->y.gelu_stride % 8)) return PEREGRINE_BAD_SHAPE;  // 16-byte stores
    const uint32_t k_units = p->w.k / UNIT_INPUTS, tiles = p->w.n / UNIT_ROWS;
    const GemmPlan plan((tiles + Shape::TILE_UNITS - 1) / Shape::TILE_UNITS, (p->tokens + Shape::TOKENS - 1) / Shape::TOKENS, p->slices, k_units,
                        multiprocessors, p->split_sums && p->split_flags);
    GemmParams g = {{}, {}, *p, plan};
    const TensorShape<3> w = {CU_TENSOR_MAP_DATA_TYPE_UINT32, {WORDS, k_units, tiles}, {WORDS * 4, (cuuint64_t)WORDS * 4 * k_units},
                              {WORDS, 1, Shape::TILE_UNITS}, CU_TENSOR_MAP_SWIZZLE_NONE};
    const TensorShape<2> x = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {p->w.k, p->tokens}, {(cuuint64_t)p->x_stride * 2},
                              {UNIT_INPUTS, Shape::TOKENS}, CU_TENSOR_MAP_SWIZZLE_128B};
    cudaError_t e = make_tensor_map(&g.w, p->w.units, w);
    if (e == cudaSuccess) e = make_tensor_map(&g.x, p->x, x);
    if (e != cudaSuccess) return (int32_t)e;
    constexpr size_t smem = (size_t)Shape::STAGES * Shape::STAGE_BYTES + Shape::EXTRA_BYTES;
    return launch(gptq_gemm_wgmma_kernel<Shape>, dim3(plan.blocks), Shape::THREADS, smem, l, g);
}

// Tokens of a tile: the fewest columns in all, where a tile costs some 12 columns' time beside its own.
uint32_t tile_tokens(uint32_t tokens) {
    constexpr uint32_t SIZES[] = {256, 128, 96, 80, 64, 32, 16};
    uint32_t best = 0, least = ~0u;
    for (uint32_t size : SIZES) {
        const uint32_t cost = (tokens + size - 1) / size * (size + 12);
        if (cost < least) least = cost, best = size;
    }
    return best;
}

template <int SCALES, bool ZEROS>
int32_t run_tokens(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    switch (tile_tokens(p->tokens)) {
        case 16: return run<GemmShape<SCALES, ZEROS, 16>>(p, l, multiprocessors);
        case 32: return run<GemmShape<SCALES, ZEROS, 32>>(p, l, multiprocessors);
        case 64: return run<GemmShape<SCALES, ZEROS, 64>>(p, l, multiprocessors);
        case 80: return run<GemmShape<SCALES, ZEROS, 80>>(p, l, multiprocessors);
        case 96: return run<GemmShape<SCALES, ZEROS, 96>>(p, l, multiprocessors);
        case 128: return run<GemmShape<SCALES, ZEROS, 128>>(p, l, multiprocessors);
        default: return run<GemmShape<SCALES, ZEROS, 256>>(p, l, multiprocessors);
    }
}

}  // namespace

uint32_t gptq_gemm_wgmma_multiprocessors() {
    int device = 0, major = 0, minor = 0, multiprocessors = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major != 9 || minor != 0) return 0;
    // A build without sm_90a runs the PTX of an older target here, in which the kernel is empty.
    cudaFuncAttributes kernel;
    if (cudaFuncGetAttributes(&kernel, gptq_gemm_wgmma_kernel<GemmShape<1, false, 128>>) != cudaSuccess || kernel.ptxVersion < 90) return 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    return (uint32_t)multiprocessors;
}

int32_t gptq_gemm_wgmma(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    switch (p->w.scales_per_row * 2 + p->w.has_zeros) {
        case 2: return run_tokens<1, false>(p, l, multiprocessors);
        case 3: return run_tokens<1, true>(p, l, multiprocessors);
        case 4: return run_tokens<2, false>(p, l, multiprocessors);
        case 5: return run_tokens<2, true>(p, l, multiprocessors);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
