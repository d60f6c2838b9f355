// batch_wgmma — what the warps of a block of gptq_batch_wgmma.cu do, one function each, and what they share. There is why.
#pragma once
#include "bulk.cuh"
#include "chain.cuh"
#include "gemm_output.cuh"
#include "launch.cuh"
#include "near.cuh"
#include "planes.cuh"
#include "ready.cuh"
#include "tma.cuh"

constexpr int WARPS = MOST_GROUPS * GROUP_TILES;  // that multiply, one row tile each: a warpgroup a group
constexpr int THREADS = (WARPS + 2) * 32;         // and one warp that fetches weights, one activations
constexpr int AHEAD = 2;                          // units a warp loads ahead of the one it unpacks
constexpr int UNITS_IN_FLIGHT = 12;               // of weights: more of them delay everybody else's loads, the activations' first of all
// Stages asked for, one after the other, before the inputs are there: norm or attention are at work then, and wait longer for more.
constexpr uint32_t EARLY = 2, EARLY_SLICED = 3;
constexpr uint32_t NEXT_STAGES = 2;        // of the next product, into L2
constexpr int EARLY_TOGETHER_TOKENS = 16;  // to here, [down | dense] asks for two of them at once (see Log)
constexpr int SHARED_BYTES = 218 * 1024;
constexpr int REGISTERS = 96;  // of a thread at most: attention is to fit beside a block, see Behind

template <int SCALES_, bool ZEROS_, int TOKENS_, bool PLANES_ = false>
struct BatchShape {
    static constexpr int SCALES = SCALES_, TOKENS = TOKENS_;
    static constexpr bool ZEROS = ZEROS_, PLANES = PLANES_;  // activations are planes (batch_planes.cuh)
    using Units = GptqUnits<SCALES, ZEROS>;
    static constexpr int UNITS = TOKENS <= 64 ? NEAR_UNITS : 4;  // of a stage; six if three stages of weights fit
    // What there is room for, or with 16 tokens one more, as many as of weights.
    static constexpr int X_STAGES = TOKENS == 16 ? 4 : TOKENS <= 40 || TOKENS > 64 ? 3 : 2;
    static constexpr int IN_FLIGHT = UNITS_IN_FLIGHT / UNITS;
    static_assert(UNITS % AHEAD == 0 && AHEAD < UNITS, "a unit's registers are known when compiling");
    static constexpr int X_UNIT = TOKENS * TOKEN_BYTES;
    static constexpr int X_STAGE = UNITS * X_UNIT;
    static constexpr int W_TILE = UNITS * Units::BYTES;
    static constexpr int W_STAGE = WARPS * W_TILE;
    static constexpr int W_STAGES = (SHARED_BYTES - WARPS * TRANSPOSE_BYTES - 512 - X_STAGES * X_STAGE) / W_STAGE;
    // Shared memory: activations, weights, one transpose a warp, barriers.
    static constexpr int W_AT = X_STAGES * X_STAGE;
    static constexpr int TRANSPOSE_AT = W_AT + W_STAGES * W_STAGE;
    static constexpr int BARRIERS_AT = TRANSPOSE_AT + WARPS * TRANSPOSE_BYTES;
    static constexpr int STEPS_AT = BARRIERS_AT + (2 * (W_STAGES + X_STAGES) + 2) * 8;  // of planes, likewise in stages
    static constexpr int STEP_BYTES = PLANES ? TOKENS * 4 : 0;                            // of a unit
    static constexpr int MOST_AT = STEPS_AT + X_STAGES * UNITS * STEP_BYTES;              // what groups know of their outputs, if planes
    static constexpr int BYTES = MOST_AT + (PLANES ? WARPS * TOKENS * 4 : 0);
    static_assert(W_STAGES >= IN_FLIGHT, "room for them");
    static constexpr bool TOGETHER = W_STAGES == X_STAGES;  // with 16, 32 and 40 tokens both rings turn as one
    // With 196 KB or less a multiprocessor has no more than that for shared memory while the block is there: attention would not fit.
    static constexpr int ASKED_BYTES = BYTES > 200 * 1024 ? BYTES : 200 * 1024;
    using Sums = float[TOKENS / 8][4];
    static constexpr bool NEAR = UNITS == NEAR_UNITS && TOKENS > 8;  // there is a kernel for weights that lie in near
};

struct BatchParams {
    CUtensorMap x;  // [k units][tokens][64] f16; not of planes
    GptqMatmulParams p;
    Slices slices;
    Deal deal;
    Next next;
    Near near, next_near;
};

#if PEREGRINE_WGMMA

template <class Shape>
struct Barriers {
    uint64_t w_full[Shape::W_STAGES], w_empty[Shape::W_STAGES], x_full[Shape::X_STAGES], x_empty[Shape::X_STAGES], inputs;
    uint2 dealt;  // part and slice, as claimed
};

template <class Shape>
using Span = Share<Shape::UNITS>;

// NEAR: the first stage was asked for, the others lie in `near`, of stream `side`, behind `piece`, this lane's of the first.
template <class Shape, bool NEAR>
__device__ __forceinline__ void fetch_weights(const GptqMatmulParams& p, const Span<Shape>& s, uint8_t* ring, Barriers<Shape>& b,
                                               const Near& near = {}, uint32_t side = 0, uint32_t piece = 0) {
    const uint32_t lane = threadIdx.x % 32, stages = s.stages();
    const bool sliced = p.y.partials;
    const uint32_t early = sliced ? EARLY_SLICED : EARLY;
    const uint32_t tile = s.group * GROUP_TILES + lane, tiles = min(s.warps(), p.w.n / UNIT_ROWS - s.group * GROUP_TILES);
    const uint8_t* row_tile = p.w.units + (size_t)tile * (p.w.k / UNIT_INPUTS) * Shape::Units::BYTES;
    // Shared addresses, once: each conversion would ask which block of its cluster this is.
    const uint32_t to = smem_address(ring) + lane * Shape::W_TILE, full = smem_address(b.w_full), empty = smem_address(b.w_empty);
    Place<Shape::W_STAGES> place, arrived;
    int waiting = NEAR;  // stages under way
    if (NEAR) place.advance();
    const int at_once = sliced && Shape::TOKENS <= EARLY_TOGETHER_TOKENS ? 2 : 1;  // before the inputs are there
    for (uint32_t j = NEAR; j < stages; j++) {
        if (j >= Shape::W_STAGES) barrier_wait(empty + place.slot * 8, place.parity ^ 1);
        if (j == early) barrier_wait(&b.inputs, 0);
        if (waiting == (j < early ? at_once : Shape::IN_FLIGHT)) {
            barrier_wait(full + arrived.slot * 8, arrived.parity);
            arrived.advance();
            waiting--;
        }
        waiting++;
        const uint32_t bytes = min((uint32_t)Shape::UNITS, s.count - j * Shape::UNITS) * Shape::Units::BYTES;
        if (lane == 0) barrier_expect(full + place.slot * 8, tiles * bytes);
        __syncwarp();
        const uint8_t* from = NEAR ? near.piece(side, piece + j * WARPS) : row_tile + (size_t)s.unit(j) * Shape::Units::BYTES;
        if (lane < tiles) bulk_copy(to + place.slot * Shape::W_STAGE, from, bytes, full + place.slot * 8);
        place.advance();
    }
}

// Behind the last copy's arrival: before, it would be in the way of this product's own.
template <class Shape, bool NEAR>
__device__ __forceinline__ void bring_next(const BatchParams& g, const Span<Shape>& s, Barriers<Shape>& b) {
    if (NEAR ? !g.next_near.base : !g.next.units) return;
    const uint32_t last = s.stages() - 1;
    barrier_wait(&b.w_full[last % Shape::W_STAGES], last / Shape::W_STAGES % 2);
    if (NEAR) g.next_near.bring(NEXT_STAGES);
    else g.next.bring<Shape::UNITS>(NEXT_STAGES);
}

template <class Shape>
__device__ __forceinline__ void fetch_activations(const BatchParams& g, const Span<Shape>& s, uint8_t* ring, Barriers<Shape>& b) {
    const uint32_t stages = s.stages();
    Place<Shape::X_STAGES> place;
    for (uint32_t j = 0; j < stages; j++) {
        if (j >= Shape::X_STAGES) barrier_wait(&b.x_empty[place.slot], place.parity ^ 1);
        if (j == s.late) ready_wait_attention(g.p.ready);
        const uint32_t to = smem_address(ring + place.slot * Shape::X_STAGE), unit = s.unit(j);
        if (Shape::PLANES) {
            const uint32_t units = min((uint32_t)Shape::UNITS, g.p.w.k / UNIT_INPUTS - unit), full = smem_address(&b.x_full[place.slot]);
            const uint8_t* steps = reinterpret_cast<const uint8_t*>(plane_steps(g.p.x, g.p.x_stride));
            const uint32_t to_steps = smem_address(ring) + Shape::STEPS_AT + place.slot * Shape::UNITS * Shape::STEP_BYTES;
            barrier_expect(full, units * (Shape::X_UNIT + Shape::STEP_BYTES));
            bulk_copy_kept(to, reinterpret_cast<const uint8_t*>(g.p.x) + unit * Shape::X_UNIT, units * Shape::X_UNIT, full);
            bulk_copy_kept(to_steps, steps + unit * Shape::STEP_BYTES, units * Shape::STEP_BYTES, full);
        } else {
            barrier_expect(&b.x_full[place.slot], Shape::X_STAGE);
            copy_box(to, g.x, 0, 0, unit, &b.x_full[place.slot], L2_NORMAL);
        }
        place.advance();
    }
}

// acc = this warp's row tile times the tokens. While the tensor cores work on one unit, the next is unpacked into the other registers, and
// AHEAD more are on their way from shared memory. The activations' stages are unrolled, so that their addresses are constants, and those of
// weights where the rings turn TOGETHER.
template <class Shape, bool NEAR>
__device__ __forceinline__ void multiply(typename Shape::Sums& acc, const Span<Shape>& s, __half2 factor, uint8_t* smem,
                                          Barriers<Shape>& b) {
    const uint32_t lane = threadIdx.x % 32, stages = s.stages();
    const uint8_t* mine = smem + Shape::W_AT + threadIdx.x / 32 * Shape::W_TILE;
    // In 64 bits, which one uniform instruction adds to; of the low word alone three would.
    const uint64_t x = wgmma_descriptor(smem_address(smem));
    // By claims a stage is empty after WARPS arrivals, however many warps there are: the first group's arrive for those that are not there.
    const bool arrives = lane < (NEAR && threadIdx.x / 32 < GROUP_TILES ? MOST_GROUPS + 1 - s.groups : 1);
    uint32_t a[2][STEPS][4] = {}, parity = 0, leaving = 0;
    typename Shape::Units::Raw raw[AHEAD];
    Place<Shape::W_STAGES> place;
    const uint8_t* stage = mine;
    // Unit u of the stage that weights are loaded from, which unit 0 begins: number j, in slot `slot` of activations, or behind the last slot
    // in the first again. What is loaded behind the last stage is not used.
    const auto load = [&](int u, uint32_t j, int slot) {
        if (u == 0) {
            place.advance();
            const bool turned = slot == Shape::W_STAGES;
            if (Shape::TOGETHER) place.slot = turned ? 0 : slot, place.parity = parity ^ turned;
            stage = mine + place.slot * Shape::W_STAGE;
            if (j < stages) barrier_wait(&b.w_full[place.slot], place.parity);
        }
        raw[u % AHEAD].load(stage + u * Shape::Units::BYTES, lane);
    };
    barrier_wait(&b.w_full[0], 0);
    raw[0].load(stage, lane);
    raw[0].unpack(a[0], factor);
#pragma unroll
    for (int u = 1; u <= AHEAD; u++) load(u, 0, 0);
    for (uint32_t j0 = 0; j0 < stages; j0 += Shape::X_STAGES, parity ^= 1) {
#pragma unroll
        for (int slot = 0; slot < Shape::X_STAGES; slot++) {
            const uint32_t j = j0 + slot, units = s.count - j * Shape::UNITS;  // units that are left
            if (slot > 0 && j >= stages) break;
            barrier_wait(&b.x_full[slot], parity);
#pragma unroll
            for (int u = 0; u < Shape::UNITS; u++) {
                if (u > 0 && u >= units) break;
                uint32_t(&now)[STEPS][4] = a[u % 2], (&next)[STEPS][4] = a[(u + 1) % 2];
                const uint64_t x_unit = x + (slot * Shape::X_STAGE + u * Shape::X_UNIT) / 16;
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < STEPS; i++) wgmma(acc, now[i], x_unit + i * 2, 1);
                wgmma_commit();
                wgmma_wait<1>();
                // The compiler does not know that the registers were in use until here.
#pragma unroll
                for (int i = 0; i < STEPS; i++)
                    asm volatile("" : "+r"(next[i][0]), "+r"(next[i][1]), "+r"(next[i][2]), "+r"(next[i][3])::"memory");
                if (u == 0 && j > 0 && arrives) barrier_arrive(&b.x_empty[slot == 0 ? Shape::X_STAGES - 1 : slot - 1]);
                raw[(u + 1) % AHEAD].unpack(next, factor);
                if (u + 2 == Shape::UNITS) {
                    __syncwarp();
                    if (arrives) barrier_arrive(&b.w_empty[Shape::TOGETHER ? slot : leaving]);
                    if (++leaving == Shape::W_STAGES) leaving = 0;
                }
                load((u + 1 + AHEAD) % Shape::UNITS, j + 1, slot + 1);
            }
        }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++)
        asm volatile("" : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])::"memory");
}

template <class Shape>
__device__ __forceinline__ void scale_sums(typename Shape::Sums& acc, float2 by) {
#pragma unroll
    for (int n = 0; n < Shape::TOKENS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] *= e < 2 ? by.x : by.y;
}

template <class Shape>
__device__ __forceinline__ void make_barriers(Barriers<Shape>& b, uint32_t warps) {
    for (int i = 0; i < Shape::W_STAGES; i++) barrier_init(&b.w_full[i], 1), barrier_init(&b.w_empty[i], warps);
    for (int i = 0; i < Shape::X_STAGES; i++) barrier_init(&b.x_full[i], 1), barrier_init(&b.x_empty[i], warps);
    barrier_init(&b.inputs, 1);
    barrier_init_done();
}

// What the warp does that fetches weights, if they lie in near. It asks for the first with as little code as it takes, see Start.
template <class Shape>
__device__ __forceinline__ void claim_and_fetch(const BatchParams& g, uint8_t* ring, Barriers<Shape>& b) {
    const uint32_t lane = threadIdx.x % 32;
    const Claim claim(g.p.claims);
    if (one_lane()) make_barriers<Shape>(b, WARPS);
    __syncwarp();
    const Claimed claimed = claim.take([&](uint32_t side) { return g.near.shares(side); });
    const NearShare mine = g.near.share(claimed.side, claimed.number);
    if (lane == 0) barrier_expect(&b.w_full[0], mine.warps * Shape::W_TILE);
    __syncwarp();
    const uint8_t* from = g.near.piece(mine.side, mine.piece + lane);
    if (lane < mine.warps) bulk_copy(smem_address(ring) + lane * Shape::W_TILE, from, Shape::W_TILE, smem_address(&b.w_full[0]));
    if (lane == 0) b.dealt = make_uint2(mine.part, mine.slice);
    __syncwarp();
    asm volatile("bar.arrive 1, %0;" ::"n"(THREADS) : "memory");
    const Span<Shape> s(Dealt(mine.part, mine.slice), g.slices, g.deal);
    fetch_weights<Shape, true>(g.p, s, ring, b, g.near, mine.side, mine.piece + lane);
    bring_next<Shape, true>(g, s, b);
}

#endif
