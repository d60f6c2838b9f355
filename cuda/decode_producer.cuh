// decode_producer — streams a block's weights through the ring, from the first layer to the head, in the order of decode_plan.
//
// It waits for nothing but free stages, so the ring is full when the inputs a consumer waited for arrive. The first DEPTH strips are
// asked for before the predecessor in the stream has finished: weights are nobody's output.
//
// In flight   one copy a group, three an SM: a second lets requests of a strip queue behind those of the next, which everybody who waits
//             for a word pays for. So nothing is done between a copy's arrival and the next copy that could be done before. In the head,
//             where nobody waits for anything else, two. The copies carry an evict-first hint: without it 0.12 ms more.
#pragma once
#include "decode_plan.cuh"
#include "launch.cuh"
#include "packed.cuh"

namespace {

// Lane g keeps the ring of group g full: a lane that filled all, one after the other, took 400 cycles a stage and could not catch up
// after a wait.
template <bool ZEROS, bool PACKED>
struct Producer {
    using S = Shared<ZEROS>;
    const Args& p;
    S& shared;
    uint32_t turns = S::DEPTH;      // stages of the ring; fewer in the head, see Consumer::head
    uint32_t turn = 0, phase = 0;   // stage to fill next, and the parity of its next use
    uint32_t under_way = 0, under_way_phase = 0;  // the barrier of the copy under way, if there is one, and its parity
    uint32_t issued = 0;

    static __device__ __forceinline__ uint32_t group() { return threadIdx.x % 32; }

    // Asks for one stage; false when there turns out to be nothing to do. The copy before is waited for last, with all else done: from
    // there to the next copy the memory has nothing to do for this group.
    __device__ __forceinline__ bool push(const uint8_t* from, uint32_t bytes) {
        if (issued++ == S::DEPTH) {
            wait_previous();
            if (load_relaxed(&p.step->tokens) == 0) return false;
        }
        const uint32_t stage = stage_of(p, turn, group());
        uint32_t to = smem_address(shared.ring[stage]), full = smem_address(&shared.full[stage]);
        barrier_wait(&shared.empty[stage], phase ^ 1);
        barrier_expect(&shared.full[stage], bytes);
        asm volatile("" : "+r"(to), "+r"(full), "+l"(from));  // computed here, not behind the wait
        if (under_way) barrier_wait(under_way, under_way_phase);
        bulk_copy(to, from, bytes, full);
        under_way = full, under_way_phase = phase;
        if (++turn == turns) turn = 0, phase ^= 1;
        return true;
    }
    __device__ __forceinline__ bool layer(const DecodeLayer& l) {
        const uint32_t first = group() * GROUP_UNITS, bytes = min(GROUP_UNITS, p.units - first) * S::BYTES;
        bool going = true;
        for (uint32_t t = blockIdx.x; t < p.qkv_tiles && going; t += gridDim.x)
            going = push(l.qkv_up + (size_t)(t * p.units + first) * S::BYTES, bytes);
        for_each_down_dense(
            shared.runs,
            [&](uint32_t tile, uint32_t slice) {
                if (going) going = push(l.down_dense + (size_t)((tile * p.slices + slice) * p.units + first) * S::BYTES, bytes);
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
        for (uint32_t t = blockIdx.x; t < p.head_tiles; t += gridDim.x)
            for (uint32_t w = first_warp; w < first_warp + warps; w++) {
                const uint32_t unit = w * WARP_UNITS, bytes = min(WARP_UNITS, p.units - unit) * UNIT_BYTES;
                if (in_flight == HEAD_IN_FLIGHT) wait_oldest();
                const uint32_t stage = stage_of(p, turn, group());
                barrier_wait(&shared.empty[stage], phases >> turn & 1 ^ 1);
                barrier_expect(&shared.full[stage], bytes);
                bulk_copy(smem_address(shared.ring[stage]), p.head + ((size_t)t * p.units + unit) * UNIT_BYTES, bytes,
                          smem_address(&shared.full[stage]));
                in_flight++;
                phases ^= 1u << turn;
                if (++turn == turns) turn = 0;
            }
        while (in_flight) wait_oldest();  // a block must not end while copies to its memory are under way
    }
    __device__ void run() {
        bool going = true;
        for (uint32_t i = 0; i < p.layers && going; i++) going = layer(p.layer[i]);
        if (under_way) barrier_wait(under_way, under_way_phase);
        if (issued <= S::DEPTH) {  // a model so small that no push has asked
            wait_previous();
            going = load_relaxed(&p.step->tokens) != 0;
        }
        if (going) head();
        wait_previous();
    }
};

}  // namespace
