// head_wgmma — head on sm_90a, 9 to 64 tokens: logits[m, v] = sum_k x[m, k] * E[v, k].   Reference: reference.rs::head
// Shapes   as head.
// Reads    the table once, by bulk copies; x once a block and pass, by boxes of a tensor map.   Writes f32 logits.
// Mapping  one block an SM, its even share of the row tiles, all at once if there are no more than 32 (16, beyond 32 tokens): eight warps
//          have four (two) row tiles each, and walk along the inputs with all of them, so that a unit's activations serve all. One warp
//          fetches the table, one activations. Four row tiles, one a warp of a warpgroup, are a group, whose slots are filled and emptied
//          together.
//
//          ring   |slot 0: group 0, its row tile 0: SLOT_UNITS units|row tile 1|..|group 1|..|slot 1|..      192 KB, 144 beyond 32 tokens
//
// Near     where there is a copy by the sides of L2 (head_near.cuh), blocks read that; which share one has it learns from an atomic.
// Numbers  a row is one chain of the tensor core, whose f32 adds truncate: relative error 5.4e-6 over 4544 inputs, as gptq_batch's. Packed
//          units give the same bits as f16 ones.
// Overlap  beside a block there is room for blocks of the norm: the table is asked for before that has begun.
// Floor    590.9 MB: 126 us at 4.70 TB/s; packed 443.2 MB: 94 us.
// Measured packed, cold, two events included, which are 2 us, H200: 106, 107, 110 us at 16, 32, 64 tokens, 94, 95, 93 % of the ceiling there;
//          before this kernel (three passes of one row tile a warp, by cp.async) 111, 114, 140 to 144. Steps by turns, ms, 16, 32, 64 texts:
//          1.132, 1.299, 1.797 for 1.135, 1.301, 1.836 (fastest tenths); medians of 120 1.508, 2.092 for 1.528, 2.129 (32, 64).
// Tried    plain units in two slots of two: 111, 114, 139. Those of decode_step's copy, of which a slot is two copies more often than not:
//          121, 127, 161, as the copy engine takes some 60 ns for each. The copy, and sums of each unit added in f32 (relative error 1.6e-7):
//          107, 114, 151, as ptxas then waits for each product (C7515). One slot, or none, before the inputs are there: the same.
// Serial   f16 units beyond 32 tokens: ptxas waits for each product's operands (C7513).
#include "bulk.cuh"
#include "chain.cuh"
#include "head_near.cuh"
#include "head_output.cuh"
#include "launch.cuh"
#include "tma.cuh"

namespace {

constexpr int WARPS = 8;  // that multiply: two warpgroups
constexpr int THREADS = (WARPS + 2) * 32;

template <bool PACKED, int TOKENS_>
struct HeadShape {
    using Weights = TableUnits<PACKED>;
    static constexpr int TOKENS = TOKENS_;
    static constexpr int WARP_TILES = TOKENS <= 32 ? 4 : 2;
    static constexpr int TILES = WARPS * WARP_TILES;  // of a pass
    static constexpr int GROUPS = TILES / HEAD_GROUP;
    static constexpr int SLOT_UNITS = head_slot_units(PACKED);
    static constexpr int SLOT_BYTES = head_slot_bytes(PACKED);  // of a row tile
    static constexpr int SLOTS = (TOKENS <= 32 ? 192 : 144) * 1024 / (TILES * SLOT_BYTES);
    static constexpr int RING_BYTES = SLOTS * TILES * SLOT_BYTES;
    // A unit's activations each. The copy engine takes requests in order: they come behind the table's that were asked for before.
    static constexpr int X_STAGES = SLOTS * SLOT_UNITS + 2;
    static constexpr int X_BYTES = TOKENS * TOKEN_BYTES;
    static constexpr int RING_AT = X_STAGES * X_BYTES;
    static constexpr int BARRIERS_AT = RING_AT + RING_BYTES;
    static_assert(BARRIERS_AT <= 216 * 1024, "room for blocks of the norm beside it");
    static_assert(HEAD_CHUNK % TILES == 0, "a pass has groups of one chunk");
    static_assert(SLOTS >= 2 && WARP_TILES % 2 == 0, "one slot to work on, one that is being filled; two sets of registers by turns");
};

struct HeadWgmmaParams {
    CUtensorMap x;  // [k units][tokens][64] f16
    HeadParams p;
    HeadNear near;
};

#if PEREGRINE_WGMMA

template <class Shape>
struct Barriers {
    uint64_t full[Shape::SLOTS][Shape::GROUPS], empty[Shape::SLOTS][Shape::GROUPS];
    uint64_t x_full[Shape::X_STAGES], x_empty[Shape::X_STAGES];
    Claimed claimed;
};

// A block's row tiles: `tiles` from tile0 on, every `step`th.
struct Span {
    uint32_t tile0, tiles, step, units;

    // Of all row tiles.
    __device__ __forceinline__ Span(const HeadParams& p) : step(1), units(p.hidden / UNIT_INPUTS) {
        const uint32_t all = p.vocab / UNIT_ROWS;
        tile0 = blockIdx.x * all / gridDim.x, tiles = (blockIdx.x + 1) * all / gridDim.x - tile0;
    }
    // Of a share of a side's.
    __device__ __forceinline__ Span(const HeadWgmmaParams& g, Claimed share) : step(2), units(g.p.hidden / UNIT_INPUTS) {
        const uint32_t first = g.near.first(share.side, share.number);
        tile0 = uniform(first * 2 + share.side), tiles = uniform(g.near.first(share.side, share.number + 1) - first);
    }
    __device__ __forceinline__ uint32_t tile(uint32_t t) const { return tile0 + t * step; }
};

// A lane copies a group's piece, or a row tile's units.
template <class Shape, bool NEAR>
__device__ __forceinline__ void fetch_table(const HeadWgmmaParams& g, const Span& s, Claimed share, uint8_t* ring, Barriers<Shape>& b) {
    constexpr uint32_t EACH = NEAR ? head_pieces(Shape::Weights::PACKED) : HEAD_GROUP;  // copies of a group's slot
    constexpr uint32_t COPY = NEAR ? PIECE_BYTES : Shape::SLOT_BYTES;
    const uint32_t lane = threadIdx.x % 32, group = lane / EACH, part = lane % EACH, tile_bytes = s.units * Shape::Weights::BYTES;
    const uint32_t to = smem_address(ring) + (group * EACH + part) * COPY;
    const uint32_t full = smem_address(&b.full[0][group]), empty = smem_address(&b.empty[0][group]);
    Place<Shape::SLOTS> place;
    bool again = false;  // the slot was in use before
    for (uint32_t t0 = 0; t0 < s.tiles; t0 += Shape::TILES) {
        // Row tiles of the group that are there, in pieces: what lies behind them is not copied.
        const int left = s.tiles - t0 - group * HEAD_GROUP, present = group < Shape::GROUPS ? max(min(left, (int)HEAD_GROUP), 0) : 0;
        const int most = NEAR ? present * Shape::SLOT_BYTES - (int)(part * COPY) : (int)part < present ? Shape::SLOT_BYTES : 0;
        const uint8_t* row_tile = reinterpret_cast<const uint8_t*>(g.p.units) + (size_t)s.tile(t0 + lane) * tile_bytes;
        for (uint32_t j = 0, at = 0; at < tile_bytes; j++, at += Shape::SLOT_BYTES) {
            const uint32_t slot = place.slot * Shape::GROUPS * 8;
            const uint32_t tile_rest = NEAR ? Shape::SLOT_BYTES : min((uint32_t)Shape::SLOT_BYTES, tile_bytes - at);
            if (present && again) barrier_wait(empty + slot, place.parity ^ 1);
            if (present && part == 0) barrier_expect(full + slot, present * tile_rest);
            __syncwarp();
            if (most > 0) {
                const uint8_t* from = row_tile + at;
                if (NEAR) from = g.near.at(share.side, share.number, t0 / HEAD_CHUNK, j, t0 % HEAD_CHUNK / HEAD_GROUP + group, part);
                bulk_copy(to + place.slot * Shape::TILES * Shape::SLOT_BYTES, from, NEAR ? min(most, (int)COPY) : tile_rest, full + slot);
            }
            place.advance();
            again |= place.slot == 0;
        }
    }
}

template <class Shape>
__device__ __forceinline__ void fetch_activations(const HeadWgmmaParams& g, const Span& s, uint8_t* x, Barriers<Shape>& b) {
    Place<Shape::X_STAGES> place;
    const uint32_t count = (s.tiles + Shape::TILES - 1) / Shape::TILES * s.units;
    for (uint32_t i = 0, unit = 0; i < count; i++) {
        if (i >= Shape::X_STAGES) barrier_wait(&b.x_empty[place.slot], place.parity ^ 1);
        barrier_expect(&b.x_full[place.slot], Shape::X_BYTES);
        copy_box(smem_address(x) + place.slot * Shape::X_BYTES, g.x, 0, 0, unit, &b.x_full[place.slot], L2_NORMAL);
        place.advance();
        if (++unit == s.units) unit = 0;
    }
}

// A warp's row tiles of a pass: `present` of them are in groups that are there. Of the others, as of row tiles of a group that are not
// there, it multiplies whatever lies in the ring.
//
// While the tensor cores work on one row tile's unit, the warp's next is unpacked, and the one after that is on its way from shared memory.
// Steps of a slot: its units, and of each the warp's row tiles.
template <class Shape>
struct Multiply {
    using Weights = typename Shape::Weights;
    static constexpr int WT = Shape::WARP_TILES, STEPS_A_SLOT = Shape::SLOT_UNITS * WT;
    const uint8_t* ring;  // this warp's first row tile in slot 0
    uint32_t x, lane, warp, units;
    Barriers<Shape>& b;
    Place<Shape::SLOTS> place, next;
    Place<Shape::X_STAGES> entered;
    uint32_t a[2][STEPS][4] = {};
    typename Weights::Raw raw;

    __device__ __forceinline__ Multiply(const Span& s, uint8_t* smem, Barriers<Shape>& b)
        : lane(threadIdx.x % 32), warp(__shfl_sync(~0u, threadIdx.x / 32, 0)), units(s.units), b(b) {
        ring = smem + Shape::RING_AT + warp * Shape::SLOT_BYTES, x = smem_address(smem);
        next.advance();
    }
    __device__ __forceinline__ uint32_t group(int r) const { return (r * WARPS + warp) / HEAD_GROUP; }

    // Step `q` of the slot whose first unit is u0, or of the one behind it.
    __device__ __forceinline__ void load(int q, uint32_t u0, uint32_t present) {
        const int r = q % WT, i = q % STEPS_A_SLOT / WT;
        const Place<Shape::SLOTS>& in = q < STEPS_A_SLOT ? place : next;
        const bool there = q < STEPS_A_SLOT || u0 + Shape::SLOT_UNITS < units;
        if (i == 0 && there && r < present) barrier_wait(&b.full[in.slot][group(r)], in.parity);
        raw.load(ring + (in.slot * Shape::TILES + r * WARPS) * Shape::SLOT_BYTES + i * Weights::BYTES, lane);
    }
    // What was loaded last, for that step.
    __device__ __forceinline__ void unpack(int q, uint32_t u0, uint32_t present) {
        const int r = q % WT, i = q % STEPS_A_SLOT / WT;
        const Place<Shape::SLOTS>& in = q < STEPS_A_SLOT ? place : next;
        const uint32_t unit = u0 + (q < STEPS_A_SLOT ? 0 : Shape::SLOT_UNITS) + i;
        raw.unpack(a[q % 2]);
        __syncwarp();
        const bool last = i + 1 == Shape::SLOT_UNITS ? unit < units : unit + 1 == units;
        if (last && r < present && lane == 0) barrier_arrive(&b.empty[in.slot][group(r)]);
    }
    __device__ __forceinline__ void leave_unit() {
        if (lane == 0) barrier_arrive(&b.x_empty[entered.slot == 0 ? Shape::X_STAGES - 1 : entered.slot - 1]);
    }
    __device__ __forceinline__ void pass(float (&acc)[WT][Shape::TOKENS / 8][4], uint32_t present) {
        load(0, 0, present), unpack(0, 0, present), load(1, 0, present);
        for (uint32_t u0 = 0; u0 < units; u0 += Shape::SLOT_UNITS) {
#pragma unroll
            for (int q = 0; q < STEPS_A_SLOT; q++) {
                const int r = q % WT, i = q / WT;
                if (r == 0 && i > 0 && u0 + i >= units) break;
                if (r == 0) barrier_wait(&b.x_full[entered.slot], entered.parity);
                const uint64_t x_unit = wgmma_descriptor(x + entered.slot * Shape::X_BYTES);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < STEPS; k++) wgmma(acc[r], a[q % 2][k], x_unit + k * 2, 1);
                wgmma_commit();
                wgmma_wait<1>();
                // The compiler does not know that the registers were in use until here.
                uint32_t(&free)[STEPS][4] = a[(q + 1) % 2];
#pragma unroll
                for (int k = 0; k < STEPS; k++)
                    asm volatile("" : "+r"(free[k][0]), "+r"(free[k][1]), "+r"(free[k][2]), "+r"(free[k][3])::"memory");
                if (r == 0 && u0 + i > 0) leave_unit();
                unpack(q + 1, u0, present);
                load(q + 2, u0, present);
                if (r == WT - 1) entered.advance();
            }
            place.advance(), next.advance();
        }
        wgmma_wait<0>();
#pragma unroll
        for (int r = 0; r < WT; r++)
#pragma unroll
            for (int n = 0; n < Shape::TOKENS / 8; n++)
                asm volatile("" : "+f"(acc[r][n][0]), "+f"(acc[r][n][1]), "+f"(acc[r][n][2]), "+f"(acc[r][n][3])::"memory");
        leave_unit();
    }
};

template <class Shape>
__device__ __forceinline__ void multiply(const HeadParams& p, const Span& s, uint8_t* smem, Barriers<Shape>& b) {
    Multiply<Shape> m(s, smem, b);
    for (uint32_t t0 = 0; t0 < s.tiles; t0 += Shape::TILES) {
        float acc[Shape::WARP_TILES][Shape::TOKENS / 8][4] = {};
        const int left = s.tiles - t0 - m.warp / HEAD_GROUP * HEAD_GROUP;
        m.pass(acc, uniform(max(left + WARPS - 1, 0) / WARPS));
#pragma unroll
        for (int r = 0; r < Shape::WARP_TILES; r++)
            if (const uint32_t t = t0 + r * WARPS + m.warp; t < s.tiles)
                store_logits<Shape::TOKENS>(p, p.logits + (size_t)s.tile(t) * UNIT_ROWS, acc[r], table_scale(Shape::Weights::PACKED));
    }
}

#endif

template <class Shape, bool NEAR>
__global__ void __launch_bounds__(THREADS, 1) head_wgmma_kernel(const __grid_constant__ HeadWgmmaParams g) {
#if PEREGRINE_WGMMA
    extern __shared__ __align__(1024) uint8_t smem[];
    Barriers<Shape>& b = *reinterpret_cast<Barriers<Shape>*>(smem + Shape::BARRIERS_AT);
    const uint32_t warp = threadIdx.x / 32;
    if (NEAR && warp == WARPS) b.claimed = Claim(g.p.claims).take([&](uint32_t side) { return g.near.shares(side); });
    for (uint32_t i = threadIdx.x; i < Shape::SLOTS * Shape::GROUPS; i += THREADS)
        barrier_init(&b.full[0][i], 1), barrier_init(&b.empty[0][i], HEAD_GROUP);
    if (threadIdx.x < Shape::X_STAGES) barrier_init(&b.x_full[threadIdx.x], 1), barrier_init(&b.x_empty[threadIdx.x], WARPS);
    barrier_init_done();
    __syncthreads();
    const Claimed share = {uniform(b.claimed.side), uniform(b.claimed.number)};  // without NEAR not used, nor read
    const Span s = NEAR ? Span(g, share) : Span(g.p);
    if (warp == WARPS) {
        fetch_table<Shape, NEAR>(g, s, share, smem + Shape::RING_AT, b);
    } else if (warp > WARPS) {
        if (one_lane()) {
            prefetch_map(g.x);
            wait_previous();
            overlap_next();  // not before: the next head has this one's words after the one in front of it has ended
            fetch_activations<Shape>(g, s, smem, b);
            if (NEAR) claims_leave(g.p.claims);
        }
    } else {
        multiply<Shape>(g.p, s, smem, b);  // what was written before comes through the activations' ring alone
    }
#endif
}

template <class Shape>
int32_t run(const HeadParams* p, const Launch* l, uint32_t multiprocessors) {
    const cuuint64_t token_bytes = (cuuint64_t)p->hidden * 2;
    const TensorShape<3> x = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {UNIT_INPUTS, p->tokens, p->hidden / UNIT_INPUTS},
                              {token_bytes, TOKEN_BYTES}, {UNIT_INPUTS, Shape::TOKENS, 1}, CU_TENSOR_MAP_SWIZZLE_128B};
    if (p->near && !p->claims.words) return PEREGRINE_BAD_SHAPE;
    HeadWgmmaParams g = {{}, *p, HeadNear(p->near, p->sides, p->vocab, p->hidden, p->packed, multiprocessors)};
    const cudaError_t e = make_tensor_map(&g.x, p->x, x);
    if (e != cudaSuccess) return (int32_t)e;
    constexpr size_t BYTES = Shape::BARRIERS_AT + (2 * Shape::SLOTS * Shape::GROUPS + 2 * Shape::X_STAGES + 1) * sizeof(uint64_t);
    return launch(p->near ? head_wgmma_kernel<Shape, true> : head_wgmma_kernel<Shape, false>, dim3(g.near.blocks), THREADS, BYTES, l, g);
}

template <bool PACKED>
int32_t run_tokens(const HeadParams* p, const Launch* l, uint32_t multiprocessors) {
    if (p->tokens <= 16) return run<HeadShape<PACKED, 16>>(p, l, multiprocessors);
    if (p->tokens <= 32) return run<HeadShape<PACKED, 32>>(p, l, multiprocessors);
    if (p->tokens <= 48) return run<HeadShape<PACKED, 48>>(p, l, multiprocessors);
    static_assert(PEREGRINE_HEAD_TOKENS == 64, "the widest");
    return run<HeadShape<PACKED, 64>>(p, l, multiprocessors);
}

}  // namespace

uint32_t head_wgmma_multiprocessors() { return hopper_multiprocessors<head_wgmma_kernel<HeadShape<true, 16>, false>>(); }

int32_t head_wgmma(const HeadParams* p, const Launch* l, uint32_t multiprocessors) {
    return p->packed ? run_tokens<true>(p, l, multiprocessors) : run_tokens<false>(p, l, multiprocessors);
}
