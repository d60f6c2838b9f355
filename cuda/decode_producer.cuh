// decode_producer — streams a block's weights through the ring, from the first layer to the head, in the order of decode_plan.
//
// It waits for nothing but free stages, so the ring is full when the inputs a consumer waited for arrive. The first DEPTH strips are
// asked for before the predecessor in the stream has finished: weights are nobody's output.
//
// In flight   two stages a group, 78 KB an SM, from the near side of L2 (sides.cuh): memory is never without a request. One stage while the
//             last strips of [qkv ; up] are read, if attention is long, all but the first of them with 2 to 4 tokens, and wherever weights
//             lie on either side: everybody who waits for a word pays for what is asked for in front of it. The copies carry an
//             evict-first hint.
// Measured    (ms a step, H200, by turns; each line a card of its own)        1 at 128   1 at 1900   4 at 128   8 at 128   8 at 1024
//             weights on either side, one stage                              0.992       1.006       1.037      1.137      1.254
//             near, one stage                                                0.994       1.000                  1.103      1.182
//             near, two; the card before                                     0.930       1.067                  1.107      1.188
//             near, one in [qkv ; up] (0.915 with two), two behind it        0.949       0.957       0.972      1.099      1.137
//             two in the first 2 strips of it                                0.920       0.967       0.963      1.092      1.126
//             two in the first 4                                             0.920       0.955       0.984      1.097      1.132
//             two in the first 8                                             0.919       0.943       0.977      1.095      1.131
//             before what follows                                            0.934       0.964       0.979      1.112
//             and blocks with fewer strips give way                          0.925       0.944       0.976      1.124
//             that, one more card                                            0.913       0.933       0.965      1.094
//             8 tokens' inputs as f16, two in the first 2, 8, 16 strips, in all: 1.057, 1.047, 1.030, 1.027; at 1024 1.090, 1.092,
//             1.084, 1.085.
//             1 token, two in the first 8 and in all: 0.931 and 0.923 at 1100, 0.932 and 0.944 at 1300, 0.931 and 0.986 at 1900.
// Tried       8 tokens: three in flight 1.099 for 1.038; giving way for 0, 2, 8 strips: the same.
//             On either side by pieces: 1.060, 1.203 (1, 8 at 128), two stages 1.006, 1.220. Near, three stages: 0.973, 1.117 at 1900,
//             1.168 with 8. Of two stages the second only in part: 1.011 to 1.018, where lanes wait for different ones. A stage no sooner
//             than 1700 cycles behind the one before: 1.004, 1900: 1.083. One in flight for the first strips of [down | dense] instead:
//             1.017 at 1900 where 0.985. Without the hint 0.963, 1.191. Three in flight in the head: the same. Giving way for 2, 3, 5, 6
//             strips 0.934, 0.929, 0.931, 0.946 where it is 0.925; for 4 or 8 of [down | dense] 0.954, 0.989; also in attention's slice
//             0.930 (0.913); all blocks for the first strip or two 0.929, 0.933 (0.913). Shares of 21 and 22 strips instead of 20 to 22:
//             the same.
#pragma once
#include "decode_plan.cuh"
#include "launch.cuh"
#include "packed.cuh"

namespace {

// PIECES lanes keep the ring of a group full: a lane asks for what of a stage lies in one piece of 4 KB. One lane that filled the rings of
// all groups, one after the other, took 400 cycles a stage and could not catch up after a wait.
constexpr uint32_t PIECES = 8;
// Strips of [qkv ; up] asked for with two stages under way, if attention is long, or there are several tokens whose inputs are bytes.
constexpr uint32_t EARLY_LONG = 8, EARLY_SEVERAL = 2;
// The position from which on one token's attention is long enough for that.
constexpr uint32_t LATE_ATTENTION = 1200;
// First strips of a layer asked for with one stage under way by a block that has fewer strips than the average: those that have more, for
// which all wait, get more of the memory meanwhile.
constexpr uint32_t GIVE_WAY = 4;

template <bool ZEROS, bool PACKED>
struct Producer {
    using S = Shared<ZEROS>;
    static_assert(S::STAGE_BYTES <= (PIECES - 1) * PIECE_BYTES && CONSUMERS / GROUP_WARPS * PIECES <= 32);
    const Args& p;
    S& shared;
    uint32_t turns = S::DEPTH;      // stages of the ring; fewer in the head, see Consumer::head
    uint32_t turn = 0, phase = 0;   // stage to fill next, and the parity of its next use
    uint32_t issued = 0;
    uint32_t older = 0, older_phase = 0, newer = 0, newer_phase = 0;  // barriers of the last two stages asked for, if there are any
    uint32_t give_way = 0;          // strips of [qkv ; up] before those, of a block that has fewer strips than others
    bool two = false;               // stages may be under way, else one
    uint32_t early = ~0u;           // strips of [qkv ; up] for which that is so

    static __device__ __forceinline__ uint32_t group() { return threadIdx.x % 32 / PIECES; }
    static __device__ __forceinline__ uint32_t lane() { return threadIdx.x % PIECES; }

    // What this lane asks for of a run of bytes: `count` of them, which may be 0, `begin` after the run's first.
    struct Part {
        const uint8_t* from;
        uint32_t begin, count;
    };
    // Of `bytes` from byte `at` of a row tile on. If the next piece of its stream lies behind this lane's, the lane takes both.
    __device__ __forceinline__ Part part(const uint8_t* matrix, uint32_t tile, uint32_t tile_bytes, uint32_t at, uint32_t bytes) const {
        if (!p.sides) return {matrix + (size_t)tile * tile_bytes + at, 0, lane() ? 0 : bytes};
        const uint32_t offset = place_of(tile) * tile_bytes + at, in = offset % PIECE_BYTES, piece = offset / PIECE_BYTES + lane();
        const auto second = [&](uint32_t piece) { return second_of_pair(p.sides, stream_of(tile), piece) != 0; };
        const bool own = second(piece), both = own && !second(piece + 1), taken = lane() && !own && second(piece - 1);
        const uint32_t begin = lane() ? lane() * PIECE_BYTES - in : 0, end = min((lane() + 1 + both) * PIECE_BYTES - in, bytes);
        return {matrix + (piece * 2 + own) * (size_t)PIECE_BYTES + (lane() ? 0 : in), begin, begin < end && !taken ? end - begin : 0};
    }

    // Asks for one stage; false when there turns out to be nothing to do. Those before are waited for last, with all else done: from there
    // to the next copy the memory may have nothing to do for this group.
    __device__ __forceinline__ bool push(const uint8_t* matrix, uint32_t tile, uint32_t tile_bytes, uint32_t at, uint32_t bytes) {
        if (issued++ == S::DEPTH) {
            wait_previous();
            const uint32_t tokens = load_relaxed(&p.step->tokens);
            if (tokens == 0) return false;
            if (tokens > 1 && tokens <= COLUMN_TOKENS) early = EARLY_SEVERAL;
            else if (tokens == 1 && p.step->token[0].position >= LATE_ATTENTION) early = EARLY_LONG;
        }
        Part part = this->part(matrix, tile, tile_bytes, at, bytes);
        const uint32_t stage = stage_of(p, turn, group());
        uint32_t to = smem_address(shared.ring[stage]) + part.begin, full = smem_address(&shared.full[stage]);
        barrier_wait(&shared.empty[stage], phase ^ 1);
        if (lane() == 0) barrier_expect(full, bytes);
        asm volatile("" : "+r"(to), "+r"(full), "+l"(part.from), "+r"(part.count));  // computed here, not behind the wait
        wait_flight(two);
        if (part.count) bulk_copy(to, part.from, part.count, full);
        older = newer, older_phase = newer_phase;
        newer = full, newer_phase = phase;
        if (++turn == turns) turn = 0, phase ^= 1;
        return true;
    }
    // Waits until there is at most one stage under way, or none.
    __device__ __forceinline__ void wait_flight(bool one) {
        const uint32_t barrier = one ? older : newer, parity = one ? older_phase : newer_phase;
        if (barrier) barrier_wait(barrier, parity);
    }
    __device__ __forceinline__ bool layer(const DecodeLayer& l) {
        const uint32_t first = group() * GROUP_UNITS, bytes = min(GROUP_UNITS, p.units - first) * S::BYTES, block = shared.block;
        const uint32_t slice_bytes = p.units * S::BYTES, at = first * S::BYTES;
        bool going = true;
        for (uint32_t t = block, n = 0; t < p.qkv_tiles && going; t += gridDim.x, n++) {
            two = p.sides && n >= give_way && n < early;
            going = push(l.qkv_up, t, slice_bytes, at, bytes);
        }
        two = p.sides != 0;
        for_each_down_dense(shared.runs, block, [&](uint32_t tile, uint32_t slice) {
            if (going) going = push(l.down_dense, tile, p.slices * slice_bytes, slice * slice_bytes + at, bytes);
        });
        return going;
    }
    // The head: a stage for each warp of the group.
    __device__ __forceinline__ void head() {
        const uint32_t first_warp = group() * GROUP_WARPS, warps = readers(p, group());
        constexpr uint32_t UNIT_BYTES = table_unit_bytes(PACKED);
        turns = S::DEPTH / warps * warps;
        uint32_t phases = turn_phases(turn, phase), behind = 0, in_flight = 0;  // the oldest stage asked for, and how many there are
        turn = 0;
        const auto wait_oldest = [&] {
            barrier_wait(&shared.full[stage_of(p, behind, group())], phases >> behind & 1 ^ 1);
            if (++behind == turns) behind = 0;
            in_flight--;
        };
        for (uint32_t t = shared.block; t < p.head_tiles; t += gridDim.x)
            for (uint32_t w = first_warp; w < first_warp + warps; w++) {
                const uint32_t unit = w * WARP_UNITS, bytes = min(WARP_UNITS, p.units - unit) * UNIT_BYTES;
                const Part part = this->part(p.head, t, p.units * UNIT_BYTES, unit * UNIT_BYTES, bytes);
                if (in_flight == HEAD_IN_FLIGHT) wait_oldest();
                const uint32_t stage = stage_of(p, turn, group()), full = smem_address(&shared.full[stage]);
                barrier_wait(&shared.empty[stage], phases >> turn & 1 ^ 1);
                if (lane() == 0) barrier_expect(full, bytes);
                if (part.count) bulk_copy(smem_address(shared.ring[stage]) + part.begin, part.from, part.count, full);
                in_flight++;
                phases ^= 1u << turn;
                if (++turn == turns) turn = 0;
            }
        while (in_flight) wait_oldest();  // a block must not end while copies to its memory are under way
    }
    __device__ void run() {
        bool going = true;
        uint32_t own = 0;
        for (const uint32_t* run = shared.runs; *run; run++) own += run_count(*run);
        if (own * gridDim.x < p.qkv_tiles + p.slices * p.wide_tiles) give_way = GIVE_WAY;
        for (uint32_t i = 0; i < p.layers && going; i++) going = layer(p.layer[i]);
        wait_flight(true), wait_flight(false);
        if (issued <= S::DEPTH) {  // a model so small that no push has asked
            wait_previous();
            going = load_relaxed(&p.step->tokens) != 0;
        }
        if (going) head();
        wait_previous();
    }
};

}  // namespace
