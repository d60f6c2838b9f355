// batch — the loop of gptq_batch, and of head beyond 8 tokens, before sm_90: 9 to 72 tokens times a matrix in units, each byte read once.
//
// A block multiplies row tiles, one a warp at a time, by all tokens, in stages along the inputs: the row tiles' units and the tokens'
// activations of the same inputs lie in a ring in shared memory. One warp fetches weights and one activations (cp.async); the others
// multiply, unit by unit (chain.cuh), and wait only for the stage they need.
//
// Stage    activations [unit][TOKENS][128 bytes], 16-byte chunk c of token t at c ^ (t % 8), free of ldmatrix bank conflicts; then [row
//          tile][unit]. Each stage has a barrier for full and one for empty.
#pragma once
#include "chain.cuh"
#include "launch.cuh"

constexpr int BATCH_WARPS = 12;                        // that multiply: three warpgroups
constexpr int BATCH_THREADS = (BATCH_WARPS + 2) * 32;  // and one warp that fetches weights, one activations

// What a block multiplies: row tiles tile0 .. tile1, inputs of units unit0 .. unit0 + count.
struct BatchSpan {
    const uint8_t* units;
    const uint16_t* x;
    uint32_t k_units, x_stride, tokens;
    uint32_t unit0, count, tile0, tile1;
};

template <class Weights_, int TOKENS_, int UNITS_, bool PASSES_>
struct BatchShape {
    using Weights = Weights_;
    static constexpr int TOKENS = TOKENS_;
    static constexpr int UNITS = UNITS_;     // of a stage
    static constexpr bool PASSES = PASSES_;  // a block may have more row tiles than its warps hold at a time
    static constexpr int X_BYTES = UNITS * TOKENS * TOKEN_BYTES;
    static constexpr int TILE_BYTES = UNITS * Weights::BYTES;
    static constexpr int STAGE_BYTES = (X_BYTES + BATCH_WARPS * TILE_BYTES + 1023) / 1024 * 1024;
};

// A barrier in shared memory: one that is passed when all its arrivals are in, again and again; `parity` counts the times.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(barrier) : "memory");
}
// Arrives when this thread's copies so far are there.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t passed;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
#else
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
#endif
    } while (!passed);
}

// A place in the ring of STAGES stages that begins at shared address 0 of the ring, and the barriers behind it.
template <class Shape, int STAGES>
struct RingPlace {
    static constexpr uint32_t BYTES = STAGES * Shape::STAGE_BYTES;
    uint32_t at = 0, slot = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        at += Shape::STAGE_BYTES;
        if (++slot == STAGES) at = slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ uint32_t full(uint32_t ring) const { return ring + BYTES + slot * 16; }
    __device__ __forceinline__ uint32_t empty(uint32_t ring) const { return ring + BYTES + slot * 16 + 8; }
};
template <class Shape, int STAGES>
constexpr size_t ring_bytes = RingPlace<Shape, STAGES>::BYTES + STAGES * 16;

// Stages that fit `shared` bytes.
template <class Shape>
constexpr int batch_stages(int shared) { return (shared - 256) / Shape::STAGE_BYTES < 12 ? (shared - 256) / Shape::STAGE_BYTES : 12; }
constexpr int WIDE_SHARED = 216 * 1024;    // sm_90
constexpr int NARROW_SHARED = 160 * 1024;  // sm_80

// What a launcher asks of the device it is on.
struct BatchDevice {
    int multiprocessors = 0, shared = 0;

    cudaError_t query() {
        int device = 0;
        cudaError_t e = cudaGetDevice(&device);
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        return e;
    }
};

#if !PEREGRINE_WGMMA

// The warp that fetches the weights of all stages: nobody writes them, so it need not wait for the predecessor in the stream.
template <class Shape, int STAGES>
__device__ __forceinline__ void fetch_weights(const BatchSpan& s, uint32_t ring, uint32_t stages, uint32_t pass_tiles) {
    constexpr int BYTES = Shape::Weights::BYTES, TILE_BYTES = Shape::TILE_BYTES;
    const uint32_t lane = threadIdx.x % 32, tile_bytes = s.k_units * BYTES;
    RingPlace<Shape, STAGES> place;
    uint32_t asked = 0, tile = s.tile0, tiles = min(pass_tiles, s.tile1 - tile);  // units asked for in this pass; its row tiles
    const uint8_t* w = s.units + (size_t)tile * tile_bytes + (size_t)s.unit0 * BYTES + lane * 16;
    for (uint32_t j = 0; j < stages; j++) {
        if (j >= STAGES) barrier_wait(place.empty(ring), place.parity ^ 1);
        const int present = (int)min((uint32_t)Shape::UNITS, s.count - asked) * BYTES - (int)lane * 16;
        uint32_t to = ring + place.at + Shape::X_BYTES + lane * 16;
        const uint8_t* from = w;
        for (uint32_t t = 0; t < tiles; t++) {
#pragma unroll
            for (int i = 0; i * 512 < TILE_BYTES; i++)
                if ((i + 1) * 512 <= TILE_BYTES || i * 512 + lane * 16 < TILE_BYTES)
                    cp_async(to + i * 512, from + i * 512, i * 512 < present);
            to += TILE_BYTES;
            from += tile_bytes;
        }
        barrier_arrive_copies(place.full(ring));
        place.advance();
        w += TILE_BYTES;
        asked += Shape::UNITS;
        if (Shape::PASSES && asked >= s.count) {
            asked = 0;
            tile += pass_tiles;
            tiles = min(pass_tiles, s.tile1 - tile);
            w = s.units + (size_t)tile * tile_bytes + (size_t)s.unit0 * BYTES + lane * 16;
        }
    }
}

// The warp that fetches the activations; zeros for tokens and inputs that are not there.
template <class Shape, int STAGES>
__device__ __forceinline__ void fetch_activations(const BatchSpan& s, uint32_t ring, uint32_t stages) {
    constexpr int ROW_CHUNKS = Shape::UNITS * 8;  // of 16 bytes, of a token in a stage
    constexpr int PARTS = ROW_CHUNKS / 8;         // 4 tokens x 8 chunks are one instruction
    const uint32_t lane = threadIdx.x % 32, chunk = lane % 8;
    RingPlace<Shape, STAGES> place;
    uint32_t asked = 0;
    const uint16_t* x = s.x + (size_t)(lane / 8) * s.x_stride + s.unit0 * UNIT_INPUTS + chunk * 8;
    for (uint32_t j = 0; j < stages; j++) {
        if (j >= STAGES) barrier_wait(place.empty(ring), place.parity ^ 1);
        const uint16_t* from = x;
#pragma unroll 4
        for (uint32_t m = lane / 8; m < Shape::TOKENS; m += 4) {
            const uint32_t to = ring + place.at + m * TOKEN_BYTES + (chunk ^ (m % 8)) * 16;
#pragma unroll
            for (int u = 0; u < PARTS; u++)
                cp_async(to + u * Shape::TOKENS * TOKEN_BYTES, from + u * UNIT_INPUTS, m < s.tokens && asked + u < s.count);
            from += 4 * s.x_stride;
        }
        barrier_arrive_copies(place.full(ring));
        place.advance();
        x += Shape::UNITS * UNIT_INPUTS;
        asked += Shape::UNITS;
        if (Shape::PASSES && asked >= s.count) {
            x -= asked * UNIT_INPUTS;
            asked = 0;
        }
    }
}

// Multiplies the span. finish(tile, end, acc) gets the sums of each pass, warp w those of row tile tile + w, if that is below end:
// acc[n][0, 1] row lane / 4 and tokens 8 n + 2 (lane % 4), + 1; acc[n][2, 3] row lane / 4 + 8. With PASSES the warps that multiply call
// it after each pass, otherwise all threads of the block, once.
template <class Shape, int STAGES, class Finish>
__device__ __forceinline__ void multiply_batch(const BatchSpan& s, Finish finish) {
    using Weights = typename Shape::Weights;
    constexpr int TOKENS = Shape::TOKENS, UNITS = Shape::UNITS, TILE_BYTES = Shape::TILE_BYTES;
    extern __shared__ __align__(1024) uint8_t smem[];
    const uint32_t ring = smem_address(smem), lane = threadIdx.x % 32;
    const uint32_t warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the compiler sees that a warp has one
    const uint32_t chunks = (s.count + UNITS - 1) / UNITS, tiles = s.tile1 - s.tile0;
    const uint32_t passes = Shape::PASSES ? (tiles + BATCH_WARPS - 1) / BATCH_WARPS : 1;
    const uint32_t pass_tiles = (tiles + passes - 1) / passes, stages = passes * chunks;

    RingPlace<Shape, STAGES> place;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(place.full(ring) + i * 16, 2 * 32);
            barrier_init(place.empty(ring) + i * 16, BATCH_WARPS);
        }
    }
    __syncthreads();

    float acc[TOKENS / 8][4] = {};
    if (warp == BATCH_WARPS) {
        fetch_weights<Shape, STAGES>(s, ring, stages, pass_tiles);
        wait_previous();
    } else if (warp > BATCH_WARPS) {
        wait_previous();
        fetch_activations<Shape, STAGES>(s, ring, stages);
    } else {
        wait_previous();
        const uint8_t* mine = smem + Shape::X_BYTES + warp * TILE_BYTES;
        const auto enter = [&] {
            barrier_wait(place.full(ring), place.parity);
            __syncwarp();
        };
        uint32_t chunk = 0, tile = s.tile0;
        enter();
        typename Weights::Raw raw;
        raw.load(mine, lane);
        for (uint32_t j = 0; j < stages; j++) {
            const RingPlace<Shape, STAGES> now = place;
#pragma unroll 1
            for (int u = 0; u < UNITS; u++) {
                Weights w;
                w.unpack(raw);
#pragma unroll
                for (int run = 0; run < Weights::RUNS; run++)
                    add_chain<Weights, TOKENS>(acc, w, ring + now.at + u * TOKENS * TOKEN_BYTES, run);
                if (u + 1 == UNITS) {
                    place.advance();
                    if (j + 1 < stages) enter();
                }
                raw.load(mine + place.at + (u + 1) % UNITS * Weights::BYTES, lane);
            }
            if (lane == 0) barrier_arrive(now.empty(ring));
            if (Shape::PASSES && ++chunk == chunks) {
                finish(tile, min(tile + pass_tiles, s.tile1), acc);
#pragma unroll
                for (int n = 0; n < TOKENS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[n][e] = 0.f;
                chunk = 0;
                tile += pass_tiles;
            }
        }
    }
    if (!Shape::PASSES) finish(s.tile0, s.tile1, acc);
}

#endif
