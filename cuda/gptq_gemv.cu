// gptq_gemv — y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units, 1 to 8 tokens.   Reference: src/reference.rs::gptq_matmul
// Shapes   [qkv ; up] 22848 x 4544, [down | dense] 4544 x 22720 (5 slices); any n % 16 == 0, k % 64 == 0.
// Reads    W once (unit layout, cuda/units.cuh), x [tokens, k] f16.   Writes see GptqOutput.
// Mapping  a strip is 16 rows x one K slice of at most 72 units (71 for Falcon-7B: 38.6 KB, one contiguous piece). One block of 12 warps
//          an SM keeps to one slice and takes every n-th strip. A warp owns the same 6 units of every strip (strip.cuh): it streams them
//          through a ring of its own (five stages of cp.async on sm_90, no barrier with other warps), and keeps its inputs in registers
//          for the whole product. The warps' sums of as many strips as there is room for are collected in one half of their shared
//          memory; then all threads add and store them while the next go to the other half. Four tokens are a tile of columns.
// Overlap  the ring is filled before the predecessor in the stream has finished (weights are nobody's output), while norm or attention
//          run: 25 of 55 MB. What they load queues behind what is in flight, so no more than two thirds of a strip is. Registers and
//          shared memory leave room for the neighbours' blocks on the same SM, and the grid leaves SMs free where that costs no round:
//          a block that has to wait for theirs would begin with an empty ring and end 5 us after the others.
// Numbers  inputs in 16-bit fixed point, one step for a token's inputs of a warp; sums of a unit are exact integers, then scaled in f32.
//          The warps' sums are added in warp order: same bits every run, and for a token whether it comes alone or among eight.
// Floor    [qkv ; up] 55.2 MB, [down | dense] 54.9 MB: 11.7 us each at 4.70 TB/s.
// Measured a step of one kernel an op from ids to logits in a graph, H200, this kernel and attn_decode against those before, in turns:
//          tokens at position     1 at 128   1 at 1000   2 at 128   4 at 128   8 at 128
//          before, ms                1.555       1.622      1.576      1.663      1.823
//          now                       1.209       1.353      1.252      1.440      1.685     (norms of 4 and 8 hold up blocks)
//          groups of 32 with zero points: 1.984 and 2.161 at 1 and 8 tokens before, 1.328 and 1.921 now.
//          In the program 822 tokens/s, 635 before; 843 with the norm by clusters. Alone, with events on either side: 19.1 and 18.8 us at
//          1 token (21.8 and 19.2 before), 27.0 and 25.0 at 8 (25.1 and 23.3): the ring fills slowly, which only pays beside others.
//          Forced to the code of sm_80, whose kernels do not overlap: 1.497 and 1.930 at 1 and 8 tokens, 1.700 and 1.957 before.
//          Of a layer's 36 us at 1 token: twice 0.7 until the wait for the predecessor is over, 1.2 for the inputs, 8.4 for 11 strips, of
//          which 5 are here, 2 until the successor's wait is over; attention 5.9, norm 5.1.
// Tried    (the same step at 1 token, ms; 8 tokens) f16 codes by 16 warps with three stages and everything asked for at once: above.
//          In flight before the predecessor has finished, against 1.239: 1 strip or two halves 1.266 to 1.294, two halves at most half
//          the time 1.236 (against 1.196); a sixth of a strip 1.74, as the ring then is not full in time.
//          Three stages: 0.01 more. No evict-first hint: 0.024 more. A block on every SM: 0.011 more. Strips beyond the ring asked for by
//          prefetches to L2: the same with two, 0.09 more with four. Registers above 128 for 8 tokens, no neighbour fits: 1.94 instead of
//          1.83. Spills in the loop: 1.91 instead of 1.81 (L1 is what the ring leaves). Inputs of 8 tokens one after the other: 1.745.
//          A preference for shared memory over L1 in the neighbours: the same.
// Spills   up to 16 bytes, with more than 4 tokens.
#include "launch.cuh"
#include "strip.cuh"

namespace {

constexpr int WARPS = 12;
constexpr int THREADS = WARPS * 32;
// Bounds registers to 96 a thread, 128 with two tiles of tokens: what is left is for blocks of the neighbours in the stream.
template <int TILES>
constexpr int BOUND_THREADS = TILES == 1 ? 640 : 512;
constexpr int WARP_UNITS = PEREGRINE_SLICE_UNITS / WARPS;
// Before the predecessor has finished a strip is asked for in PARTS, IN_FLIGHT of them at a time.
[[maybe_unused]] constexpr int PARTS = 3, IN_FLIGHT = 2;
constexpr uint32_t MOST_STAGES = 5;
constexpr uint32_t SUM_FLOATS = 256;             // of a warp: sums of strips, and before those the bytes of its inputs
constexpr uint32_t NEIGHBOUR_BYTES = 10 * 1024;  // shared memory left to the neighbours' blocks: one of attn_decode, or of layernorm

// What lies in front of the ring.
template <int SCALES, int TILES>
struct Front {
    float sums[WARPS][2][SUM_FLOATS / 2];  // two halves of [strips][tokens][16]: one is written while the other is stored
    uint8_t inputs[WARPS][StripInputs<WARP_UNITS, TILES, SCALES>::SUM_BYTES];
};
static_assert(SUM_FLOATS * sizeof(float) >= 2 * WARP_UNITS * UNIT_INPUTS, "room for the bytes of the inputs");
static_assert(SUM_FLOATS / 2 >= PEREGRINE_GEMV_TOKENS * UNIT_ROWS, "room for a strip");

struct GemvParams : GptqMatmulParams {
    uint32_t stages;
};

// Units of a slice that warp w owns: first (w) .. first (w + 1).
__device__ __forceinline__ uint32_t first_unit(uint32_t warp, uint32_t count) { return warp * count / WARPS; }

// 16 bytes global -> shared, first to leave L2 again.
__device__ __forceinline__ void copy_once(uint32_t smem, const void* global, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "l"(policy) : "memory");
}
__device__ __forceinline__ uint64_t first_to_leave() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// Waits until at most `pending` of the groups asked for are not here.
__device__ __forceinline__ void wait_for(uint32_t pending) {
    if (pending >= 4) cp_async_wait<4>();
    else if (pending == 3) cp_async_wait<3>();
    else if (pending == 2) cp_async_wait<2>();
    else if (pending == 1) cp_async_wait<1>();
    else cp_async_wait<0>();
}

// A warp's ring of strips, its units of each.
template <int BYTES>
struct Ring {
    static constexpr uint32_t STAGE_BYTES = WARP_UNITS * BYTES;
    uint32_t begin, end, to;  // shared addresses: of the ring, and of the stage to be filled next
    uint32_t present;         // bytes of a strip that are the warp's
    uint32_t tile, tiles, tile_step;
    const uint8_t* from;
    size_t step;              // bytes between strips
    uint64_t policy = first_to_leave();

    // Asks for bytes first .. first + COUNT of the next strip.
    template <uint32_t COUNT>
    __device__ __forceinline__ void ask(uint32_t first, uint32_t lane) {
        if (tile >= tiles) return;
#pragma unroll
        for (uint32_t i = 0; i < (COUNT + 511) / 512; i++) {
            const uint32_t at = first + i * 512 + lane * 16;
            if (at < present && i * 512 + lane * 16 < COUNT) copy_once(to + at, from + at, policy);
        }
    }
    __device__ __forceinline__ void advance() {
        tile += tile_step, from += step, to += STAGE_BYTES;
        if (to == end) to = begin;
    }
    // Fills all stages. A warp multiplies WARP_UNITS units of every strip, without a branch: those it does not own are zeros.
    __device__ __forceinline__ void fill(uint32_t lane) {
        constexpr uint32_t PART_BYTES = WARP_UNITS / PARTS * BYTES;
#pragma unroll 1
        do {
            for (uint32_t at = present + lane * 16; at < STAGE_BYTES; at += 512)
                asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(to + at), "r"(0) : "memory");
#pragma unroll 1
            for (uint32_t part = 0; part < PARTS; part++) {
                ask<PART_BYTES>(part * PART_BYTES, lane);
#if __CUDA_ARCH__ >= 900
                cp_async_commit();
                cp_async_wait<IN_FLIGHT - 1>();  // the predecessor's loads and stores would queue behind more
#endif
            }
#if __CUDA_ARCH__ < 900
            cp_async_commit();
#endif
            advance();
        } while (to != begin);
    }
    // Asks for the next strip.
    __device__ __forceinline__ void refill(uint32_t lane) {
        ask<STAGE_BYTES>(0, lane);
        cp_async_commit();
        advance();
    }
};

// The inputs of this warp's `units` units, from unit0 on. `bytes`: shared memory for one token's.
template <int TILES, int SCALES>
__device__ __forceinline__ void load_inputs(StripInputs<WARP_UNITS, TILES, SCALES>& x, const GptqMatmulParams& p, uint32_t unit0,
                                            uint32_t units, uint32_t bytes, uint32_t lane) {
    const auto load = [&](uint32_t token, uint32_t chunk) {
        const uint16_t* row = p.x + (size_t)token * p.x_stride + (size_t)unit0 * UNIT_INPUTS;
        return token < p.tokens && chunk < units * 8 ? reinterpret_cast<const uint4*>(row)[chunk] : make_uint4(0, 0, 0, 0);
    };
    if (TILES == 1 && p.tokens == 1) {
        constexpr int PIECES = StripInputs<WARP_UNITS, TILES, SCALES>::PIECES;
        uint4 chunks[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; i++) chunks[i] = load(0, lane + 32 * i);
        x.set_one(chunks, bytes, lane);
    } else {
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            uint4 chunks[WARP_UNITS];
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++) chunks[i] = load(t * COLUMN_TOKENS + lane / 8, lane % 8 + 8 * i);
            x.set(t, chunks, lane);
        }
    }
    x.add_up(lane);
}

// Adds the warps' sums of `strips` strips, in warp order, and stores them. `tile` is the last strip's.
template <typename Shared>
__device__ __forceinline__ void store_strips(const GptqMatmulParams& p, const Shared& shared, uint32_t half, uint32_t strips, uint32_t tile,
                                             uint32_t tile_step, uint32_t slice) {
    for (uint32_t i = threadIdx.x; i < strips * p.tokens * UNIT_ROWS; i += THREADS) {
        const uint32_t r = i % UNIT_ROWS, m = i / UNIT_ROWS % p.tokens, strip = i / (UNIT_ROWS * p.tokens);
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += shared.sums[w][half][i];
        store_output(p.y, p.w.n, p.tokens, slice, m, (tile - (strips - 1 - strip) * tile_step) * UNIT_ROWS + r, sum);
    }
}

template <int SCALES, bool ZEROS, int TILES>
__global__ void __launch_bounds__(BOUND_THREADS<TILES>, 1) gptq_gemv_kernel(const __grid_constant__ GemvParams p) {
    overlap_next();
    constexpr int BYTES = unit_bytes<SCALES, ZEROS>();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t tiles = p.w.n / UNIT_ROWS, k_units = p.w.k / UNIT_INPUTS;
    const uint32_t slice_units = (k_units + p.slices - 1) / p.slices;
    const uint32_t slice = blockIdx.x % p.slices, tile_step = gridDim.x / p.slices, first_tile = blockIdx.x / p.slices;
    const uint32_t count = min(slice_units, k_units - slice * slice_units);
    const uint32_t unit0 = slice * slice_units + first_unit(warp, count);
    const uint32_t units = first_unit(warp + 1, count) - first_unit(warp, count);

    extern __shared__ __align__(16) uint8_t smem[];
    auto& front = *reinterpret_cast<Front<SCALES, TILES>*>(smem);
    Ring<BYTES> ring;
    ring.begin = ring.to = smem_address(smem + sizeof(front)) + warp * p.stages * ring.STAGE_BYTES;
    ring.end = ring.begin + p.stages * ring.STAGE_BYTES;
    ring.present = units * BYTES;
    ring.tile = first_tile, ring.tiles = tiles, ring.tile_step = tile_step;
    ring.from = p.w.units + ((size_t)first_tile * k_units + unit0) * BYTES;
    ring.step = (size_t)tile_step * k_units * BYTES;
    ring.fill(lane);
    wait_previous();
    StripInputs<WARP_UNITS, TILES, SCALES> x;
    x.sums = smem_address(front.inputs[warp]);
    load_inputs(x, p, unit0, units, smem_address(front.sums[warp]), lane);

    const uint32_t slots = SUM_FLOATS / 2 / (UNIT_ROWS * p.tokens);
    uint32_t slot = 0, half = 0;
    for (uint32_t tile = first_tile; tile < tiles; tile += tile_step) {
        wait_for(p.stages - 1);
        __syncwarp();  // every lane's part of this stage is here
        float sum[TILES][2];
        multiply_part<ZEROS>(sum, ring.to, x, lane);
        __syncwarp();  // every lane has left it
        ring.refill(lane);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const uint32_t token = t * COLUMN_TOKENS + lane % 4;
            float* to = front.sums[warp][half] + (slot * p.tokens + token) * UNIT_ROWS + lane / 4;
            if (token < p.tokens) to[0] = sum[t][0], to[8] = sum[t][1];
        }
        if (++slot == slots || tile + tile_step >= tiles) {
            __syncthreads();  // also: all have stored what was in the other half
            store_strips(p, front, half, slot, tile, tile_step, slice);
            half ^= 1, slot = 0;
        }
    }
}

template <int SCALES, bool ZEROS, int TILES>
int32_t run(const GptqMatmulParams* p, const Launch* l) {
    constexpr uint32_t STRIP_BYTES = WARPS * WARP_UNITS * unit_bytes<SCALES, ZEROS>(), FRONT_BYTES = sizeof(Front<SCALES, TILES>);
    int device = 0, multiprocessors = 0, shared = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (e != cudaSuccess) return (int32_t)e;
    const GemvParams params = {*p, min((shared - FRONT_BYTES - NEIGHBOUR_BYTES) / STRIP_BYTES, MOST_STAGES)};
    // As few blocks as need no more rounds than one a multiprocessor would: the rest is free for the norm.
    const uint32_t tiles = p->w.n / UNIT_ROWS, most = max((uint32_t)multiprocessors / p->slices, 1u);
    const uint32_t rounds = (tiles + most - 1) / most, blocks_a_slice = (tiles + rounds - 1) / rounds;
    return launch(gptq_gemv_kernel<SCALES, ZEROS, TILES>, dim3(blocks_a_slice * p->slices), THREADS,
                  FRONT_BYTES + params.stages * STRIP_BYTES, l, params);
}

template <int SCALES, bool ZEROS>
int32_t run(const GptqMatmulParams* p, const Launch* l) {
    return p->tokens <= COLUMN_TOKENS ? run<SCALES, ZEROS, 1>(p, l) : run<SCALES, ZEROS, 2>(p, l);
}

}  // namespace

extern "C" int32_t gptq_gemv(const GptqMatmulParams* p, const Launch* l) {
    const GptqMatrix& w = p->w;
    if (w.n == 0 || w.n % UNIT_ROWS || w.k == 0 || w.k % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    if (p->tokens == 0 || p->tokens > PEREGRINE_GEMV_TOKENS || p->x_stride % 8 || p->y.split_row % UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    const uint32_t k_units = w.k / UNIT_INPUTS;
    if (p->slices == 0 || (p->slices > 1 && !p->y.partials)) return PEREGRINE_BAD_SHAPE;
    const uint32_t slice_units = (k_units + p->slices - 1) / p->slices;
    if (slice_units > PEREGRINE_SLICE_UNITS || (p->slices - 1) * slice_units >= k_units) return PEREGRINE_BAD_SHAPE;
    switch (w.scales_per_row * 2 + w.has_zeros) {
        case 2: return run<1, false>(p, l);
        case 3: return run<1, true>(p, l);
        case 4: return run<2, false>(p, l);
        case 5: return run<2, true>(p, l);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
