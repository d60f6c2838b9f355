// gptq_gemm_wgmma — gptq_gemm on sm_90a: y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units.   Reference: reference.rs::gptq_matmul
// Shapes   as gptq_gemm: any number of tokens, made for more than 72; out_stride and gelu_stride multiples of 8.
// Reads    W once per tile of tokens, x once per 192 (128) rows, through L2.   Writes see GptqOutput.
// Mapping  one block a multiprocessor, which stays for the whole product (gemm_plan.cuh). A block's warpgroups multiply 64 rows each by
//          TOKENS tokens: weights are wgmma's A operand, in registers, unpacked while the tensor cores work on the unit before; a stage's
//          activations are B, in shared memory. One thread fetches the stages, two units (128 inputs) each, by tensor-map copies.
// Numbers  a weight is f16(scale * (code - zero)), AutoGPTQ's own definition of it: one multiplication for two weights instead of 128
//          f32 multiply-adds a thread and unit. All units of a segment are one chain of the tensor core, whose f32 adds truncate: relative
//          error 2.5e-5 over 22720 inputs, 4.9e-6 over 4544 (f16 outputs: 2.1e-4, their rounding). Sums of shared tiles are added in order.
// Tokens   a tile has 80 to 256, of 8 sizes the one whose plan takes the least time; 3 warpgroups up to 160 tokens, then 2, so that sums,
//          two units of weights and addresses fit the registers.
// Shared   a stage: activations [unit][TOKENS][64] f16 with the 128-byte swizzle; then [row tile][unit] as they lie in memory.
// Store    an f16 tile goes into the last stage, which is filled again when the copy engine has stored the tile: by then the warps multiply
//          the next one's first stages. f32 tiles go through 512 bytes of each warp.
// Few      at 65 to 160 tokens the loop is bound by what a warp issues, not by memory: some 75 instructions a unit, 52 of them unpacking,
//          at 6 cycles each. Hence addresses that are constants (Ring), no test of a first unit, no barrier but one a stage.
// Floor    2 n k FLOP a token at 700 TFLOP/s: [qkv ; up] 152, 608 us at 512, 2048 tokens; below some 80 tokens 55 MB at 4.70 TB/s.
// Measured inside graphs, cold weights, on the H200 at 1.50 to 1.77 of 1.98 GHz: us of each, thousands of cycles of both; in brackets the
//          kernel whose warps stored f16 tiles themselves and whose GELU had 14 instructions, two of them slow, by turns with this one.
//          65 and 72 by tiles of 72 tokens, which were taken out when gptq_batch got 72 columns:
//              tokens        65     72     80     96     128    192    257          512          1024         2048
//              [qkv ; up]    28.4   28.6   30.1   32.8   40.4   62.5   84.5 (86.5)  147 (153)    285 (299)    550 (575)
//              [down|dense]  31.2   31.5   33.2   37.0   44.4   60.7   85.3         148          288          552
//              cycles        105    105    110    120    144    205    283 (288)    465 (479)    882 (910)    1723 (1773)
//          Within 1.35 of the floor and 10 us at all numbers of tokens from 65 to 600 if the clock is 1.72 GHz (65, 66), 1.6 (81) or less.
//          Beside torch.matmul on f16 weights, by turns of 2 ms in any order: 1.01 and 1.02 at 512 tokens (before 1.06, 1.03), 1.01, 1.02
//          at 1024 (1.06, 1.01), 0.97, 1.01 at 2048 (1.02, 1.01). torch then has 1.46 to 1.53 GHz, this 1.50 to 1.61: in cycles 1.10, 1.08;
//          1.08, 1.03; 1.01, 1.03. By turns of 60 ms, all at 1.3 to 1.4 GHz: 1.05, 1.07; 1.04, 1.03; 1.01, 1.02 (up 1.16, 1.13, 1.05).
// Tried    all on the H200. Ring slots at addresses of run time: 105 instructions a unit, 690 cycles for 192 rows at 80 tokens, of which
//          tensor cores need 480; now 75 and 579. Pairs of blocks (clusters) that each fetch half of the activations for both: 38.3 for
//          37.4 us at 65 tokens, 322 for 327 at 1024, 636 both at 2048. Groups that take turns at the tensor cores by barriers: 39.6 for
//          37.4 us at 65 tokens, no difference at 512. 4 warpgroups at 80 and 96 tokens: 39.5, 43.1 for 37.4, 39.7 us. A ring of weights
//          asked for before the first activations: the first stage after 7.1, now 4.1 thousand cycles. Sums given behind a fence by all:
//          3.6, now 1.5 thousand. f32 outputs one by one: 10, now 6 thousand cycles a tile of 256 tokens. 128 rows x 256 tokens replaced
//          256 x 128, twice the unpacking: 1.11 to 1.20 of torch at 2048. Units fetched by bulk copies of 544 bytes instead of a map: 45
//          instead of 28 us at 16 tokens. Cutting a whole round of tiles besides what is left over: 855 us for 635 ([down | dense], 2048
//          tokens, H100): blocks at different inputs of the same tokens push them out of L2. At 256 tokens stages of one unit with the
//          second warpgroup 0 to 2500 cycles late, or 16 or 32 inputs unpacked and multiplied in turn: the same cycles to 0.5 %.
//          Sums of shared tiles through the ring, by bulk copies: 0.98 to 0.99 at 512 and 1024 tokens, 1.02 at 65 to 80 ([down | dense]).
// Short    an f16 tile still stops the tensor cores for 4 of 80 thousand cycles, an f32 tile for 6; the start and sharing tiles take 26
//          thousand (torch: 11). Few tokens: [down | dense] spends 7 thousand of 54 adding up 5 or 6 blocks. Up to 64 gptq_batch is faster.
// Spills   4 to 72 bytes, outside the loop (seen for one scale a row).
#include "bulk.cuh"
#include "chain.cuh"
#include "gemm_output.cuh"
#include "gemm_plan.cuh"
#include "launch.cuh"
#include "staged.cuh"
#include "tma.cuh"

namespace {

constexpr int SHARED_BYTES = 227 * 1024;

// A block has GROUPS warpgroups that multiply, 64 rows each, and one that fetches.
template <int SCALES_, bool ZEROS_, int TOKENS_>
struct GemmShape {
    static constexpr int SCALES = SCALES_, TOKENS = TOKENS_, GROUPS = gemm_groups(TOKENS);
    static constexpr bool ZEROS = ZEROS_;
    using Units = GptqUnits<SCALES, ZEROS>;
    static constexpr int THREADS = (GROUPS + 1) * 128;
    static constexpr int TILE_UNITS = GROUPS * 4;  // row tiles of 16
    static_assert(TILE_UNITS * UNIT_ROWS * TOKENS <= PEREGRINE_GEMM_TILE && GROUPS <= PEREGRINE_GEMM_GROUPS, "the caller makes room");
    static constexpr int STAGE_UNITS = 2;  // along the inputs
    static constexpr int X_BYTES = TOKENS * TOKEN_BYTES;  // of a unit's inputs
    static constexpr int COPIED_BYTES = STAGE_UNITS * (X_BYTES + TILE_UNITS * Units::BYTES);
    static constexpr int STAGE_BYTES = (COPIED_BYTES + 1023) / 1024 * 1024;
    // An f16 tile lies in the last stage, and in what follows the ring; of an f32 tile each warp has some there.
    static constexpr int STAGED_BYTES = GROUPS * TOKENS * 128, BEYOND_BYTES = STAGED_BYTES - STAGE_BYTES;
    static constexpr int TAIL_BYTES = GROUPS * 4 * TRANSPOSE_BYTES > BEYOND_BYTES ? GROUPS * 4 * TRANSPOSE_BYTES : BEYOND_BYTES;
    static constexpr int EXTRA_BYTES = TAIL_BYTES + 1024;  // and barriers
    static constexpr int FIT = (SHARED_BYTES - EXTRA_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FIT < 4 ? FIT : 4;
    static_assert(STAGES >= 3, "one in use, one left, one under way");
    static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
    using Sums = float[TOKENS / 8][4];
};

struct GemmParams {
    CUtensorMap w, x;           // [row tiles][k units * unit words] u64; [tokens][k] f16
    CUtensorMap out, gelu_out;  // [tokens][rows] f16, each if there are such rows
    GptqMatmulParams p;
    GemmPlan plan;
};

#if PEREGRINE_WGMMA

// The stages: activations [unit][TOKENS][64] and weights [row tile][unit] of two units, or of one if that is the segment's last. Every
// segment begins at slot 0, so that the multiplying loop, unrolled over the slots, has addresses that are constants. `full` is passed
// when a stage's copies are in, `empty` when all warps that multiply have left it; `uses` has a bit for each slot, the parity of its uses.
// An f16 tile takes the last slot for its way out, until `stored`.
template <class Shape>
struct Ring {
    uint8_t* smem;
    uint32_t uses = 0;

    __device__ __forceinline__ uint8_t* stage(uint32_t slot) const { return smem + slot * Shape::STAGE_BYTES; }
    __device__ __forceinline__ uint64_t* full(uint32_t slot) const {
        return reinterpret_cast<uint64_t*>(smem + Shape::RING_BYTES + Shape::TAIL_BYTES) + slot;
    }
    __device__ __forceinline__ uint64_t* empty(uint32_t slot) const { return full(slot) + Shape::STAGES; }
    __device__ __forceinline__ uint64_t* stored() const { return full(2 * Shape::STAGES); }
    __device__ __forceinline__ void wait_full(uint32_t slot) {
        barrier_wait(full(slot), uses >> slot & 1);
        uses ^= 1 << slot;
    }
    __device__ __forceinline__ void wait_empty(uint32_t slot) const { barrier_wait(empty(slot), ~uses >> slot & 1); }
    // The f16 tiles so far, `count`, have left the last stage.
    __device__ __forceinline__ void wait_stored(uint32_t count) const { barrier_wait(stored(), ~count & 1); }
};

struct TilePlace {
    uint32_t tile0, token0, slice;  // row tile of 16
    __device__ __forceinline__ TilePlace(const GemmPlan& plan, uint32_t tile, uint32_t tile_units, uint32_t tokens)
        : tile0(tile / plan.token_tiles % plan.row_tiles * tile_units), token0(tile % plan.token_tiles * tokens),
          slice(tile / plan.token_tiles / plan.row_tiles) {}
};

// The thread that asks for all stages. Weights are nobody's output, so the first stages' are asked for before the predecessor in the
// stream has finished; no more than two, for the first activations wait in line behind them.
template <class Shape>
__device__ __forceinline__ void fetch(const GemmParams& g, Ring<Shape> ring, uint32_t share_index) {
    constexpr int UNIT_LONGS = Shape::Units::BYTES / 8;
    constexpr uint32_t EARLY = 2;
    const uint64_t w_hint = g.plan.token_tiles == 1 ? L2_EVICT_FIRST : L2_NORMAL;
    const auto fetch_weights = [&](uint32_t slot, const TilePlace& place, uint32_t unit) {
        barrier_expect(ring.full(slot), Shape::COPIED_BYTES);
        const uint32_t to = smem_address(ring.stage(slot)) + Shape::STAGE_UNITS * Shape::X_BYTES;
        copy_box(to, g.w, unit * UNIT_LONGS, place.tile0, ring.full(slot), w_hint);
    };
    prefetch_map(g.w);
    prefetch_map(g.x);
    const bool halves = !g.p.y.partials && !g.p.y.residual;
    GemmSegment s;
    bool first = true;
    uint32_t tiles = 0;  // f16 ones before this segment
    for (GemmWalk walk(g.plan, share_index); walk.next(s); first = false) {
        const TilePlace place(g.plan, s.tile, Shape::TILE_UNITS, Shape::TOKENS);
        if (first) {
            for (uint32_t i = 0; i < EARLY && s.begin + i * Shape::STAGE_UNITS < s.end; i++)
                fetch_weights(i, place, s.begin + i * Shape::STAGE_UNITS);
            wait_previous();
        }
        uint32_t slot = 0;
        for (uint32_t u = s.begin; u < s.end; u += Shape::STAGE_UNITS) {
            ring.wait_empty(slot);
            if (slot == Shape::STAGES - 1) ring.wait_stored(tiles);
            ring.uses ^= 1 << slot;
            if (!first || u >= s.begin + EARLY * Shape::STAGE_UNITS) fetch_weights(slot, place, u);
            for (uint32_t i = 0; i < Shape::STAGE_UNITS; i++) {
                const uint32_t to = smem_address(ring.stage(slot)) + i * Shape::X_BYTES;
                copy_box(to, g.x, (u + i) * UNIT_INPUTS, place.token0, ring.full(slot), L2_NORMAL);
            }
            if (++slot == Shape::STAGES) slot = 0;
        }
        ring.wait_stored(tiles);
        tiles += s.owner && halves;
    }
    if (first) wait_previous();
}

// The warp that sends f16 tiles on their way.
template <class Shape>
__device__ __forceinline__ void store_tiles(const GemmParams& g, const Ring<Shape>& ring, uint32_t share_index) {
    if (g.p.y.partials || g.p.y.residual) return;
    GemmSegment s;
    for (GemmWalk walk(g.plan, share_index); walk.next(s);) {
        if (!s.owner) continue;
        const TilePlace place(g.plan, s.tile, Shape::TILE_UNITS, Shape::TOKENS);
        staged_wait<Shape>();
        store_staged<Shape>(g.p, g.out, g.gelu_out, place.tile0 * UNIT_ROWS, place.token0, ring.stage(Shape::STAGES - 1));
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(ring.stored());
    }
}

// unpack_weights, spelled out: through that ptxas orders the loop otherwise, which was not measured.
template <class Shape>
__device__ __forceinline__ void unpack(const typename Shape::Units::Raw& raw, uint32_t (&a)[STEPS][4]) {
    const uint32_t words[4] = {raw.codes.x, raw.codes.y, raw.codes.z, raw.codes.w};
#pragma unroll
    for (int h = 0; h < Shape::SCALES; h++) {
        ExactBias bias(raw.zero[h]);
        if (!Shape::ZEROS) bias.low = __float2half2_rn(-1024.f - 8.f), bias.high = __float2half2_rn(-64.f - 8.f);  // known to the compiler
        const __half2 low = __low2half2(raw.scale[h]), high = __high2half2(raw.scale[h]);
#pragma unroll
        for (int s = h * STEPS / Shape::SCALES; s < (h + 1) * STEPS / Shape::SCALES; s++) {
            unpack_exact(words[s], bias, a[s]);
#pragma unroll
            for (int i = 0; i < 4; i++) a[s][i] = as_u32(__hmul2(as_half2(a[s][i]), i % 2 ? high : low));
        }
    }
}

// A warp that multiplies: its rows times the tokens, over a segment's units. While the tensor cores work on one unit, the next is unpacked
// into the other set of registers.
template <class Shape>
struct Multiplier {
    Ring<Shape> ring;
    const uint8_t *codes, *scales;  // this lane's part of this warp's first unit, of slot 0
    bool leader;                    // says that the warp has left a stage
    uint32_t left;                  // units
    uint32_t a[2][STEPS][4];
    typename Shape::Units::Raw raw[2];

    __device__ __forceinline__ Multiplier(uint8_t* smem, uint32_t unit) : ring{smem} {
        const uint8_t* first = smem + Shape::STAGE_UNITS * (Shape::X_BYTES + unit * Shape::Units::BYTES);
        const uint32_t lane = threadIdx.x % 32;
        codes = first + lane * 16, scales = first + UNIT_CODE_BYTES + lane / 4 * 4;
        leader = lane == 0;
    }
    __device__ __forceinline__ void load(int slot) {
        ring.wait_full(slot);
#pragma unroll
        for (int i = 0; i < Shape::STAGE_UNITS; i++) {
            const int at = slot * Shape::STAGE_BYTES + i * Shape::Units::BYTES;
            raw[i].load_at(codes + at, scales + at);
        }
    }
    __device__ __forceinline__ void release(int slot) const {
        if (leader) barrier_arrive(ring.empty(slot));
    }
    // The unit at PLACE of the stage; false: it was the segment's last, of `units`.
    template <int SLOT, int PLACE>
    __device__ __forceinline__ bool step(typename Shape::Sums& acc, uint32_t units) {
        uint32_t(&next)[STEPS][4] = a[1 - PLACE];
        const uint64_t x = wgmma_descriptor(smem_address(ring.smem)) + (SLOT * Shape::STAGE_BYTES + PLACE * Shape::X_BYTES) / 16;
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < STEPS; s++) wgmma(acc, a[PLACE][s], x + s * 2, 1);
        wgmma_commit();
        wgmma_wait<1>();
        // The compiler does not know that the registers were in use until here.
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            asm volatile("" : "+r"(next[s][0]), "+r"(next[s][1]), "+r"(next[s][2]), "+r"(next[s][3])::"memory");
        if (PLACE == 0 && (SLOT > 0 || left != units)) release(SLOT > 0 ? SLOT - 1 : Shape::STAGES - 1);
        if (--left == 0) return false;
        unpack<Shape>(raw[1 - PLACE], next);
        if (PLACE == 0 && left > 1) load(SLOT + 1 < Shape::STAGES ? SLOT + 1 : 0);
        return true;
    }
    // The stages from SLOT to the ring's end. Gives the slot of the segment's last, or STAGES.
    template <int SLOT = 0>
    __device__ __forceinline__ int round(typename Shape::Sums& acc, uint32_t units) {
        if (!step<SLOT, 0>(acc, units)) return SLOT;
        if (!step<SLOT, 1>(acc, units)) return SLOT;
        if constexpr (SLOT + 1 < Shape::STAGES) return round<SLOT + 1>(acc, units);
        else return Shape::STAGES;
    }
    __device__ __forceinline__ void multiply(typename Shape::Sums& acc, uint32_t units) {
        left = units;
#pragma unroll
        for (int n = 0; n < Shape::TOKENS / 8; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
        load(0);
        unpack<Shape>(raw[0], a[0]);
        int last;
        do last = round(acc, units);
        while (last == Shape::STAGES);
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < Shape::TOKENS / 8; n++)
            asm volatile("" : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])::"memory");
        release(last);
    }
};

template <class Shape>
__device__ __forceinline__ void multiply_segments(const GemmParams& g, uint8_t* smem, uint32_t share_index) {
    const uint32_t lane = threadIdx.x % 32, unit = threadIdx.x / 32, group = threadIdx.x / 128;
    Multiplier<Shape> multiplier(smem, unit);
    const Ring<Shape>& ring = multiplier.ring;
    uint32_t tiles = 0;  // f16 ones so far
    const bool halves = !g.p.y.partials && !g.p.y.residual;
    GemmSegment s;
    for (GemmWalk walk(g.plan, share_index); walk.next(s);) {
        const TilePlace place(g.plan, s.tile, Shape::TILE_UNITS, Shape::TOKENS);
        const uint32_t row = (place.tile0 + unit) * UNIT_ROWS;
        float2 bias = make_float2(0.f, 0.f);  // of f16 outputs: asked for before it is wanted
        if (halves && g.p.y.bias && row < g.p.w.n) bias.x = g.p.y.bias[row + lane / 4], bias.y = g.p.y.bias[row + lane / 4 + 8];
        typename Shape::Sums acc;
        multiplier.multiply(acc, s.end - s.begin);
        if (!s.owner) {
            give_sums<Shape>(g.p, acc, share_index, group);
            continue;
        }
        if (!s.complete) take_sums<Shape>(g.p, acc, share_index + 1, g.plan.shares_end(s.tile), group);
        if (!halves) {
            uint8_t* transpose = smem + Shape::RING_BYTES + unit * TRANSPOSE_BYTES;
            if (row < g.p.w.n) store_floats<Shape::TOKENS>(g.p, place.slice, row, place.token0, acc, transpose);
            continue;
        }
        uint32_t pairs[Shape::TOKENS / 8][2];
        if (row < g.p.y.split_row) to_halves<Shape::TOKENS, false>(acc, bias, pairs);
        else to_halves<Shape::TOKENS, true>(acc, bias, pairs);
        ring.wait_empty(Shape::STAGES - 1);
        ring.wait_stored(tiles++);
        stage_halves(smem_address(ring.stage(Shape::STAGES - 1)) + group * Shape::TOKENS * 128, pairs);
        staged_arrive<Shape>();
    }
}

#endif

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) gptq_gemm_wgmma_kernel(const __grid_constant__ GemmParams g) {
#if PEREGRINE_WGMMA
    overlap_next();
    extern __shared__ __align__(1024) uint8_t smem[];
    const Ring<Shape> ring{smem};
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::STAGES; i++) {
            barrier_init(ring.full(i), 1);
            barrier_init(ring.empty(i), Shape::GROUPS * 4);
        }
        barrier_init(ring.stored(), 1);
        barrier_init_done();
    }
    __syncthreads();
    // Of a thread; together no more than the block was launched with.
    constexpr int FETCH_REGISTERS = Shape::GROUPS == 2 ? 40 : 56, MULTIPLY_REGISTERS = Shape::GROUPS == 2 ? 232 : 152;
    const uint32_t share_index = gridDim.x - 1 - blockIdx.x, warp = threadIdx.x / 32;
    if (warp >= Shape::GROUPS * 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FETCH_REGISTERS));
        if (threadIdx.x == Shape::GROUPS * 128) fetch<Shape>(g, ring, share_index);
        if (warp == Shape::GROUPS * 4 + 1 && g.plan.gives(share_index)) publish_sums<Shape>(g.p, share_index);
        if (warp == Shape::GROUPS * 4 + 2) store_tiles<Shape>(g, ring, share_index);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));
        wait_previous();
        multiply_segments<Shape>(g, smem, share_index);
    }
#endif
}

template <class Shape>
int32_t run(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    constexpr uint32_t UNIT_LONGS = Shape::Units::BYTES / 8;
    const bool halves = !p->y.partials && !p->y.residual;
    if (halves && (p->y.out_stride % 8 || p->y.gelu_stride % 8)) return PEREGRINE_BAD_SHAPE;  // 16-byte stores
    const GemmPlan plan(*p, Shape::GROUPS, Shape::TOKENS, multiprocessors);
    GemmParams g = {{}, {}, {}, {}, *p, plan};
    const cuuint64_t row_longs = (cuuint64_t)UNIT_LONGS * plan.k_units;
    const TensorShape<2> w = {CU_TENSOR_MAP_DATA_TYPE_FLOAT64, {row_longs, p->w.n / UNIT_ROWS}, {row_longs * 8},
                              {UNIT_LONGS * Shape::STAGE_UNITS, Shape::TILE_UNITS}, CU_TENSOR_MAP_SWIZZLE_NONE};
    const TensorShape<2> x = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {p->w.k, p->tokens}, {(cuuint64_t)p->x_stride * 2},
                              {UNIT_INPUTS, Shape::TOKENS}, CU_TENSOR_MAP_SWIZZLE_128B};
    cudaError_t e = make_tensor_map(&g.w, p->w.units, w);
    if (e == cudaSuccess) e = make_tensor_map(&g.x, p->x, x);
    const auto halves_map = [&](CUtensorMap* map, const void* data, uint32_t rows, uint32_t stride) {
        const TensorShape<2> out = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {rows, p->tokens}, {(cuuint64_t)stride * 2}, {64, Shape::TOKENS},
                                    CU_TENSOR_MAP_SWIZZLE_128B};
        if (e == cudaSuccess && halves && rows > 0) e = make_tensor_map(map, data, out);
    };
    const uint32_t split = p->y.split_row < p->w.n ? p->y.split_row : p->w.n;
    halves_map(&g.out, p->y.out, split, p->y.out_stride);
    halves_map(&g.gelu_out, p->y.gelu_out, p->w.n - split, p->y.gelu_stride);
    if (e != cudaSuccess) return (int32_t)e;
    constexpr size_t smem = (size_t)Shape::RING_BYTES + Shape::EXTRA_BYTES;
    return launch(gptq_gemm_wgmma_kernel<Shape>, dim3(plan.blocks), Shape::THREADS, smem, l, g);
}

// Tokens of a tile: those with which the product takes the least time.
uint32_t tile_tokens(const GptqMatmulParams& p, uint32_t multiprocessors) {
    constexpr uint32_t SIZES[] = {80, 96, 112, 128, 144, 160, 192, 256};
    uint32_t best = 0, least = ~0u;
    for (uint32_t size : SIZES) {
        const uint32_t cycles = GemmPlan(p, gemm_groups(size), size, multiprocessors).cycles();
        if (cycles < least) least = cycles, best = size;
    }
    return best;
}

template <int SCALES, bool ZEROS>
int32_t run_tokens(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    switch (tile_tokens(*p, multiprocessors)) {
        case 80: return run<GemmShape<SCALES, ZEROS, 80>>(p, l, multiprocessors);
        case 96: return run<GemmShape<SCALES, ZEROS, 96>>(p, l, multiprocessors);
        case 112: return run<GemmShape<SCALES, ZEROS, 112>>(p, l, multiprocessors);
        case 128: return run<GemmShape<SCALES, ZEROS, 128>>(p, l, multiprocessors);
        case 144: return run<GemmShape<SCALES, ZEROS, 144>>(p, l, multiprocessors);
        case 160: return run<GemmShape<SCALES, ZEROS, 160>>(p, l, multiprocessors);
        case 192: return run<GemmShape<SCALES, ZEROS, 192>>(p, l, multiprocessors);
        default: return run<GemmShape<SCALES, ZEROS, 256>>(p, l, multiprocessors);
    }
}

}  // namespace

uint32_t gptq_gemm_wgmma_multiprocessors() { return hopper_multiprocessors<gptq_gemm_wgmma_kernel<GemmShape<1, false, 128>>>(); }

int32_t gptq_gemm_wgmma(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    switch (p->w.scales_per_row * 2 + p->w.has_zeros) {
        case 2: return run_tokens<1, false>(p, l, multiprocessors);
        case 3: return run_tokens<1, true>(p, l, multiprocessors);
        case 4: return run_tokens<2, false>(p, l, multiprocessors);
        case 5: return run_tokens<2, true>(p, l, multiprocessors);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
