// gptq_gemm_wgmma — gptq_gemm on sm_90a: y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units.   Reference: reference.rs::gptq_matmul
// Shapes   as gptq_gemm: any number of tokens, made for more than 64; out_stride and gelu_stride multiples of 8.
// Reads    W once per 256 tokens (128 and fewer: once), x once per 128 to 256 rows, through L2.   Writes see GptqOutput.
// Mapping  one block a multiprocessor, which stays for the whole product (gemm_plan.cuh). A block's warpgroups multiply 64 rows each by
//          TOKENS tokens: weights are wgmma's A operand, in registers, unpacked while the tensor cores work on the unit before; a stage's
//          activations are B, in shared memory. One thread fetches the stages, one unit (64 inputs) each, by two tensor-map copies.
// Numbers  a weight is f16(scale * (code - zero)), AutoGPTQ's own definition of it: one multiplication for two weights instead of 128
//          f32 multiply-adds a thread and unit. All units of a segment are one chain of the tensor core, whose f32 adds truncate: relative
//          error 2.5e-5 over 22720 inputs, 4.9e-6 over 4544 (f16 outputs: 2.1e-4, their rounding). Sums of shared tiles are added in order.
// Tokens   a tile has the multiple of 16, 32, 64, 80, 96, 128 or 256 that leaves the least work; groups of rows so that sums, two units
//          of weights and addresses fit the registers: 2 x 64 rows (256 tokens: 128 registers of sums), 3 (80 to 128) or 4.
// Shared   activations [TOKENS][64] f16 with the 128-byte swizzle; then the units of the row tiles as they lie in memory.
// Floor    2 n k FLOP a token at 700 TFLOP/s: [qkv ; up] 152, 608 us at 512, 2048 tokens; below some 80 tokens 55 MB at 4.70 TB/s.
// Measured beside torch.matmul on the unpacked f16 weights, both inside graphs, alternating, cold weights; H200, us:
//              tokens        65    128          129    257    512         1024        2048
//              [qkv ; up]    36.8  46.6 / 55.3  65.2   109    151 / 143   289 / 277   571 / 562
//              [down|dense]  41.6  51.1 / 62.6  70.0   107    148 / 141   283 / 275   556 / 535
//          0.82 and 0.84 of torch at 128 tokens, 1.016 to 1.058 from 512 on. The GPU throttles at these rates (1.4 to 1.7 of 1.98 GHz):
//          there, energy is time, and after seconds of it 2048 tokens take 650. Groups of 32 and zero points: 0.98 to 1.03 of these times.
//          (*) below: on an H100, from a run whose flags of shared tiles were out of bounds.
// Tried    on the H200, before the tile was 128 rows x 256 tokens, it was 256 x 128, two blocks of 64 rows a warpgroup: twice the
//          unpacking; 1.11 to 1.20 of torch at 2048 tokens, where the same without unpacking and without weights had 1.00 to 1.10.
//          Units fetched by 16 bulk copies of 544 bytes instead of a map: 45 instead of 28 us at 16 tokens, 938 for 676 at 2048.
//          erff in the epilogue (*): 8 us of 174 at 512 tokens. Starting the second warpgroup 1500 to 4500 cycles late, so that one's
//          epilogue falls on the other's products: no difference. Cutting a whole round of tiles besides what is left over: 855 us instead
//          of 635 ([down | dense], 2048 tokens; (*)): blocks at different inputs of the same tokens push them out of L2.
// Short    at 16 to 64 tokens 29 to 42 us: gptq_batch is faster there. Just above a tile's tokens: 65 take 78 us a layer, 129 take 135 and
//          257 take 216, where 1.35 of the floor and 10 us are 62, 113 and 215. Others from 255 on are within 1.10 of the floor.
#include "bulk.cuh"
#include "chain.cuh"
#include "gemm_output.cuh"
#include "gemm_plan.cuh"
#include "launch.cuh"
#include "tma.cuh"

namespace {

constexpr int SHARED_BYTES = 227 * 1024;

// A block has GROUPS warpgroups that multiply, 64 rows each, and one that fetches.
template <int SCALES_, bool ZEROS_, int TOKENS_>
struct GemmShape {
    static constexpr int SCALES = SCALES_, TOKENS = TOKENS_;
    static constexpr bool ZEROS = ZEROS_;
    using Units = GptqUnits<SCALES, ZEROS>;
    static constexpr int GROUPS = TOKENS > 128 ? 2 : TOKENS > 64 ? 3 : 4;
    static constexpr int THREADS = (GROUPS + 1) * 128;
    static constexpr int TILE_UNITS = GROUPS * 4;  // row tiles of 16
    static_assert(TILE_UNITS * UNIT_ROWS * TOKENS <= PEREGRINE_GEMM_TILE && GROUPS <= PEREGRINE_GEMM_GROUPS, "the caller makes room");
    static constexpr int X_BYTES = TOKENS * TOKEN_BYTES;
    static constexpr int W_BYTES = TILE_UNITS * Units::BYTES;
    static constexpr int STAGE_BYTES = (X_BYTES + W_BYTES + 1023) / 1024 * 1024;
    static constexpr int EXTRA_BYTES = GROUPS * 4 * TRANSPOSE_BYTES + 1024;  // and barriers
    static constexpr int FIT = (SHARED_BYTES - EXTRA_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FIT < 16 ? FIT : 16;
    static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
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
        : stages(smem), barriers(reinterpret_cast<uint64_t*>(smem + Shape::RING_BYTES + Shape::GROUPS * 4 * TRANSPOSE_BYTES)) {}
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
        for (int s = 0; s < STEPS; s++)
            asm volatile("" : "+r"(next[s][0]), "+r"(next[s][1]), "+r"(next[s][2]), "+r"(next[s][3])::"memory");
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
    for (int n = 0; n < Shape::TOKENS / 8; n++)
        asm volatile("" : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])::"memory");
    if (lane == 0) ring.template release<1>();
}

template <class Shape>
__device__ __forceinline__ void multiply_segments(const GemmParams& g, Ring<Shape> ring, uint32_t share_index, uint32_t group) {
    const uint32_t unit = threadIdx.x / 32;  // this warp's of a stage
    uint8_t* transpose = ring.stages + Shape::RING_BYTES + unit * TRANSPOSE_BYTES;
    GemmSegment s;
    for (GemmWalk walk(g.plan, share_index); walk.next(s);) {
        typename Shape::Sums acc;
        multiply<Shape>(acc, ring, s.end - s.begin, Shape::X_BYTES + unit * Shape::Units::BYTES);
        if (!s.owner) {
            give_sums<Shape>(g.p, acc, share_index, group);
            continue;
        }
        if (!s.complete) {
            const uint32_t tile_end = (s.tile - g.plan.whole + 1) * g.plan.k_units;
            uint32_t end = share_index + 1;
            while (end < g.plan.blocks && g.plan.share(end) < tile_end) end++;
            take_sums<Shape>(g.p, acc, share_index + 1, end, group);
        }
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
    // Of a thread; together no more than the block was launched with.
    constexpr int FETCH_REGISTERS = Shape::GROUPS == 2 ? 40 : Shape::GROUPS == 3 ? 56 : 32;
    constexpr int MULTIPLY_REGISTERS = Shape::GROUPS == 2 ? 232 : Shape::GROUPS == 3 ? 152 : 112;
    const uint32_t share_index = gridDim.x - 1 - blockIdx.x, group = threadIdx.x / 128;
    if (group == Shape::GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FETCH_REGISTERS));
        if (threadIdx.x == Shape::GROUPS * 128) fetch<Shape>(g, ring, share_index);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));
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
    const uint32_t row_tiles = (tiles + Shape::TILE_UNITS - 1) / Shape::TILE_UNITS;
    const uint32_t token_tiles = (p->tokens + Shape::TOKENS - 1) / Shape::TOKENS;
    const GemmPlan plan(row_tiles, token_tiles, p->slices, k_units, multiprocessors, p->split_sums && p->split_flags);
    GemmParams g = {{}, {}, *p, plan};
    const TensorShape<3> w = {CU_TENSOR_MAP_DATA_TYPE_UINT32, {WORDS, k_units, tiles}, {WORDS * 4, (cuuint64_t)WORDS * 4 * k_units},
                              {WORDS, 1, Shape::TILE_UNITS}, CU_TENSOR_MAP_SWIZZLE_NONE};
    const TensorShape<2> x = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {p->w.k, p->tokens}, {(cuuint64_t)p->x_stride * 2},
                              {UNIT_INPUTS, Shape::TOKENS}, CU_TENSOR_MAP_SWIZZLE_128B};
    cudaError_t e = make_tensor_map(&g.w, p->w.units, w);
    if (e == cudaSuccess) e = make_tensor_map(&g.x, p->x, x);
    if (e != cudaSuccess) return (int32_t)e;
    constexpr size_t smem = (size_t)Shape::RING_BYTES + Shape::EXTRA_BYTES;
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

uint32_t gptq_gemm_wgmma_multiprocessors() { return hopper_multiprocessors(gptq_gemm_wgmma_kernel<GemmShape<1, false, 128>>); }

int32_t gptq_gemm_wgmma(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    switch (p->w.scales_per_row * 2 + p->w.has_zeros) {
        case 2: return run_tokens<1, false>(p, l, multiprocessors);
        case 3: return run_tokens<1, true>(p, l, multiprocessors);
        case 4: return run_tokens<2, false>(p, l, multiprocessors);
        case 5: return run_tokens<2, true>(p, l, multiprocessors);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
