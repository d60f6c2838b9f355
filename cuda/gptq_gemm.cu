// gptq_gemm — y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units, any number of tokens.   Reference: reference.rs::gptq_matmul
// Shapes   as gptq_gemv; any number of tokens, made for more than 72 (gptq_batch); out_stride and gelu_stride multiples of 8.
//          On sm_90a gptq_gemm_wgmma.cu does the work instead.
// Reads    W once per 128 tokens, x once per 256 rows, through L2.   Writes see GptqOutput.
// Mapping  one block of 8 warps a multiprocessor, which stays for the whole product (gemm_plan.cuh). A tile is 256 rows x 128 tokens; a
//          warp has 32 rows of it and all tokens, so that each weight is unpacked once a tile: 128 registers of sums. k advances by one
//          unit (64 inputs) a stage of a ring of cp.async. While mma.sync works on 16 inputs, the next 16 are unpacked and loaded into
//          each register that becomes free.
// Barrier  a warp arrives as a unit begins, saying that it has left the unit before and has its copies of the next, and waits for the
//          others three quarters of the unit later. __syncthreads instead took 5 to 10 % more time.
// Numbers  f16(scale * (code - zero)); for groups of 64 without zero points times a power of two of the row (row_factors.cu, as
//          gptq_batch), which is taken off the sums: the same bits where the row's scales are within a factor of 8. All units of a segment
//          are one chain of the tensor core, whose f32 adds truncate: relative error 2.6e-5 over 22720 inputs, 5.4e-6 over 4544 (f16
//          outputs: 2.1e-4, their rounding).
// Shared   activations [128][64] f16, 16-byte chunk c of token t at c ^ (t % 8): ldmatrix reads without bank conflicts; then the units of
//          the row tiles as they lie in memory. 4 stages (3 where units have more than 544 bytes) in the 99 KB every GPU allows.
// Cost     on an H200 an mma takes a quarter of a multiprocessor 6.1 cycles, whatever warps there are and in whatever order of operands;
//          each instruction beside it, from either warp, costs it 0.7 to 1.7 more (shift, logic, f16 multiply 0.8; f16 multiply-add 1.1
//          where operands repeat, else 1.4; of integers and f32 1.7), ldmatrix next to nothing. So instructions count: a unit has 128 mma a
//          warp, 36 loads from shared memory and 119 others, 76 to unpack, and takes 1880 to 1950 cycles, where mma alone takes 1553. Two
//          units a turn of the loop share the addresses of copies: 15 instructions and 1 to 2 % less.
//          At 512 tokens of [qkv ; up] a block has 194 units, 3100 cycles until the first is there, three tiles to store, each 2500 cycles
//          or with GELU 5400, and 5000 to give sums and 4000 to take them. A tile to the residual takes 7500.
// Measured on an H200, compiled for compute_80, us and TFLOP/s in bursts of 2 ms with rests; beside it the part of torch.matmul's rate on
//          the unpacked f16 weights (its kernels are wgmma's), and of the fastest sm_80 kernel that cublasLt has (of 150 to 440 that run):
//              tokens         128                    512                    1024                   2048
//              [qkv ; up]     70, 379, 82 %, 116 %   228, 466, 64 %, 104 %  445, 478, 63 %, 103 %  872, 487, 65 %, 102 %
//              [down|dense]   78, 339, 84 %, 109 %   229, 462, 64 %, 116 %  443, 477, 63 %, 106 %  855, 495, 63 %, 110 %
//          In turns of 0.3 s without rest, where power sets the clock: 71, 61 % of torch's at 512 tokens, 62, 61 % at 2048, and the
//          kernel before 64, 63, 62, 62 (it came later in the turn, on a cooler card). In turns of 70 ms 55 to 59 %, for torch's then
//          begin cool, and 105 to 126 % of cublasLt's.
//          Before, in bursts: 73, 256, 489, 945; 78, 237, 458, 890. Of 256: stores 22 less, unpacking by one multiply-add 1, two units a
//          turn 4, scales read before codes 1.
// Tried    at 512 tokens of [qkv ; up], bursts: 64 rows x 64 tokens a warp, so that two unpack each weight, 285 us where 32 x 128 had 264;
//          16 warps of 32 x 64, 315 to 328. Tiles of 128 x 256, unpacked once into shared memory as f16: 273 where this had 255.
//          Sums stored in pieces of 16 bytes, each behind a branch: 12 to 20 thousand cycles a tile, as sectors are written by halves.
//          Sums exchanged between lanes for the residual too, so that an instruction has 128 bytes of a token: 1000 cycles a tile less,
//          nothing of the whole. Of 231 us: the barrier as the head of the loop, with one basic block a unit, 13 more; waiting for it a
//          step earlier, to load scales sooner, 5 more; arriving one, two steps later 2, 6 more; four units a turn 2 more; a pointer for
//          each copy 0. Rows' factors cost 2 %, four multiplications a unit: with units that hold the scales multiplied it would be 225.
// Spills   up to 4 registers with groups of 32 or zero points, outside the loop over units.
#include "bulk.cuh"
#include "gemm_plan.cuh"
#include "launch.cuh"
#include "mma_output.cuh"
#include "units.cuh"
#include "wgmma.cuh"

namespace {

constexpr int SHARED_BYTES = 99 * 1024 - 128;  // what a block may have on every GPU from sm_80 on, without the barrier
constexpr int WARPS = GEMM_THREADS / 32;
constexpr int WARP_TILES = 2, TOKENS = 128;                // of a warp: row tiles, tokens; all warps have the same tokens
constexpr int TILE_UNITS = WARPS * WARP_TILES;             // row tiles of a block
constexpr int TOKEN_BYTES = UNIT_INPUTS * 2, X_BYTES = TOKENS * TOKEN_BYTES;
static_assert(TILE_UNITS * UNIT_ROWS * TOKENS <= PEREGRINE_GEMM_TILE, "the caller makes room");

template <int SCALES_, bool ZEROS_>
struct GemmShape {
    static constexpr int SCALES = SCALES_;
    static constexpr bool ZEROS = ZEROS_;
    static constexpr bool SCALED = SCALES == 1 && !ZEROS;  // unpacked by unpack_scaled
    static constexpr int BYTES = unit_bytes<SCALES, ZEROS>();
    static constexpr int STAGE_BYTES = X_BYTES + TILE_UNITS * BYTES;
    static constexpr int STAGES = SHARED_BYTES / STAGE_BYTES < 4 ? 3 : 4, RING_BYTES = STAGES * STAGE_BYTES;
    static_assert(RING_BYTES <= SHARED_BYTES);
};

struct GemmParams {
    GptqMatmulParams p;
    GemmPlan plan;
};

#if !PEREGRINE_WGMMA

constexpr int COLUMNS = TOKENS / 8, PAIRS = COLUMNS / 2;  // n8 tiles, and pairs of them

struct TilePlace {
    uint32_t tile0, token0, slice;  // row tile of 16
    __device__ __forceinline__ TilePlace(const GemmPlan& plan, uint32_t tile)
        : tile0(tile / plan.token_tiles % plan.row_tiles * TILE_UNITS), token0(tile % plan.token_tiles * TOKENS),
          slice(tile / plan.token_tiles / plan.row_tiles) {}
};

// Keeps the compiler from computing a value anew at each use.
__device__ __forceinline__ uint32_t kept(uint32_t v) {
    asm volatile("" : "+r"(v));
    return v;
}

// A thread's part of the copies: all units of the block's segments, in order.
template <class Shape>
class Fetch {
    static constexpr uint32_t CHUNKS = Shape::BYTES / 16, W_CHUNKS = TILE_UNITS * CHUNKS;  // of 16 bytes: of a unit, of a stage
    static constexpr int W_COPIES = (W_CHUNKS + GEMM_THREADS - 1) / GEMM_THREADS, X_COPIES = X_BYTES / 16 / GEMM_THREADS;
    const GemmParams& g;
    GemmWalk walk;
    const uint8_t *w, *x;                           // of the unit to come: of the matrix's first row tile, of token 0
    uint32_t w_chunk[W_COPIES], x_chunk[X_COPIES];  // this thread's, counted from there
    uint32_t w_to, x_to;                            // in the first stage
    uint32_t live = 1, last;                        // whether there are units to come; and this thread has a chunk of the last W_COPIES

    __device__ __forceinline__ static void copy(uint32_t to, const uint8_t* from, uint32_t wanted) {
        asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to), "l"(from), "r"(wanted)
                     : "memory");
    }

public:
    uint32_t units;  // left of the segment

    __device__ __forceinline__ Fetch(const GemmParams& g, uint32_t share_index, uint32_t ring) : g(g), walk(g.plan, share_index) {
        w_to = kept(ring + X_BYTES + threadIdx.x * 16);
        x_to = kept(ring + threadIdx.x / 8 * TOKEN_BYTES + (threadIdx.x % 8 ^ threadIdx.x / 8 % 8) * 16);
        last = threadIdx.x < W_CHUNKS - (W_COPIES - 1) * GEMM_THREADS;
        next();
    }

    // On to the next segment. After the last there is nothing to copy, for ever.
    __device__ __forceinline__ void next() {
        GemmSegment s;
        if (!walk.next(s)) {
            live = last = 0, units = ~0u;
            return;
        }
        const TilePlace place(g.plan, s.tile);
        units = s.end - s.begin;
        w = g.p.w.units + (size_t)s.begin * Shape::BYTES;
        x = reinterpret_cast<const uint8_t*>(g.p.x) + (size_t)s.begin * TOKEN_BYTES;
        // A row tile, or a token, that is not there: the last one again.
#pragma unroll
        for (int i = 0; i < W_COPIES; i++) {
            const uint32_t c = i * GEMM_THREADS + threadIdx.x, tile = min(place.tile0 + c / CHUNKS, g.p.w.n / UNIT_ROWS - 1);
            w_chunk[i] = tile * g.plan.k_units * CHUNKS + c % CHUNKS;
        }
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) {
            const uint32_t token = min(place.token0 + (i * GEMM_THREADS + threadIdx.x) / 8, g.p.tokens - 1);
            x_chunk[i] = token * (g.p.x_stride / 8) + threadIdx.x % 8;
        }
    }

    // Asks for a unit, into the stage at this offset.
    __device__ __forceinline__ void request(uint32_t stage) {
#pragma unroll
        for (int i = 0; i < X_COPIES; i++) copy(stage + x_to + i * GEMM_THREADS * 16, x + (size_t)x_chunk[i] * 16, live);
#pragma unroll
        for (int i = 0; i < W_COPIES; i++)
            copy(stage + w_to + i * GEMM_THREADS * 16, w + (size_t)w_chunk[i] * 16, i == W_COPIES - 1 ? last : live);
        cp_async_commit();
        x += TOKEN_BYTES, w += Shape::BYTES;
    }
};

// What a warp needs for the next step of 16 inputs.
template <class Shape>
struct Operands {
    static constexpr int RUN = STEPS / Shape::SCALES;  // steps that share a scale
    uint32_t a[2][WARP_TILES][4];                      // of even and of odd steps
    uint32_t b[PAIRS][4];
    uint4 codes[WARP_TILES];
    __half2 scale[WARP_TILES], zero[WARP_TILES];
    __half2 factor[WARP_TILES], offset[WARP_TILES];  // SCALED

    __device__ __forceinline__ void load_codes(const uint8_t* from) {
#pragma unroll
        for (int i = 0; i < WARP_TILES; i++) codes[i] = *reinterpret_cast<const uint4*>(from + i * Shape::BYTES);
    }
    __device__ __forceinline__ void load_scales(const uint8_t* from, int run) {
#pragma unroll
        for (int i = 0; i < WARP_TILES; i++) {
            const uint8_t* q = from + i * Shape::BYTES + run * UNIT_SCALE_BYTES;
            scale[i] = *reinterpret_cast<const __half2*>(q);
            if (Shape::ZEROS) zero[i] = *reinterpret_cast<const __half2*>(q + Shape::SCALES * UNIT_SCALE_BYTES);
            if (Shape::SCALED) {
                scale[i] = __hmul2(__hmul2(scale[i], factor[i]), factor[i]);
                offset[i] = subnormal_offset<false>(scale[i], scale[i]);
            }
        }
    }
    // Of the row tiles whose units are loaded from now on.
    __device__ __forceinline__ void load_factors(const GptqMatrix& w, uint32_t tile) {
#pragma unroll
        for (int i = 0; i < WARP_TILES; i++) factor[i] = row_factor(w, tile + i);
    }
    __device__ __forceinline__ void unpack(int i, int step) {
        const uint32_t words[STEPS] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
        if (Shape::SCALED) unpack_scaled<false>(words[step], scale[i], offset[i], a[step % 2][i]);
        else unpack_weights(words[step], scale[i], Shape::ZEROS ? ExactBias(zero[i]) : ExactBias(), a[step % 2][i]);
    }
};

template <class Shape>
__global__ void __launch_bounds__(GEMM_THREADS, 1) gptq_gemm_kernel(const __grid_constant__ GemmParams g) {
    constexpr int STAGES = Shape::STAGES;
    constexpr int ARRIVE = STAGES < 4 ? 2 : 0;  // the step at which a warp waits for its copies of the next unit
    extern __shared__ __align__(128) uint8_t smem[];
    __shared__ uint64_t all;  // a phase a unit: every warp has left the unit before, and its copies of the next one are there
    const uint32_t ring = smem_address(smem), barrier = kept(smem_address(&all));
    const uint32_t warp_tile = threadIdx.x / 32 * WARP_TILES, lane = threadIdx.x % 32, share_index = gridDim.x - 1 - blockIdx.x;
    // ldmatrix: lane l names token l % 8 of matrix l / 8: inputs 8 (l / 8 % 2), tokens 8 (l / 16) of a pair of columns.
    const uint32_t x_from = kept(ring + (lane / 16 * 8 + lane % 8) * TOKEN_BYTES + (lane / 8 % 2 ^ lane % 8) * 16);
    const uint32_t w_from = kept(X_BYTES + warp_tile * Shape::BYTES + lane * 16);
    const uint32_t q_from = kept(X_BYTES + warp_tile * Shape::BYTES + UNIT_CODE_BYTES + lane / 4 * 4);
    if (threadIdx.x == 0) barrier_init(&all, WARPS);

    wait_previous();
    Fetch<Shape> fetch(g, share_index, ring);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (fetch.units == 0) fetch.next();
        fetch.request(i * Shape::STAGE_BYTES);
        fetch.units--;
    }
    uint32_t at = 0, refill = (STAGES - 1) * Shape::STAGE_BYTES, parity = 0;  // offsets of the stages that are read and filled
    const auto after = [](uint32_t stage) { return stage == (STAGES - 1) * Shape::STAGE_BYTES ? 0 : stage + Shape::STAGE_BYTES; };
    Operands<Shape> next;
    GemmWalk walk(g.plan, share_index);
    // Of the segment that `from` gives next.
    const auto load_factors = [&](GemmWalk from) {
        GemmSegment s;
        if (Shape::SCALED && from.next(s)) next.load_factors(g.p.w, TilePlace(g.plan, s.tile).tile0 + warp_tile);
    };
    load_factors(walk);
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    next.load_codes(smem + w_from);
    next.load_scales(smem + q_from, 0);
#pragma unroll
    for (int j = 0; j < PAIRS; j++) ldmatrix(next.b[j], x_from + j * 16 * TOKEN_BYTES);
#pragma unroll
    for (int i = 0; i < WARP_TILES; i++) next.unpack(i, 0);

    for (GemmSegment s; walk.next(s);) {
        float acc[WARP_TILES * COLUMNS][4] = {};
        for (uint32_t units = s.end - s.begin; units > 0;) {
            if (fetch.units == 0) fetch.next();
            uint32_t n = min(units, fetch.units);  // in which neither segment ends
            if (Shape::SCALED && units > 1) n = min(n, units - 1);
            if (units == 1) load_factors(walk);  // during the last one the next segment's first is loaded
            units -= n, fetch.units -= n;
#pragma unroll 2
            for (; n > 0; n--) {
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    // Multiplies what is there, and each register that is free gets the next step's value.
                    const int to = (step + 1) % STEPS;
                    if (step == ARRIVE) {
                        cp_async_wait<STAGES - 3>();
                        __syncwarp();
                        if (lane == 0) asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(barrier) : "memory");
                    }
                    if (to == 0) {
                        while (!barrier_test(barrier, parity)) {
                        }
                        parity ^= 1;
                        at = after(at);
                        next.load_scales(smem + at + q_from, 0);
                        next.load_codes(smem + at + w_from);
                    } else if (to % Operands<Shape>::RUN == 0) next.load_scales(smem + at + q_from, to / Operands<Shape>::RUN);
                    const uint32_t x = (at + x_from) ^ (to * 32);
#pragma unroll
                    for (int j = 0; j < PAIRS; j++) {
                        if (to == 0 && j == 1) {
                            fetch.request(refill);
                            refill = after(refill);
                        }
#pragma unroll
                        for (int i = 0; i < WARP_TILES; i++)
#pragma unroll
                            for (int q = 0; q < 2; q++)
                                mma(acc[i * COLUMNS + j * 2 + q], next.a[step % 2][i], next.b[j][q * 2], next.b[j][q * 2 + 1]);
                        ldmatrix(next.b[j], x + j * 16 * TOKEN_BYTES);
                        if (j % (PAIRS / WARP_TILES) == 0) next.unpack(j / (PAIRS / WARP_TILES), to);
                    }
                }
            }
        }
        if (!s.owner) {
            give_sums(g.p, acc, share_index);
            continue;
        }
        if (!s.complete) {
            const uint32_t tile_end = (s.tile - g.plan.whole + 1) * g.plan.k_units;
            uint32_t end = share_index + 1;
            while (end < g.plan.blocks && g.plan.share(end) < tile_end) end++;
            take_sums(g.p, acc, share_index + 1, end);
        }
        const TilePlace place(g.plan, s.tile);
        const uint32_t row = (place.tile0 + warp_tile) * UNIT_ROWS;
        if (row >= g.p.w.n) continue;
        if (g.p.y.partials || g.p.y.residual) store_floats<Shape::SCALED, COLUMNS>(g.p, place.slice, row, place.token0, acc);
        else store_halves<Shape::SCALED, COLUMNS>(g.p, row, place.token0, acc);
    }
    cp_async_wait<0>();
}

#else

template <class Shape>
__global__ void gptq_gemm_kernel(const __grid_constant__ GemmParams) {}

#endif

template <int SCALES, bool ZEROS>
int32_t run(const GptqMatmulParams* p, const Launch* l) {
    using Shape = GemmShape<SCALES, ZEROS>;
    const bool halves = !p->y.partials && !p->y.residual;
    if (halves && (p->y.out_stride % 8 || p->y.gelu_stride % 8)) return PEREGRINE_BAD_SHAPE;  // 16-byte stores
    int device = 0, multiprocessors = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e != cudaSuccess) return (int32_t)e;
    const GemmPlan plan(*p, TILE_UNITS / 4, TOKENS, (uint32_t)multiprocessors);
    const GemmParams g = {*p, plan};
    return launch(gptq_gemm_kernel<Shape>, dim3(plan.blocks), GEMM_THREADS, Shape::RING_BYTES, l, g);
}

}  // namespace

extern "C" int32_t gptq_gemm(const GptqMatmulParams* p, const Launch* l) {
    const GptqMatrix& w = p->w;
    if (w.n == 0 || w.n % UNIT_ROWS || w.k == 0 || w.k % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    if (p->tokens == 0 || p->x_stride % 8 || p->y.split_row % UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    const uint32_t k_units = w.k / UNIT_INPUTS;
    if (p->slices == 0 || (p->slices > 1 && !p->y.partials)) return PEREGRINE_BAD_SHAPE;
    if ((p->slices - 1) * ((k_units + p->slices - 1) / p->slices) >= k_units) return PEREGRINE_BAD_SHAPE;
    if (const uint32_t multiprocessors = gptq_gemm_wgmma_multiprocessors()) return gptq_gemm_wgmma(p, l, multiprocessors);
    switch (w.scales_per_row * 2 + w.has_zeros) {
        case 2: return run<1, false>(p, l);
        case 3: return run<1, true>(p, l);
        case 4: return run<2, false>(p, l);
        case 5: return run<2, true>(p, l);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
