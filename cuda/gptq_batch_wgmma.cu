// gptq_batch_wgmma — gptq_batch on sm_90a: y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units.   Reference: reference.rs::gptq_matmul
// Shapes   as gptq_batch; for f16 outputs out_stride and gelu_stride multiples of 8.
// Reads    W once, x once an SM, through L2.   Writes see GptqOutput.
// Mapping  one block an SM keeps to one K slice and to 10 or 11 row tiles, one a warp; each warp gives wgmma its own 16 rows as A, from
//          registers, four warps share the activations as B. One warp fetches weights (a bulk copy a row tile and stage), one
//          activations (a box of a tensor map); each has a ring of its own, so that weights are asked for before the predecessor ends.
// Numbers  a weight is f16(scale * (code - zero)), AutoGPTQ's own definition of it, times a power of two of its row (row_factors.cu), which
//          is taken off the sums. No finer than 2^-24, where the row's largest scale has 2^-11 to 2^-9 or, in rows of tiny ones, less. A
//          slice of a row is one chain of the tensor core, whose f32 adds truncate: relative error 4.8e-6 over 4544 inputs.
// Columns  8, 16, 32, 48, 64 or 72 tokens.
// Overlap  a block takes 38,000 to 47,000 of an SM's registers and 213 of its 227 KB, so that norm and attention lie beside it and the next
//          product's blocks begin, and fill their rings, as soon as this one's end. Of weights only IN_FLIGHT stages are asked for at a
//          time: all at once, they stand in front of attention's and the norm's loads, and of the first activations. Before the
//          inputs are there it is EARLY_FLIGHT of them.
// Behind   attention, if that says how far it is (ready.cuh), [down | dense] does not wait for it: four slices need [qkv ; up] alone and
//          have 24 blocks of 11 or 12 row tiles each; the fifth, `dense`, has 36 blocks of 7 or 8, begins when attention is done, some
//          6 us later, and ends with the others.
// Floor    [qkv ; up] 55.2 MB, [down | dense] 54.9 MB: 11.7 us each at 4.70 TB/s; at 64 tokens 13.8 us of the tensor cores, and 77 MB of
//          activations from L2.
// Measured a pair of [qkv ; up] and [down | dense], launches in a row in a graph, cold L2, H200 at 1.8 GHz, by turns with the kernel before
//          stages of activations were unrolled, which had no 8 and 72 columns, in brackets; then steps of 32 layers and the head without
//          sampling, at position 190, likewise:
//              tokens       5              8              16             32             64             72
//              pair, us     34.0 (37.6)    34.1 (37.6)    37.1 (37.9)    40.7 (43.1)    51.9 (52.6)    54.2
//              step, ms     1.564 (1.691)  1.585 (1.709)  1.688 (1.726)  1.904 (1.975)  2.306 (2.305)
//          On six runs the pair took 38 to 39, 43 to 44, 53 to 58 us (before) at 16, 32, 64 tokens: compare only within a run. Two scales
//          a unit: 34.8 to 54.1 us; zero points: 35.5, 37.7, 42.5, 53.0, 57.4 at 8, 16, 32, 64, 72; both: 36.7, 39.4, 43.5, 54.8, 57.5.
//          48 columns, hot GPU, `cargo bench --bench kernels products`: 49 to 52 us at 33 to 48 tokens, where 64 columns took 52 to 54.
//          With Behind and EARLY_FLIGHT, before stages of activations were unrolled, whole steps without sampling in a harness, in turns,
//          two runs: at context 128 1.55 to 1.62, 1.76 to 1.81 ms for 16, 32 texts where it was 1.76 to 1.90, 1.90 to 2.06; at 1024 1.79,
//          2.06 to 2.08 where it was 1.94 to 2.07, 2.10 to 2.27. 64 texts, whose product waits for attention: the same within 2 %. The
//          whole program, `peregrine bench -p 0 -n 48 -d 128 -b 16,32`: 1.535, 1.795 ms where it was 1.717, 1.926.
//          A layer at 16 texts, us: [qkv ; up] 19 to 21 from inputs to stores, 2 to `down`'s inputs, 18 to 20, norm 4 to 5; attention done
//          5 after [qkv ; up], beside `down`.
// Short    not at the speed of memory: what a warp issues adds to what the tensor cores take, instead of hiding behind it. Of a unit of 12
//          row tiles products alone take 157, 157, 193, 384, 433 cycles at 8, 16, 32, 64, 72 tokens; 96 multiply-adds more of a scheduler
//          add 95, 107, 127, 83, 46 to that. A unit is 79 instructions of a warp, unpacking 52, and 8 of the uniform unit for descriptors.
// Tried    in one harness, [qkv ; up] at 16, 32, 64 tokens, where this kernel (before) took 19.0, 21.1, 26.0 us: no unpacking 15.5, 16.4,
//          20.0; one of four products 15.1, 15.8, 17.4; neither 14.8, 15.4, 16.9: what the stream takes. IN_FLIGHT 3 or all: 22.6, 25.1,
//          30.6 where 2 takes 20.3, 22.7, 28.2. One stage until the ring is full: 20.8, 22.1, 26.3, but whole steps 2 to 4 % faster at 16
//          tokens, 2 % at 32. Products of a quarter unit in flight, four at a time: 21.0, 23.5, 28.1. Five stages of activations: 19.1,
//          21.2, 27.8. Pairs of blocks (clusters) that share activations by multicast: 20.6, 23.6, 29.1 and blocks that begin up to 9 us
//          later in a step; an arrival at the other block's barrier with .release.cluster is a fence that doubles the time. Weights as one
//          multiply-add of a subnormal nibble, each row's scales brought to 2^15 by the block itself: a sixth fewer instructions, but the
//          look at all scales beforehand takes 4 us: 22.1, 23.5, 27.5 with pairs.
//          Codes as subnormals straight from masks (20 instructions), a chain a unit, scaled by f32 multiply-adds, zero points taken off
//          by products of scales and sums of inputs, which the warp that fetches activations made by mma.sync: 19.5, 26.0, 48.8 where it
//          was 19.0, 21.7, 27.0 (17.2 for 19.1 with 8 columns). Error 1.3e-6 (3.6e-6 with zero points). The same with the sums from a row
//          tile of ones, the block's twelfth, which costs no product more: pairs of 35.4, 38.6, 48.1, 68.9 at 8, 16, 32, 64 tokens, one
//          chain at a time from 16 on (39.7, 49.1 with two), where this kernel takes 34.0, 36.9, 40.9, 54.1. Codes one unit ahead, not
//          two: pairs of 36.8, 41.8, 51.5, steps of 1.689, 1.940, 2.284. Two ahead without unrolling: 39.1, 48.8, 62.9 where it was 38.5,
//          43.7, 58.1. Zeros for the row tiles that a block does not have: no difference. Constant weights: 1 to 4 % less.
//          EARLY_FLIGHT 2: steps of 16 texts 1.66 ms where 1 takes 1.60 to 1.62, of 32 1.84 where it takes 1.78 to 1.81. Behind attention,
//          26 and 28 blocks instead of 24 and 36: 1.77 where these took 1.70; warps without a row tile that multiply all the same: 1.71
//          where 1.66. 64 texts that do not wait for attention: 2.32 where those that do take 2.29 at 128, 2.76 where 2.86 at 1024.
// Spills   8 bytes, 72 tokens with two scales a unit.
#include "bulk.cuh"
#include "chain.cuh"
#include "gemm_output.cuh"
#include "launch.cuh"
#include "ready.cuh"
#include "tma.cuh"

namespace {

constexpr int WARPS = 12;                  // that multiply, one row tile each: three warpgroups
constexpr int THREADS = (WARPS + 2) * 32;  // and one warp that fetches weights, one activations
constexpr int UNITS = 4;                   // of a stage
constexpr int X_STAGES = 3;
constexpr int AHEAD = 2;  // units a warp loads ahead of the one it unpacks
static_assert(UNITS % AHEAD == 0 && AHEAD < UNITS, "a unit's registers are known when compiling");
constexpr int IN_FLIGHT = 3;  // stages of weights: more of them delay everybody else's loads, the activations' first of all
constexpr int EARLY_FLIGHT = 1;  // before the inputs are there: norm and attention are at work then
constexpr int EARLY_SHARE = 93;  // per cent of an even share of blocks, for slices that need not wait for attention
constexpr int SHARED_BYTES = 218 * 1024;
constexpr int REGISTERS = 104;  // of a thread at most: attention and norm are to fit beside a block, see Overlap

template <int SCALES_, bool ZEROS_, int TOKENS_>
struct BatchShape {
    static constexpr int SCALES = SCALES_, TOKENS = TOKENS_;
    static constexpr bool ZEROS = ZEROS_;
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
    static constexpr int BYTES = BARRIERS_AT + (2 * (W_STAGES + X_STAGES) + 1) * 8;
    static_assert(W_STAGES >= IN_FLIGHT, "room for them");
    using Sums = float[TOKENS / 8][4];
};

// Some of the slices, and how they are spread over blocks. The host does the divisions: a block asks for its first weights at once.
struct Share {
    uint32_t slices, blocks;
    uint64_t tiles;       // row tiles of a block, in steps of 2^-32, rounded up
    uint64_t reciprocal;  // 1 / slices, in such steps, rounded up

    Share(uint32_t slices, uint32_t row_tiles, uint32_t blocks_at_most) : slices(slices), blocks(0), tiles(0), reciprocal(0) {
        if (!slices) return;
        const uint32_t least = (row_tiles + WARPS - 1) / WARPS, parts = max(min(blocks_at_most / slices, row_tiles), least);
        blocks = slices * parts;
        tiles = (((uint64_t)row_tiles << 32) + parts - 1) / parts, reciprocal = ((1ull << 32) + slices - 1) / slices;
    }
};

struct BatchParams {
    CUtensorMap x;  // [k units][tokens][64] f16
    GptqMatmulParams p;
    uint32_t slice_units;
    Share early, late;  // slices that need nothing of attention come first
};

#if PEREGRINE_WGMMA

template <class Shape>
struct Barriers {
    uint64_t w_full[Shape::W_STAGES], w_empty[Shape::W_STAGES], x_full[X_STAGES], x_empty[X_STAGES], inputs;
};

// What a block multiplies.
struct Span {
    uint32_t slice, unit0, count, tile0, tiles;
    bool late;  // needs attention
    __device__ __forceinline__ explicit Span(const BatchParams& g) {
        const GptqMatmulParams& p = g.p;
        late = blockIdx.x >= g.early.blocks;
        const Share& share = late ? g.late : g.early;
        const uint32_t block = late ? blockIdx.x - g.early.blocks : blockIdx.x;
        const uint32_t part = (uint32_t)(block * share.reciprocal >> 32);
        slice = block - part * share.slices + (late ? g.early.slices : 0);
        unit0 = slice * g.slice_units;
        count = min(g.slice_units, p.w.k / UNIT_INPUTS - unit0);
        tile0 = (uint32_t)(part * share.tiles >> 32);
        tiles = (uint32_t)((part + 1) * share.tiles >> 32) - tile0;
    }
    // Warps that multiply: whole warpgroups.
    __device__ __forceinline__ uint32_t warps() const { return min((tiles + 3) / 4 * 4, (uint32_t)WARPS); }
    // The slice's units of the block's row tile i; of a tile that it has not, another's.
    template <class Shape>
    __device__ __forceinline__ const uint8_t* units(const GptqMatmulParams& p, uint32_t i) const {
        return p.w.units + ((size_t)(tile0 + (i < tiles ? i : 0)) * (p.w.k / UNIT_INPUTS) + unit0) * Shape::Units::BYTES;
    }
};

template <class Shape>
__device__ __forceinline__ void fetch_weights(const GptqMatmulParams& p, const Span& s, uint8_t* ring, Barriers<Shape>& b) {
    const uint32_t lane = threadIdx.x % 32, stages = (s.count + UNITS - 1) / UNITS;
    const uint8_t* from = s.units<Shape>(p, lane);
    // Shared addresses, once: each conversion would ask which block of its cluster this is.
    const uint32_t to = smem_address(ring) + lane * Shape::W_TILE, full = smem_address(b.w_full), empty = smem_address(b.w_empty);
    const uint32_t inputs = smem_address(&b.inputs);
    Place<Shape::W_STAGES> place, arrived;
    uint32_t waiting = 0;  // copies under way
    bool there = false;    // the inputs are
    for (uint32_t j = 0; j < stages; j++) {
        if (j >= Shape::W_STAGES) barrier_wait(empty + place.slot * 8, place.parity ^ 1);
        if (waiting >= (there ? IN_FLIGHT : EARLY_FLIGHT)) {
            barrier_wait(full + arrived.slot * 8, arrived.parity);
            arrived.advance();
            waiting--;
            if (!there) there = barrier_test(inputs, 0);
        }
        waiting++;
        const uint32_t bytes = min((uint32_t)UNITS, s.count - j * UNITS) * Shape::Units::BYTES;
        if (lane == 0) barrier_expect(full + place.slot * 8, s.tiles * bytes);
        __syncwarp();
        if (lane < s.tiles) bulk_copy(to + place.slot * Shape::W_STAGE, from, bytes, full + place.slot * 8);
        from += Shape::W_TILE;
        place.advance();
    }
}

template <class Shape>
__device__ __forceinline__ void fetch_activations(const BatchParams& g, const Span& s, uint8_t* ring, Barriers<Shape>& b) {
    const uint32_t stages = (s.count + UNITS - 1) / UNITS;
    Place<X_STAGES> place;
    for (uint32_t j = 0; j < stages; j++) {
        if (j >= X_STAGES) barrier_wait(&b.x_empty[place.slot], place.parity ^ 1);
        barrier_expect(&b.x_full[place.slot], Shape::X_STAGE);
        copy_box(smem_address(ring + place.slot * Shape::X_STAGE), g.x, 0, 0, s.unit0 + j * UNITS, &b.x_full[place.slot], L2_NORMAL);
        place.advance();
    }
}

// acc = this warp's row tile times the tokens. While the tensor cores work on one unit, the next is unpacked into the other registers, and
// AHEAD more are on their way from shared memory. The activations' stages are unrolled, so that their addresses are constants.
template <class Shape>
__device__ __forceinline__ void multiply(typename Shape::Sums& acc, const Span& s, __half2 factor, uint8_t* smem,
                                          Barriers<Shape>& b) {
    const uint32_t lane = threadIdx.x % 32, stages = (s.count + UNITS - 1) / UNITS;
    const uint8_t* mine = smem + Shape::W_AT + threadIdx.x / 32 * Shape::W_TILE;
    const uint32_t x = smem_address(smem) / 16 | 1u << 16;
    uint32_t a[2][STEPS][4] = {}, parity = 0, leaving = 0, entered = 1;
    typename Shape::Units::Raw raw[AHEAD];
    Place<Shape::W_STAGES> place;
    const uint8_t* stage = mine;
    // Unit u of the stage; what is loaded behind the last stage is not used.
    const auto load = [&](int u) {
        if (u == 0) {
            place.advance();
            stage = mine + place.slot * Shape::W_STAGE;
            if (entered++ < stages) barrier_wait(&b.w_full[place.slot], place.parity);
        }
        raw[u % AHEAD].load(stage + u * Shape::Units::BYTES, lane);
    };
    barrier_wait(&b.w_full[0], 0);
    raw[0].load(stage, lane);
    raw[0].unpack(a[0], factor);
#pragma unroll
    for (int u = 1; u <= AHEAD; u++) load(u);
    for (uint32_t j0 = 0; j0 < stages; j0 += X_STAGES, parity ^= 1) {
#pragma unroll
        for (int slot = 0; slot < X_STAGES; slot++) {
            const uint32_t j = j0 + slot, units = s.count - j * UNITS;  // units that are left
            if (slot > 0 && j >= stages) break;
            barrier_wait(&b.x_full[slot], parity);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                if (u > 0 && u >= units) break;
                uint32_t(&now)[STEPS][4] = a[u % 2], (&next)[STEPS][4] = a[(u + 1) % 2];
                const uint32_t x_unit = x + (slot * Shape::X_STAGE + u * Shape::X_UNIT) / 16;
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < STEPS; i++) wgmma(acc, now[i], wgmma_descriptor_of(x_unit + i * 2), 1);
                wgmma_commit();
                wgmma_wait<1>();
                // The compiler does not know that the registers were in use until here.
#pragma unroll
                for (int i = 0; i < STEPS; i++)
                    asm volatile("" : "+r"(next[i][0]), "+r"(next[i][1]), "+r"(next[i][2]), "+r"(next[i][3])::"memory");
                if (u == 0 && j > 0 && lane == 0) barrier_arrive(&b.x_empty[slot == 0 ? X_STAGES - 1 : slot - 1]);
                raw[(u + 1) % AHEAD].unpack(next, factor);
                if (u + 2 == UNITS) {
                    __syncwarp();
                    if (lane == 0) barrier_arrive(&b.w_empty[leaving]);
                    if (++leaving == Shape::W_STAGES) leaving = 0;
                }
                load((u + 1 + AHEAD) % UNITS);
            }
        }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++)
        asm volatile("" : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])::"memory");
}

// The sums of weights that unpack_scaled gave.
template <class Shape>
__device__ __forceinline__ void undo_factor(typename Shape::Sums& acc, __half2 factor) {
    const float2 f = __half22float2(factor);
    const float low = CODE_LOW_SCALE / (f.x * f.x), high = CODE_HIGH_SCALE / (f.y * f.y);
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] *= e < 2 ? low : high;
}

#endif

template <class Shape>
__global__ void __maxnreg__(REGISTERS) gptq_batch_wgmma_kernel(const __grid_constant__ BatchParams g) {
#if PEREGRINE_WGMMA
    extern __shared__ __align__(1024) uint8_t smem[];
    Barriers<Shape>& b = *reinterpret_cast<Barriers<Shape>*>(smem + Shape::BARRIERS_AT);
    const uint32_t warp = threadIdx.x / 32;
    const Span s(g);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::W_STAGES; i++) barrier_init(&b.w_full[i], 1), barrier_init(&b.w_empty[i], s.warps());
        for (int i = 0; i < X_STAGES; i++) barrier_init(&b.x_full[i], 1), barrier_init(&b.x_empty[i], s.warps());
        barrier_init(&b.inputs, 1);
        barrier_init_done();
    }
    __syncthreads();
    if (warp == WARPS) {
        fetch_weights<Shape>(g.p, s, smem + Shape::W_AT, b);
    } else if (warp > WARPS) {
        if (threadIdx.x % 32 == 0) {
            prefetch_map(g.x);
            ready_wait(g.p.ready, s.late);
            overlap_next();  // not before: see ready.cuh
            barrier_arrive(&b.inputs);
            fetch_activations<Shape>(g, s, smem, b);
            ready_leave(g.p.ready);
        }
    } else if (warp < s.warps()) {
        // What was written before this kernel comes through the activations' ring alone, and what is written here comes after that.
        typename Shape::Sums acc = {};
        const uint32_t lane = threadIdx.x % 32, tile = s.tile0 + (warp < s.tiles ? warp : 0), row = tile * UNIT_ROWS;
        // A warp without a row tile multiplies zeros: with many tokens power decides, and products of zeros take less of it.
        const __half2 factor = as_half2(warp < s.tiles ? g.p.w.row_factors[tile * 8 + lane / 4] : 0);
        multiply<Shape>(acc, s, factor, smem, b);
        if (warp >= s.tiles) return;
        undo_factor<Shape>(acc, factor);
        uint8_t* transpose = smem + Shape::TRANSPOSE_AT + warp * TRANSPOSE_BYTES;
        const float* b = g.p.y.bias ? g.p.y.bias + row + lane / 4 : nullptr;
        const float2 bias = b ? make_float2(b[0], b[8]) : make_float2(0.f, 0.f);
        if (g.p.y.partials || g.p.y.residual) store_floats<Shape::TOKENS>(g.p, s.slice, row, 0, acc, transpose);
        else store_halves<Shape::TOKENS>(g.p, row, bias, 0, acc, transpose);
    }
#endif
}

template <class Shape>
int32_t run(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    const bool halves = !p->y.partials && !p->y.residual;
    if (halves && (p->y.out_stride % 8 || p->y.gelu_stride % 8)) return PEREGRINE_BAD_SHAPE;  // 16-byte stores
    const cuuint64_t k_units = p->w.k / UNIT_INPUTS;
    const cuuint64_t token_bytes = (cuuint64_t)p->x_stride * 2;
    const TensorShape<3> x = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {UNIT_INPUTS, p->tokens, k_units}, {token_bytes, TOKEN_BYTES},
                              {UNIT_INPUTS, Shape::TOKENS, UNITS}, CU_TENSOR_MAP_SWIZZLE_128B};
    const uint32_t row_tiles = p->w.n / UNIT_ROWS, slice_units = ((uint32_t)k_units + p->slices - 1) / p->slices;
    const uint32_t early_slices = p->ready ? min(p->attn_input / (slice_units * UNIT_INPUTS), p->slices) : p->slices;
    const uint32_t late_slices = p->slices - early_slices;
    const uint32_t early_blocks = late_slices ? multiprocessors * early_slices / p->slices * EARLY_SHARE / 100 : multiprocessors;
    const Share early(early_slices, row_tiles, early_blocks);
    const Share late(late_slices, row_tiles, multiprocessors > early.blocks ? multiprocessors - early.blocks : 0);
    BatchParams g = {{}, *p, slice_units, early, late};
    const cudaError_t e = make_tensor_map(&g.x, p->x, x);
    if (e != cudaSuccess) return (int32_t)e;
    return launch(gptq_batch_wgmma_kernel<Shape>, dim3(early.blocks + late.blocks), THREADS, Shape::BYTES, l, g);
}

template <int SCALES, bool ZEROS>
int32_t run_tokens(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    if (p->tokens <= 8) return run<BatchShape<SCALES, ZEROS, 8>>(p, l, multiprocessors);
    if (p->tokens <= 16) return run<BatchShape<SCALES, ZEROS, 16>>(p, l, multiprocessors);
    if (p->tokens <= 32) return run<BatchShape<SCALES, ZEROS, 32>>(p, l, multiprocessors);
    if (p->tokens <= 48) return run<BatchShape<SCALES, ZEROS, 48>>(p, l, multiprocessors);
    if (p->tokens <= 64) return run<BatchShape<SCALES, ZEROS, 64>>(p, l, multiprocessors);
    static_assert(PEREGRINE_BATCH_TOKENS == 72, "the widest");
    return run<BatchShape<SCALES, ZEROS, 72>>(p, l, multiprocessors);
}

}  // namespace

uint32_t gptq_batch_wgmma_multiprocessors() { return hopper_multiprocessors<gptq_batch_wgmma_kernel<BatchShape<1, false, 16>>>(); }

int32_t gptq_batch_wgmma(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    switch (p->w.scales_per_row * 2 + p->w.has_zeros) {
        case 2: return run_tokens<1, false>(p, l, multiprocessors);
        case 3: return run_tokens<1, true>(p, l, multiprocessors);
        case 4: return run_tokens<2, false>(p, l, multiprocessors);
        case 5: return run_tokens<2, true>(p, l, multiprocessors);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
