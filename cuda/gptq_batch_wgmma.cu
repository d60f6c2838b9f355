// gptq_batch_wgmma — gptq_batch on sm_90a: y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units.   Reference: reference.rs::gptq_matmul
#include "bulk.cuh"
#include "chain.cuh"
#include "gemm_output.cuh"
#include "launch.cuh"
#include "tma.cuh"

#ifndef FLIGHT
#define FLIGHT 3
#endif
#ifndef SETS
#define SETS 4
#endif
#ifndef GROUP
#define GROUP 1
#endif
#ifndef EARLY
#define EARLY FLIGHT
#endif
#ifndef X_STAGES
#define X_STAGES 3
#endif

namespace {

constexpr int WARPS = 12;                  // that multiply, one row tile each: three warpgroups
constexpr int THREADS = (WARPS + 2) * 32;  // and one warp that fetches weights, one activations
constexpr int UNITS = 4;                   // of a stage
constexpr int PAIR = 2;                    // blocks of a cluster, which share the activations
constexpr int SHARED_BYTES = 218 * 1024;

template <int SCALES_, bool ZEROS_, int TOKENS_>
struct BatchShape {
    static constexpr int SCALES = SCALES_, TOKENS = TOKENS_;
    static constexpr bool ZEROS = ZEROS_;
#ifdef EXACT
    static constexpr bool POWERS = false;
#else
    static constexpr bool POWERS = !ZEROS;
#endif
    using Units = GptqUnits<SCALES, ZEROS>;
    static constexpr int X_UNIT = TOKENS * TOKEN_BYTES;
    static constexpr int X_STAGE = UNITS * X_UNIT;
    static constexpr int W_TILE = UNITS * Units::BYTES;
    static constexpr int W_STAGE = WARPS * W_TILE;
    static constexpr int W_STAGES = (SHARED_BYTES - WARPS * TRANSPOSE_BYTES - 512 - X_STAGES * X_STAGE) / W_STAGE;
    // Shared memory: activations, weights, one transpose a warp, barriers.
    static constexpr int W_AT = X_STAGES * X_STAGE;
    static constexpr int TRANSPOSE_AT = W_AT + W_STAGES * W_STAGE;
    static constexpr int BARRIERS_AT = TRANSPOSE_AT + WARPS * TRANSPOSE_BYTES;
    static constexpr int BYTES = BARRIERS_AT + 2 * (W_STAGES + X_STAGES) * 8;
    static constexpr int IN_FLIGHT = FLIGHT < W_STAGES ? FLIGHT : W_STAGES;
    using Sums = float[TOKENS / 8][4];
};

struct BatchParams {
    CUtensorMap x;  // [k units][tokens][64] f16
    GptqMatmulParams p;
};

#if PEREGRINE_WGMMA

// A place in a ring of COUNT stages with a barrier for full and one for empty each.
template <int COUNT>
struct Place {
    uint32_t slot = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == COUNT) slot = 0, parity ^= 1;
    }
};

template <class Shape>
struct Barriers {
    uint64_t w_full[Shape::W_STAGES], w_empty[Shape::W_STAGES], x_full[X_STAGES], x_empty[X_STAGES];
};

// What a block multiplies.
struct Span {
    uint32_t slice, unit0, count, tile0, tiles;
    __device__ __forceinline__ explicit Span(const GptqMatmulParams& p) {
        const uint32_t row_tiles = p.w.n / UNIT_ROWS, k_units = p.w.k / UNIT_INPUTS;
        const uint32_t slice_units = (k_units + p.slices - 1) / p.slices;
        const uint32_t pair = blockIdx.x / PAIR, parts = gridDim.x / p.slices;
        const uint32_t part = pair / p.slices * PAIR + blockIdx.x % PAIR;
        slice = pair % p.slices;
        unit0 = slice * slice_units;
        count = min(slice_units, k_units - unit0);
        tile0 = part * row_tiles / parts;
        tiles = (part + 1) * row_tiles / parts - tile0;
    }
};

template <class Shape>
__device__ __forceinline__ void fetch_weights(const GptqMatmulParams& p, const Span& s, uint8_t* ring, Barriers<Shape>& b) {
    const uint32_t lane = threadIdx.x % 32, stages = (s.count + UNITS - 1) / UNITS;
    const uint8_t* from = p.w.units + ((size_t)(s.tile0 + (lane < s.tiles ? lane : 0)) * (p.w.k / UNIT_INPUTS) + s.unit0) * Shape::Units::BYTES;
    Place<Shape::W_STAGES> place, arrived;
    uint32_t waiting = 0;  // copies under way
    for (uint32_t j = 0; j < stages; j++) {
        if (j >= Shape::W_STAGES) barrier_wait(&b.w_empty[place.slot], place.parity ^ 1);
        if (waiting >= (j < Shape::W_STAGES ? EARLY : Shape::IN_FLIGHT)) {
            barrier_wait(&b.w_full[arrived.slot], arrived.parity);
            arrived.advance();
            waiting--;
        }
        waiting++;
        const uint32_t bytes = min((uint32_t)UNITS, s.count - j * UNITS) * Shape::Units::BYTES;
        if (lane == 0) barrier_expect(&b.w_full[place.slot], s.tiles * bytes);
        __syncwarp();
        if (lane < s.tiles) bulk_copy(ring + place.slot * Shape::W_STAGE + lane * Shape::W_TILE, from, bytes, &b.w_full[place.slot]);
        from += Shape::W_TILE;
        place.advance();
    }
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The box at (c0, c1, c2) to `to` of both blocks of the pair, and its bytes to `barrier` of each.
__device__ __forceinline__ void copy_box_to_pair(uint32_t to, const CUtensorMap& map, uint32_t c2, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %3, %4}], [%2], %5;"
        ::"r"(to), "l"(&map), "r"(smem_address(barrier)), "r"(0), "r"(c2), "h"((uint16_t)3) : "memory");
}
// Lane r arrives at block r's barrier.
__device__ __forceinline__ void release_activations(uint64_t* barrier) {
    if (threadIdx.x % 32 >= PAIR) return;
    asm volatile("{.reg .b32 at; mapa.shared::cluster.u32 at, %0, %1; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [at];}"
                 ::"r"(smem_address(barrier)), "r"(threadIdx.x % 32) : "memory");
}

// Each block of the pair asks for half of a stage's units, for both.
template <class Shape>
__device__ __forceinline__ void fetch_activations(const BatchParams& g, const Span& s, uint8_t* ring, Barriers<Shape>& b) {
    constexpr int HALF = UNITS / PAIR;
    const uint32_t stages = (s.count + UNITS - 1) / UNITS, first = blockIdx.x % PAIR * HALF;
    Place<X_STAGES> place;
    for (uint32_t j = 0; j < stages; j++) {
        if (j >= X_STAGES) barrier_wait(&b.x_empty[place.slot], place.parity ^ 1);
        barrier_expect(&b.x_full[place.slot], Shape::X_STAGE);
        copy_box_to_pair(smem_address(ring + place.slot * Shape::X_STAGE + first * Shape::X_UNIT), g.x, s.unit0 + j * UNITS + first,
                         &b.x_full[place.slot]);
        place.advance();
    }
}

// What a warp knows of its row tile: powers of two that bring the largest scale of rows g and g + 8 to 2^15 .. 2^16 and 2^11 .. 2^12, so that
// a weight is one multiply-add of its nibble, read as a subnormal f16 (2^-24 or 2^-20 times the code). Each row has its own, so that rows
// with small scales keep their digits; beside weights 2^16 times as large in the same row a weight loses some.
template <class Shape>
struct RowPowers {
    __half2 first, second;  // whose product the scales are multiplied by
    float low, high;        // what undoes it in the sums

    __device__ __forceinline__ RowPowers(const GptqMatmulParams& p, const Span& s, uint32_t lane) {
        const uint8_t* unit = p.w.units + ((size_t)(s.tile0 + (threadIdx.x / 32 < s.tiles ? threadIdx.x / 32 : 0)) * (p.w.k / UNIT_INPUTS) + s.unit0) *
                                              Shape::Units::BYTES + UNIT_CODE_BYTES;
        if (!Shape::POWERS) return;
        __half2 top[8] = {};
        for (uint32_t u = lane; s.tiles && u < s.count; u += 32)
#pragma unroll
            for (int i = 0; i < 2 * Shape::SCALES; i++) {
                const uint4 v = __ldg(reinterpret_cast<const uint4*>(unit + (size_t)u * Shape::Units::BYTES) + i);
                const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int j = 0; j < 4; j++) top[i % 2 * 4 + j] = __hmax2(top[i % 2 * 4 + j], __habs2(as_half2(words[j])));
            }
        __half2 mine = top[0];
#pragma unroll
        for (int g = 0; g < 8; g++) {
#pragma unroll
            for (int step = 16; step; step /= 2) top[g] = __hmax2(top[g], as_half2(__shfl_xor_sync(~0u, as_u32(top[g]), step)));
            if (lane / 4 == g) mine = top[g];
        }
        const int a = 15 - exponent(__low2float(mine)), b = 11 - exponent(__high2float(mine));
        first = __floats2half2_rn(power(a / 2), power(b / 2));
        second = __floats2half2_rn(power(a - a / 2), power(b - b / 2));
        low = power(24 - a), high = power(20 - b);
    }
    __device__ __forceinline__ static int exponent(float v) { return max((int)(__float_as_uint(v) >> 23) - 127, -15); }
    __device__ __forceinline__ static float power(int e) { return __uint_as_float((uint32_t)(e + 127) << 23); }
};

// The A registers of a unit: f16(scale * (code - zero)), AutoGPTQ's own weight; without zero points times a power of two, see RowPowers.
template <class Shape>
__device__ __forceinline__ void unpack(const typename Shape::Units::Raw& raw, const RowPowers<Shape>& powers, uint32_t (&a)[STEPS][4]) {
    const uint32_t words[4] = {raw.codes.x, raw.codes.y, raw.codes.z, raw.codes.w};
#pragma unroll
    for (int h = 0; h < Shape::SCALES; h++) {
        __half2 scale = raw.scale[h], bias;
        if (Shape::POWERS) {
            scale = __hmul2(__hmul2(scale, powers.first), powers.second);
            bias = __hmul2(scale, as_half2(0x80808008));  // -8 * 2^-24, -8 * 2^-20
        }
        const __half2 low = __low2half2(scale), high = __high2half2(scale);
#pragma unroll
        for (int s = h * STEPS / Shape::SCALES; s < (h + 1) * STEPS / Shape::SCALES; s++) {
            if (!Shape::POWERS) {
                unpack_exact(words[s], ExactBias(raw.zero[h]), a[s]);
#pragma unroll
                for (int i = 0; i < 4; i++) a[s][i] = as_u32(__hmul2(as_half2(a[s][i]), i % 2 ? high : low));
            } else {
                unpack_subnormal(words[s], a[s]);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    a[s][i] = as_u32(__hfma2(as_half2(a[s][i]), i % 2 ? high : low, i % 2 ? __high2half2(bias) : __low2half2(bias)));
            }
        }
    }
}

__device__ __forceinline__ uint64_t wgmma_descriptor_of(uint32_t sixteenths) {
    return (uint64_t)sixteenths | (uint64_t)0x40000040u << 32;
}

// acc = this warp's row tile times the tokens. While the tensor cores work on one unit, the next is unpacked into the other registers and
// the one after that is on its way from shared memory.
template <class Shape>
__device__ __forceinline__ void multiply(typename Shape::Sums& acc, const Span& s, const RowPowers<Shape>& powers, uint8_t* smem,
                                         Barriers<Shape>& b) {
    const uint32_t lane = threadIdx.x % 32, stages = (s.count + UNITS - 1) / UNITS;
    const uint8_t* mine = smem + Shape::W_AT + threadIdx.x / 32 * Shape::W_TILE;
    const uint32_t x = smem_address(smem);
    Place<Shape::W_STAGES> w_place;
    Place<X_STAGES> x_place;
    uint32_t a[2][STEPS][4] = {};
    typename Shape::Units::Raw raw;
    const uint8_t* stage = mine;
    barrier_wait(&b.w_full[0], 0);
    raw.load(stage, lane);
    unpack<Shape>(raw, powers, a[0]);
    raw.load(stage + Shape::Units::BYTES, lane);
    for (uint32_t j = 0; j < stages; j++) {
        const uint32_t units = s.count - j * UNITS;  // that are left
        const uint32_t x_stage = __shfl_sync(~0u, (x + x_place.slot * Shape::X_STAGE) / 16 | 1u << 16, 0);
        barrier_wait(&b.x_full[x_place.slot], x_place.parity);
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            if (u > 0 && u >= units) break;
            uint32_t(&now)[STEPS][4] = a[u % 2], (&next)[STEPS][4] = a[(u + 1) % 2];
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < STEPS; i++) wgmma(acc, now[i], wgmma_descriptor_of(x_stage + (u * Shape::X_UNIT / 16 + i * 2)), 1);
            wgmma_commit();
            wgmma_wait<1>();
            // The compiler does not know that the registers were in use until here.
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                asm volatile("" : "+r"(next[i][0]), "+r"(next[i][1]), "+r"(next[i][2]), "+r"(next[i][3])::"memory");
            if (u == 0 && j > 0) release_activations(&b.x_empty[x_place.slot == 0 ? X_STAGES - 1 : x_place.slot - 1]);
            unpack<Shape>(raw, powers, next);
            if (u + 2 == UNITS) {
                __syncwarp();
                if (lane == 0) barrier_arrive(&b.w_empty[w_place.slot]);
                w_place.advance();
                stage = mine + w_place.slot * Shape::W_STAGE;
                if (j + 1 < stages) barrier_wait(&b.w_full[w_place.slot], w_place.parity);
            }
            raw.load(stage + (u + 2) % UNITS * Shape::Units::BYTES, lane);
        }
        x_place.advance();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++)
        asm volatile("" : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])::"memory");
    if (Shape::POWERS)
#pragma unroll
        for (int n = 0; n < Shape::TOKENS / 8; n++)
            acc[n][0] *= powers.low, acc[n][1] *= powers.low, acc[n][2] *= powers.high, acc[n][3] *= powers.high;
}

#endif

#ifdef STAMP
__device__ __forceinline__ void stamp(const GptqMatmulParams& p, int i) {
    if (threadIdx.x % 32 || !p.split_flags) return;
    unsigned long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    reinterpret_cast<unsigned long long*>(p.split_flags)[blockIdx.x * 8 + i] = t;
}
#define STAMP_AT(w, i) if (threadIdx.x / 32 == w) stamp(g.p, i)
#else
#define STAMP_AT(w, i)
#endif

template <class Shape>
__global__ void __maxnreg__(104) gptq_batch_wgmma_kernel(const __grid_constant__ BatchParams g) {
#if PEREGRINE_WGMMA
    overlap_next();
    extern __shared__ __align__(1024) uint8_t smem[];
    Barriers<Shape>& b = *reinterpret_cast<Barriers<Shape>*>(smem + Shape::BARRIERS_AT);
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::W_STAGES; i++) barrier_init(&b.w_full[i], 1), barrier_init(&b.w_empty[i], WARPS);
        for (int i = 0; i < X_STAGES; i++) barrier_init(&b.x_full[i], 1), barrier_init(&b.x_empty[i], PAIR * WARPS);
        barrier_init_done();
    }
    __syncthreads();
    cluster_arrive();
    const Span s(g.p);
    STAMP_AT(0, 0);
    if (warp == WARPS) {
        fetch_weights<Shape>(g.p, s, smem + Shape::W_AT, b);
        STAMP_AT(WARPS, 4);
        wait_previous();
        cluster_wait();
    } else if (warp > WARPS) {
        prefetch_map(g.x);
        wait_previous();
        cluster_wait();  // the other block has its barriers
        if (threadIdx.x % 32 == 0) fetch_activations<Shape>(g, s, smem, b);
        __syncwarp();
    } else {
        const RowPowers<Shape> powers(g.p, s, threadIdx.x % 32);
        wait_previous();
        cluster_wait();
        STAMP_AT(0, 1);
        typename Shape::Sums acc = {};
        multiply<Shape>(acc, s, powers, smem, b);
        STAMP_AT(0, 2);
        if (warp < s.tiles) {
            const uint32_t row = (s.tile0 + warp) * UNIT_ROWS;
            if (g.p.y.partials || g.p.y.residual) store_floats<Shape::TOKENS>(g.p, s.slice, row, 0, acc);
            else store_halves<Shape::TOKENS>(g.p, row, 0, acc, smem + Shape::TRANSPOSE_AT + warp * TRANSPOSE_BYTES);
        }
        STAMP_AT(0, 3);
    }
    cluster_arrive();
    cluster_wait();  // nobody writes to a block that has ended
#endif
}

template <class Shape>
int32_t run(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    const bool halves = !p->y.partials && !p->y.residual;
    if (halves && (p->y.out_stride % 8 || p->y.gelu_stride % 8)) return PEREGRINE_BAD_SHAPE;  // 16-byte stores
    BatchParams g = {{}, *p};
    const cuuint64_t k_units = p->w.k / UNIT_INPUTS;
    const TensorShape<3> x = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {UNIT_INPUTS, p->tokens, k_units}, {(cuuint64_t)p->x_stride * 2, TOKEN_BYTES},
                              {UNIT_INPUTS, Shape::TOKENS, UNITS / PAIR}, CU_TENSOR_MAP_SWIZZLE_128B};
    const cudaError_t e = make_tensor_map(&g.x, p->x, x);
    if (e != cudaSuccess) return (int32_t)e;
    const uint32_t tiles = p->w.n / UNIT_ROWS, least = (tiles + WARPS - 1) / WARPS;
    const uint32_t parts = (max(min(multiprocessors / p->slices, tiles + 1) / PAIR * PAIR, least) + PAIR - 1) / PAIR * PAIR;
    return launch(gptq_batch_wgmma_kernel<Shape>, dim3(parts * p->slices), THREADS, Shape::BYTES, l, g, PAIR);
}

template <int SCALES, bool ZEROS>
int32_t run_tokens(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    if (p->tokens <= 16) return run<BatchShape<SCALES, ZEROS, 16>>(p, l, multiprocessors);
    if (p->tokens <= 32) return run<BatchShape<SCALES, ZEROS, 32>>(p, l, multiprocessors);
    return run<BatchShape<SCALES, ZEROS, 64>>(p, l, multiprocessors);
}

}  // namespace

uint32_t gptq_batch_wgmma_multiprocessors() { return hopper_multiprocessors(gptq_batch_wgmma_kernel<BatchShape<1, false, 16>>); }

int32_t gptq_batch_wgmma(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    switch (p->w.scales_per_row * 2 + p->w.has_zeros) {
        case 2: return run_tokens<1, false>(p, l, multiprocessors);
        case 3: return run_tokens<1, true>(p, l, multiprocessors);
        case 4: return run_tokens<2, false>(p, l, multiprocessors);
        case 5: return run_tokens<2, true>(p, l, multiprocessors);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
