// decode_step — one token of up to 8 sequences (or up to 8 tokens of one), from id to logits, in one launch.
#include "attn_decode.cuh"
#include "bulk.cuh"
#include "launch.cuh"
#include "strip.cuh"
#include "table.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace {

constexpr uint32_t CONSUMERS = 12, PRODUCER = 12, STORER = 13, ATTENTION = 14, WARPS = 16;
constexpr uint32_t THREADS = WARPS * 32;
constexpr uint32_t GROUP_WARPS = 4;   // consumer warps that share a stage
constexpr uint32_t WARP_UNITS = 6;    // most units of a strip a warp owns
constexpr uint32_t GROUP_UNITS = GROUP_WARPS * WARP_UNITS;
constexpr uint32_t TOKENS = PEREGRINE_GEMV_TOKENS;
#ifndef IN_FLIGHT
#define IN_FLIGHT 1
#endif
constexpr uint32_t SUM_SLOTS = 3;     // strips whose sums wait for the storer
constexpr uint32_t SUM_STRIDE = UNIT_ROWS + 4;  // floats from token to token: no bank conflicts
// Buffers that layers use in turn: one is written and read, one is cleared, and one is clear for sure.
constexpr uint32_t TURNS = PEREGRINE_STEP_TURNS;
constexpr uint32_t NOT_READY = 0xffffffffu;  // two f16 NaN that no conversion gives
constexpr float X_ONE = 16777216.f;   // residual: steps of 2^-24 above an 8 bit count of contributions
constexpr float X_LIMIT = 1073741824.f;

template <bool ZEROS>
struct Shared {
    static constexpr int BYTES = unit_bytes<1, ZEROS>();
    static constexpr uint32_t STAGE_BYTES = GROUP_UNITS * BYTES;
    static constexpr uint32_t DEPTH = ZEROS ? 4 : 5;  // strips in the ring
    static constexpr uint32_t STAGES = DEPTH * CONSUMERS / GROUP_WARPS;
    uint8_t ring[STAGES][STAGE_BYTES];
    float sums[SUM_SLOTS][CONSUMERS][TOKENS * SUM_STRIDE];
    uint32_t inputs[CONSUMERS][WARP_UNITS * 32];
    float2 moments[2][CONSUMERS];
    StepToken token[TOKENS];
    uint64_t full[STAGES], empty[STAGES];
    uint64_t sums_full[SUM_SLOTS], sums_empty[SUM_SLOTS];
};

// ---------------------------------------------------------------- words other blocks write

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_relaxed(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ ulonglong2 load_relaxed(const ulonglong2* p) {
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void store_relaxed(uint16_t* p, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint16_t* p, uint32_t v, uint32_t w) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v), "r"(w) : "memory");
}
__device__ __forceinline__ void add_relaxed(uint64_t* p, uint64_t v) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ bool ready(uint4 v) {
    return v.x != NOT_READY && v.y != NOT_READY && v.z != NOT_READY && v.w != NOT_READY;
}

// Constants, loaded at this place: the compiler would move them out of a loop, and spill them.
__device__ __forceinline__ float2 load_here(const float* p) {
    float2 v;
    asm volatile("ld.global.nc.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p));
    return v;
}

// A contribution to the residual: the value in steps of 2^-24 above the count 1.
__device__ __forceinline__ uint64_t contribution(float v) { return ((uint64_t)__float2ll_rn(v * X_ONE) << 8) + 1; }
// Integer part and fraction apart: a conversion of 64 bits takes eight times as long as one of 32.
__device__ __forceinline__ float residual_value(uint64_t v) {
    return __int2float_rn((int32_t)(v >> 32)) + __uint2float_rn((uint32_t)v & ~255u) * 0x1p-32f;
}

enum class Awaited : uint32_t { RESIDUAL, WIDE, QKV };

[[noreturn]] __device__ __noinline__ void give_up(const DecodeStepParams& p, Awaited what, uint32_t layer) {
    p.fault->layer = layer;
    p.fault->block = blockIdx.x;
    __threadfence_system();
    *(volatile uint32_t*)&p.fault->fault = 1 + (uint32_t)what;
    __threadfence_system();
    __trap();
    __builtin_unreachable();
}

// Calls `load` until all lanes say that what they loaded is complete; between tries `glance` looks at a few words of it, since polling
// for all would be traffic in the way of those who write it.
template <typename Glance, typename Load>
__device__ __forceinline__ void poll(const DecodeStepParams& p, Awaited what, uint32_t layer, Glance glance, Load load) {
    uint32_t tries = 0;
    while (!__all_sync(~0u, load())) {
        do {
            if (tries++ == p.patience) give_up(p, what, layer);
        } while (!__all_sync(~0u, glance()));
    }
}

// ---------------------------------------------------------------- who does what

// The kernel's parameters, and what follows from them; both lie in constant memory, where they cost no registers.
struct Args : DecodeStepParams {
    uint32_t units;                    // of a strip: hidden / 64
    uint32_t owners, groups;           // consumer warps that have units, and groups that have such warps
    uint32_t qkv_size, wide_size;
    uint32_t qkv_tiles, wide_tiles;    // row tiles of [qkv ; up]; of [down | dense]
    uint32_t slices, head_tiles;
    uint32_t qkv_turn, wide_turn;      // values of one turn of `qkv` and `wide`
    AttnDecodeParams attn[PEREGRINE_STEP_LAYERS];
    float hidden_share;                // 1 / hidden
    float last_inputs, last_share;     // inputs of the last owner's units, and 1 / them
    explicit Args(const DecodeStepParams& p) : DecodeStepParams(p) {
        units = hidden / UNIT_INPUTS;
        owners = (units + WARP_UNITS - 1) / WARP_UNITS, groups = (units + GROUP_UNITS - 1) / GROUP_UNITS;
        qkv_size = (heads + 2) * PEREGRINE_HEAD_DIM, wide_size = ffn + hidden;
        qkv_tiles = (qkv_size + ffn) / UNIT_ROWS, wide_tiles = hidden / UNIT_ROWS;
        slices = ffn / hidden + 1, head_tiles = vocab / UNIT_ROWS;
        qkv_turn = TOKENS * qkv_size, wide_turn = TOKENS * wide_size;
        for (uint32_t l = 0; l < layers; l++)
            attn[l] = {DecodeStepParams::qkv + l % TURNS * qkv_turn, layer[l].k_cache, layer[l].v_cache, table, step->token, nullptr,
                       attn_partials, attn_arrivals, TOKENS, heads, 0, slots, max_context};
        hidden_share = 1.f / hidden;
        last_inputs = (units - (owners - 1) * WARP_UNITS) * UNIT_INPUTS, last_share = 1.f / last_inputs;
    }
};

// Warps that read a stage of the ring; the stages of a strip are those of its groups, in order.
__device__ __forceinline__ uint32_t readers(const Args& p, uint32_t stage) {
    return min(GROUP_WARPS, p.owners - stage % p.groups * GROUP_WARPS);
}

// There are no more blocks than row tiles of [down | dense], so every block has a strip of each slice and of each part of [qkv ; up]: whoever
// has all of a slice knows that every block has come as far.
//
// The strips of a block. [qkv ; up]: every gridDim-th row tile, queries first, so that attention can begin early. [down | dense]: a run
// of the strips of all slices but the last, slice by slice, so that a block needs the inputs of one or two; then a run of the last slice
// (attention's output), which has until then to be ready.
__device__ __forceinline__ uint32_t share(uint32_t block, uint32_t count) { return block * count / gridDim.x; }
// First strip of a block, of those of slices 0 .. slices - 2: slice * wide_tiles + tile.
__device__ __forceinline__ uint32_t first_run(const Args& p, uint32_t block) { return share(block, (p.slices - 1) * p.wide_tiles); }
// First tile of a block, of the last slice. Together with the other run a block has its even share of all strips.
__device__ __forceinline__ uint32_t last_run(const Args& p, uint32_t block) {
    return share(block, p.slices * p.wide_tiles) - first_run(p, block);
}
// With more than one token: whose norm this block computes, or a number beyond them.
__device__ __forceinline__ uint32_t norm_owner_of() {
    const uint32_t apart = max(gridDim.x / TOKENS, 1u);
    return blockIdx.x % apart == 0 ? blockIdx.x / apart : TOKENS;
}
// Where it is published: layers take turns, the last norm has a place of its own.
__device__ __forceinline__ uint16_t* normed_of(const Args& p, uint32_t layer) {
    return p.normed + (layer == p.layers ? TURNS : layer % TURNS) * TOKENS * p.hidden;
}

// Calls begin(slice) for each slice of [down | dense] the block has strips of, and strip(tile, slice) for each of them.
template <typename Begin, typename Strip>
__device__ __forceinline__ void for_each_down_dense(const Args& p, Begin begin, Strip strip) {
    uint32_t at = first_run(p, blockIdx.x);
    const uint32_t end = first_run(p, blockIdx.x + 1);
#pragma unroll 1
    while (true) {
        const bool last = at == end;
        const uint32_t slice = last ? p.slices - 1 : at / p.wide_tiles;
        uint32_t tile = last ? last_run(p, blockIdx.x) : at - slice * p.wide_tiles;
        const uint32_t stop = last ? last_run(p, blockIdx.x + 1) : min(p.wide_tiles, tile + end - at);
        if (!last) at += stop - tile;
        if (tile < stop) begin(slice);
#pragma unroll 1
        for (; tile < stop; tile++) strip(tile, slice);
        if (last) break;
    }
}

// Stage `turn` of a group; the stages of a strip lie side by side.
__device__ __forceinline__ uint32_t stage_of(const Args& p, uint32_t turn, uint32_t group) { return turn * p.groups + group; }

// A bit a stage of a group: the parity of its next use, when the ring is about to reach `turn` at parity `phase`.
__device__ __forceinline__ uint32_t turn_phases(uint32_t turn, uint32_t phase) { return (phase ? ~0u : 0u) ^ ((1u << turn) - 1); }

// ---------------------------------------------------------------- producer

// Lane g keeps the ring of group g full: a lane that filled all, one after the other, took 400 cycles a stage and could not catch up
// after a wait.
template <bool ZEROS>
struct Producer {
    using S = Shared<ZEROS>;
    const Args& p;
    S& shared;
    uint32_t turns = S::DEPTH;               // stages of the ring; fewer in the head, see Consumer::head
    uint32_t turn = 0, phase = 0;            // stage to fill next, and the parity of its next use
    uint32_t behind = 0, behind_phase = 0;   // the oldest stage asked for that is not known to be here,
    uint32_t in_flight = 0, issued = 0;      // and how many there are

    static __device__ __forceinline__ uint32_t group() { return threadIdx.x % 32; }

    __device__ __forceinline__ void wait_oldest() {
        barrier_wait(&shared.full[stage_of(p, behind, group())], behind_phase);
        if (++behind == turns) behind = 0, behind_phase ^= 1;
        in_flight--;
    }
    // Asks for one stage; false when there turns out to be nothing to do.
    __device__ __forceinline__ bool push(const uint8_t* from, uint32_t bytes) {
        if (issued++ == S::DEPTH) {
            wait_previous();
            if (load_relaxed(&p.step->tokens) == 0) return false;
        }
        if (in_flight == IN_FLIGHT) wait_oldest();
        const uint32_t stage = stage_of(p, turn, group());
        barrier_wait(&shared.empty[stage], phase ^ 1);
        barrier_expect(&shared.full[stage], bytes);
        bulk_copy(shared.ring[stage], from, bytes, &shared.full[stage]);
        in_flight++;
        if (++turn == turns) turn = 0, phase ^= 1;
        return true;
    }
    __device__ __forceinline__ bool layer(const DecodeLayer& l) {
        const uint32_t first = group() * GROUP_UNITS, bytes = min(GROUP_UNITS, p.units - first) * S::BYTES;
        bool going = true;
        for (uint32_t t = blockIdx.x; t < p.qkv_tiles && going; t += gridDim.x)
            going = push(l.qkv_up + (size_t)(t * p.units + first) * S::BYTES, bytes);
        for_each_down_dense(
            p, [](uint32_t) {},
            [&](uint32_t tile, uint32_t slice) {
                if (going) going = push(l.down_dense + (size_t)((tile * p.slices + slice) * p.units + first) * S::BYTES, bytes);
            });
        return going;
    }
    __device__ void run() {
        bool going = true;
        for (uint32_t i = 0; i < p.layers && going; i++) going = layer(p.layer[i]);
        while (in_flight) wait_oldest();
        // The head: a stage for each warp of the group.
        const uint32_t first_warp = group() * GROUP_WARPS, warps = readers(p, group());
        turns = S::DEPTH / warps * warps;
        uint32_t phases = turn_phases(turn, phase);
        turn = 0;
        for (uint32_t t = blockIdx.x; t < p.head_tiles && going; t += gridDim.x)
            for (uint32_t w = first_warp; w < first_warp + warps && going; w++) {
                const uint32_t unit = w * WARP_UNITS, bytes = min(WARP_UNITS, p.units - unit) * TABLE_UNIT_BYTES;
                phase = phases >> turn & 1;
                if (in_flight == IN_FLIGHT) {
                    barrier_wait(&shared.full[stage_of(p, behind, group())], phases >> behind & 1 ^ 1);
                    if (++behind == turns) behind = 0;
                    in_flight--;
                } else if (in_flight == 0) {
                    behind = turn;
                }
                const uint32_t stage = stage_of(p, turn, group());
                barrier_wait(&shared.empty[stage], phase ^ 1);
                barrier_expect(&shared.full[stage], bytes);
                bulk_copy(shared.ring[stage], p.head + ((size_t)t * p.units + unit) * TABLE_UNIT_BYTES, bytes, &shared.full[stage]);
                in_flight++;
                phases ^= 1u << turn;
                if (++turn == turns) turn = 0;
            }
        // A block must not end while copies to its memory are under way.
        for (; in_flight; in_flight--) {
            barrier_wait(&shared.full[stage_of(p, behind, group())], phases >> behind & 1 ^ 1);
            if (++behind == turns) behind = 0;
        }
        wait_previous();
    }
};

// ---------------------------------------------------------------- consumers

template <bool ZEROS>
struct Consumer {
    using S = Shared<ZEROS>;
    const Args& p;
    S& shared;
    uint32_t tokens, turn = 0, phase = 0, slot = 0, slot_phase = 0;
    StripInputs<WARP_UNITS, 1, ZEROS> x;

    static __device__ __forceinline__ uint32_t warp() { return threadIdx.x / 32; }
    static __device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
    // Of each strip this warp has `units()` units from first() on.
    __device__ __forceinline__ uint32_t first() const { return min(warp() * WARP_UNITS, p.units); }
    __device__ __forceinline__ uint32_t units() const { return min(first() + WARP_UNITS, p.units) - first(); }

    static __device__ __forceinline__ void consumers_sync() {
        __syncwarp();  // bar.sync is for whole warps
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * 32) : "memory");
    }

    // Hands this warp's share of a strip's sums to the storer, and then the strip's stage back to the producer: not earlier, since an
    // arrival may overtake reads whose values nobody has needed yet.
    template <bool SINGLE>
    __device__ __forceinline__ void hand_over(const float acc[4], uint32_t stage, uint32_t arrivals) {
        const uint32_t token = lane() % 4 * 2;
        barrier_wait(&shared.sums_empty[slot], slot_phase ^ 1);
        float* to = &shared.sums[slot][warp()][token * SUM_STRIDE + lane() / 4];
        if (token < tokens) to[0] = acc[0], to[8] = acc[2];
        if (!SINGLE && token + 1 < tokens) to[SUM_STRIDE] = acc[1], to[SUM_STRIDE + 8] = acc[3];
        __syncwarp();
        if (lane() == 0) barrier_arrive(&shared.sums_full[slot]), barrier_arrive(&shared.empty[stage], arrivals);
        if (++slot == SUM_SLOTS) slot = 0, slot_phase ^= 1;
    }

    template <bool SINGLE>
    __device__ __forceinline__ void strip() {
        const uint32_t stage = stage_of(p, turn, warp() / GROUP_WARPS);
        barrier_wait(&shared.full[stage], phase);
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
        const uint8_t* units = shared.ring[stage] + warp() % GROUP_WARPS * WARP_UNITS * S::BYTES;
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) multiply_unit<SINGLE>(acc, units + i * S::BYTES, x, i, lane());
        scale_rows(acc);
        hand_over<SINGLE>(acc, stage, 1);
        if (++turn == S::DEPTH) turn = 0, phase ^= 1;
    }

    // Norm of one token's residual, of which this warp has the inputs of its own units: leaves them in shared.inputs, in the order that
    // `load` describes.
    __device__ __forceinline__ void norm_token(const uint64_t* residual, const float* weight, const float* bias, uint32_t layer) {
        const uint32_t lane = this->lane(), units = this->units(), count = 1 + layer * p.slices;
        const uint64_t* mine = residual + first() * UNIT_INPUTS;
        float2 w[WARP_UNITS], b[WARP_UNITS];
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) {
            const uint32_t e = (first() + i) * UNIT_INPUTS + 2 * lane;
            w[i] = b[i] = make_float2(0.f, 0.f);
            if (i < units) w[i] = load_here(weight + e), b[i] = load_here(bias + e);
        }
        ulonglong2 r[WARP_UNITS];
        const auto load = [&] {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++) {
                r[i] = make_ulonglong2(count, count);
                if (i < units) r[i] = load_relaxed(reinterpret_cast<const ulonglong2*>(mine + i * UNIT_INPUTS + 2 * lane));
            }
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++) complete &= ((uint32_t)r[i].x & 255) == count && ((uint32_t)r[i].y & 255) == count;
            return complete;
        };
        const auto glance = [&] { return lane >= units || (load_relaxed(mine + lane * UNIT_INPUTS + UNIT_INPUTS - 1) & 255) == count; };
        poll(p, Awaited::RESIDUAL, layer, glance, load);
        float v[2 * WARP_UNITS];
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) v[2 * i] = residual_value(r[i].x), v[2 * i + 1] = residual_value(r[i].y);
        const float2 moments = all_moments(layer, v);
        // Inputs 2 l, 2 l + 1 of a unit to where lane q finds its eight words together.
        uint32_t* to = shared.inputs[warp()] + lane % 4 * 8 + lane / 8 * 2 + lane / 4 % 2;
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) {
            const __half2 h = __floats2half2_rn((v[2 * i] - moments.x) * moments.y * w[i].x + b[i].x,
                                                (v[2 * i + 1] - moments.x) * moments.y * w[i].y + b[i].y);
            to[i * 32] = *reinterpret_cast<const uint32_t*>(&h);
        }
        __syncwarp();
    }

    // Mean and 1 / standard deviation of a token whose inputs the consumers hold. Each warp's squares are about the warp's own mean;
    // they are joined as Chan et al. (1979) do it, in a fixed tree.
    __device__ __forceinline__ float2 all_moments(uint32_t layer, const float v[2 * WARP_UNITS]) {
        constexpr float FULL = WARP_UNITS * UNIT_INPUTS;
        const bool last = warp() + 1 == p.owners;
        float sum = 0.f, squares = 0.f;
#pragma unroll
        for (int i = 0; i < 2 * WARP_UNITS; i++) sum += v[i];
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        const float own_mean = sum * (last ? p.last_share : 1.f / FULL);  // 0 in a warp without units
#pragma unroll
        for (int i = 0; i < 2 * WARP_UNITS; i++)
            if (i / 2 < units()) squares += (v[i] - own_mean) * (v[i] - own_mean);
#pragma unroll
        for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
        float2* parts = shared.moments[layer % 2];  // the other half may still be read
        if (lane() == 0) parts[warp()] = make_float2(own_mean, squares);
        consumers_sync();
        // Lane w has warp w's part.
        const uint32_t w = lane() % 16;
        const float inputs = w + 1 < p.owners ? FULL : w + 1 == p.owners ? p.last_inputs : 0.f;
        const float2 part = parts[min(w, CONSUMERS - 1)];
        float mean = inputs * part.x;
#pragma unroll
        for (int step = 8; step; step /= 2) mean += __shfl_xor_sync(~0u, mean, step);
        mean *= p.hidden_share;
        float all_squares = w < p.owners ? part.y + inputs * (part.x - mean) * (part.x - mean) : 0.f;
#pragma unroll
        for (int step = 8; step; step /= 2) all_squares += __shfl_xor_sync(~0u, all_squares, step);
        return make_float2(mean, rsqrtf(all_squares * p.hidden_share + p.epsilon));
    }

    // x = norm of the residual after `layer` layers, once it is complete. One token: each block computes it for itself. More: the
    // blocks would read 36 KB for each; instead one block a token does, and publishes what all others read.
    template <bool SINGLE>
    __device__ __forceinline__ void norm(const uint64_t* residual, const float* weight, const float* bias, uint32_t layer) {
        const uint32_t m = SINGLE ? 0 : norm_owner_of();
        if (SINGLE || m < tokens) norm_token(residual + m * p.hidden, weight, bias, layer);
        if (SINGLE) {
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++) {
                const uint4* from = reinterpret_cast<const uint4*>(shared.inputs[warp()] + i * 32 + lane() % 4 * 8);
                const bool present = lane() < 4;
                *reinterpret_cast<uint4*>(x.b[i]) = present ? from[0] : make_uint4(0, 0, 0, 0);
                *reinterpret_cast<uint4*>(x.b[i] + 4) = present ? from[1] : make_uint4(0, 0, 0, 0);
            }
            __syncwarp();
            x.add_up();
            return;
        }
        uint16_t* normed = normed_of(p, layer);
        if (m < tokens)
            for (uint32_t i = lane(); i < units() * 32; i += 32)
                store_relaxed(normed + m * p.hidden + first() * UNIT_INPUTS + 2 * i, shared.inputs[warp()][i]);
        __syncwarp();
        load(normed, p.hidden, layer);
        consumers_sync();  // as with one token: no warp is a layer ahead of another
    }

    // x = this warp's inputs of `stride` f16 a token, in the order of the operands: input 16 s + 8 h + 2 q + e of a unit at
    // 16 q + 4 s + 2 h + e.
    __device__ __forceinline__ void load(const uint16_t* activations, uint32_t stride, uint32_t layer) {
        const uint32_t m = lane() / 4, units = this->units();
        const bool present = m < tokens;
        const uint16_t* from = activations + (present ? m : 0) * stride + first() * UNIT_INPUTS + lane() % 4 * 16;
        const auto load = [&] {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint4 v = make_uint4(0, 0, 0, 0);
                    if (present && i < units) v = load_relaxed(reinterpret_cast<const uint4*>(from + i * UNIT_INPUTS) + half);
                    *reinterpret_cast<uint4*>(x.b[i] + 4 * half) = v;
                }
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
                for (int j = 0; j < 2 * STEPS; j++) complete &= x.b[i][j] != NOT_READY;
            return complete;
        };
        const auto glance = [&] {
            return !present || units == 0 || load_relaxed(reinterpret_cast<const uint32_t*>(from + (units - 1) * UNIT_INPUTS)) != NOT_READY;
        };
        poll(p, Awaited::WIDE, layer, glance, load);
        x.add_up();
    }

    // Strips of the head's f16 table. Each warp's units are a stage of their own, and a stage is always the same warp's: else a warp
    // could take the phase before the last for the one it waits for.
    __device__ __forceinline__ void head() {
        const uint32_t group = warp() / GROUP_WARPS, warps = readers(p, group), turns = S::DEPTH / warps * warps;
        uint32_t phases = turn_phases(turn, phase);
        turn = warp() % GROUP_WARPS;
#pragma unroll 1
        for (uint32_t t = blockIdx.x; t < p.head_tiles; t += gridDim.x) {
            const uint32_t stage = stage_of(p, turn, group);
            barrier_wait(&shared.full[stage], phases >> turn & 1);
            const uint8_t* unit = shared.ring[stage] + lane() * 16;
            float acc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++) {
                if (i >= units()) break;
                // A chain of one unit, then an f32 add: the tensor core's own adds truncate.
                float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    const uint4 a = *reinterpret_cast<const uint4*>(unit + i * TABLE_UNIT_BYTES + s * 512);
                    const uint32_t words[4] = {a.x, a.y, a.z, a.w};
                    mma(c, words, x.b[i][2 * s], x.b[i][2 * s + 1]);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) acc[j] += c[j];
            }
            hand_over<false>(acc, stage, warps);
            phases ^= 1u << turn;
            turn += warps;
            if (turn >= turns) turn -= turns;
        }
    }

    // The embedding's contribution to the residual, spread over all blocks; and the residual of the next step is cleared.
    __device__ __forceinline__ void embed(uint64_t* residual, uint64_t* next) const {
        const uint32_t thread = blockIdx.x * CONSUMERS * 32 + threadIdx.x, threads = gridDim.x * CONSUMERS * 32;
        for (uint32_t i = thread; i < TOKENS * p.hidden; i += threads) next[i] = 0;
        for (uint32_t i = thread; i < tokens * p.hidden / 2; i += threads) {
            const uint32_t m = i / (p.hidden / 2), pair = i % (p.hidden / 2);
            const uint32_t id = load_relaxed(&p.step->token[m].id);
            const float2 v = table_pair(p.embedding, id < p.vocab ? id : 0, pair, p.hidden);
            add_relaxed(residual + (size_t)m * p.hidden + 2 * pair, contribution(v.x));
            add_relaxed(residual + (size_t)m * p.hidden + 2 * pair + 1, contribution(v.y));
        }
    }

    // SINGLE: there is one token.
    template <bool SINGLE>
    __device__ void run(uint64_t* residual, uint64_t* next) {
        embed(residual, next);
#pragma unroll 1
        for (uint32_t l = 0;; l++) {
            const bool last = l == p.layers;
            norm<SINGLE>(residual, last ? p.final_weight : p.layer[l].norm_weight, last ? p.final_bias : p.layer[l].norm_bias, l);
            if (last) break;
            if (warp() >= p.owners) continue;  // no units: of use to the norm's barrier alone
#pragma unroll 1
            for (uint32_t t = blockIdx.x; t < p.qkv_tiles; t += gridDim.x) strip<SINGLE>();
            const uint16_t* wide = p.wide + l % TURNS * p.wide_turn;
            for_each_down_dense(p, [&](uint32_t slice) { load(wide + slice * p.hidden, p.wide_size, l); }, [&](uint32_t, uint32_t) { strip<SINGLE>(); });
        }
        if (warp() < p.owners) head();
    }
};

// ---------------------------------------------------------------- storer

// Adds the consumers' sums and sends them where they belong.
template <bool ZEROS>
struct Storer {
    using S = Shared<ZEROS>;
    const Args& p;
    S& shared;
    uint32_t tokens, slot = 0, phase = 0;
    bool broken = false;  // a sum was not a number or beyond the residual's range

    static __device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }

    // Calls send(token, row, sum, active) for each output of the next strip, on all lanes together; `active` says whether there is one.
    // The order of the sum is the same whatever the number of tokens.
    template <typename Send>
    __device__ __forceinline__ void take(Send send) {
        barrier_wait(&shared.sums_full[slot], phase);
        for (uint32_t first = 0; first < tokens * UNIT_ROWS; first += 32) {
            const uint32_t m = (first + lane()) / UNIT_ROWS, row = lane() % UNIT_ROWS;
            const float* from = shared.sums[slot][0] + m * SUM_STRIDE + row;
            float low = 0.f, high = 0.f;  // of warps that have no units: zeros
            if (m < tokens) {
#pragma unroll
                for (int w = 0; w < CONSUMERS / 2; w++) low += from[w * TOKENS * SUM_STRIDE];
#pragma unroll
                for (int w = CONSUMERS / 2; w < CONSUMERS; w++) high += from[w * TOKENS * SUM_STRIDE];
            }
            send(m, row, low + high, m < tokens);
        }
        __syncwarp();
        if (lane() == 0) barrier_arrive(&shared.sums_empty[slot]);
        if (++slot == SUM_SLOTS) slot = 0, phase ^= 1;
    }
    // Two neighbouring rows of a tile of [qkv ; up]: queries, keys and values as they are, the rest as `Consumer::load` wants them.
    __device__ __forceinline__ void store(uint32_t layer, uint32_t tile, uint32_t m, uint32_t row, uint32_t pair) const {
        const uint32_t first = tile * UNIT_ROWS;
        if (first < p.qkv_size) {
            store_relaxed(p.qkv + layer % TURNS * p.qkv_turn + m * p.qkv_size + first + row, pair);
        } else {
            const uint32_t r = first - p.qkv_size;
            store_relaxed(p.wide + layer % TURNS * p.wide_turn + m * p.wide_size + r / UNIT_INPUTS * UNIT_INPUTS + r % UNIT_INPUTS / 4 +
                              row % 8 * 8 + row / 8 * 2, pair);
        }
    }
    // Marks what this block has written in `layer`, and its part of attention's output, as not ready. Everybody has read it: their sums
    // of it are in the residual that the layer under way began with. The fence: whoever sees what this block writes from here on
    // sees the marks too.
    __device__ __forceinline__ void clear(uint32_t layer) const {
        for (uint32_t t = blockIdx.x; t < p.qkv_tiles; t += gridDim.x)
            for (uint32_t i = lane(); i < tokens * UNIT_ROWS / 2; i += 32) {
                const uint32_t m = i / (UNIT_ROWS / 2), row = i % (UNIT_ROWS / 2) * 2;
                store(layer, t, m, row, NOT_READY);
                if (t < p.wide_tiles)
                    store_relaxed(p.wide + layer % TURNS * p.wide_turn + m * p.wide_size + p.ffn + t * UNIT_ROWS + row, NOT_READY);
            }
        clear_normed(layer);
        __threadfence();
    }
    __device__ __forceinline__ void clear_normed(uint32_t layer) const {
        const uint32_t owned = norm_owner_of();
        if (owned >= TOKENS) return;
        for (uint32_t i = lane(); i < p.hidden / 2; i += 32) store_relaxed(normed_of(p, layer) + owned * p.hidden + 2 * i, NOT_READY);
    }
    __device__ __forceinline__ void qkv_up(uint32_t layer) {
        for (uint32_t t = blockIdx.x; t < p.qkv_tiles; t += gridDim.x)
            take([&](uint32_t m, uint32_t row, float sum, bool active) {
                if (t * UNIT_ROWS >= p.qkv_size) sum = gelu(sum);
                const float next = __shfl_down_sync(~0u, sum, 1);
                const __half2 pair = __floats2half2_rn(sum, next);
                if (active && row % 2 == 0) store(layer, t, m, row, *reinterpret_cast<const uint32_t*>(&pair));
            });
        // Here nobody waits for the storer: all wait for all of [qkv ; up].
        if (layer > 0) clear(layer - 1);
        else clear_normed(p.layers);  // of the step before
    }
    __device__ __forceinline__ void down_dense(uint64_t* residual) {
        for_each_down_dense(
            p, [](uint32_t) {},
            [&](uint32_t tile, uint32_t) {
                take([&](uint32_t m, uint32_t row, float sum, bool active) {
                    if (!active) return;
                    broken |= !(fabsf(sum) < X_LIMIT);
                    add_relaxed(residual + m * p.hidden + tile * UNIT_ROWS + row, contribution(sum));
                });
            });
    }
    // The norm's weights of the layer to come, into L2: they would be waited for.
    __device__ __forceinline__ void prefetch(const float* weight, const float* bias) const {
        const uint32_t lines = (p.hidden * 4 + 127) / 128, i = blockIdx.x + threadIdx.x % 32 * gridDim.x;
        if (i < 2 * lines) asm volatile("prefetch.global.L2 [%0];" ::"l"((i < lines ? weight : bias) + i % lines * 32));
    }
    __device__ void run(uint64_t* residual) {
#pragma unroll 1
        for (uint32_t l = 0; l < p.layers; l++) {
            const bool last = l + 1 == p.layers;
            prefetch(last ? p.final_weight : p.layer[l + 1].norm_weight, last ? p.final_bias : p.layer[l + 1].norm_bias);
            qkv_up(l), down_dense(residual);
        }
        for (uint32_t t = blockIdx.x; t < p.head_tiles; t += gridDim.x) {
            take([&](uint32_t m, uint32_t row, float sum, bool active) {
                if (broken) sum = __int_as_float(0x7fffffff);  // the sampler will say so
                if (active) p.logits[(size_t)m * p.vocab + t * UNIT_ROWS + row] = sum;
            });
            if (t == blockIdx.x) clear(p.layers - 1);
        }
    }
};

// ---------------------------------------------------------------- attention

// Reads of queries, keys and values, once they are there.
struct FetchReady {
    const Args& p;
    uint32_t layer;
    template <int N>
    __device__ __forceinline__ void operator()(uint4 (&w)[N], const uint16_t* const (&at)[N]) const {
        poll(p, Awaited::QKV, layer, [] { return true; }, [&] {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < N; i++) w[i] = load_relaxed(reinterpret_cast<const uint4*>(at[i]));
#pragma unroll
            for (int i = 0; i < N; i++) complete &= ready(w[i]);
            return complete;
        });
    }
};

// Sixteen dims of a head, which is one unit: words as Consumer::load wants them.
struct StoreWide {
    const Args& p;
    uint32_t layer;
    __device__ __forceinline__ void operator()(uint32_t m, uint32_t head, uint32_t q, const uint32_t words[8]) const {
        uint16_t* to = p.wide + layer % TURNS * p.wide_turn + m * p.wide_size + p.ffn + head * PEREGRINE_HEAD_DIM + q * 4;
#pragma unroll
        for (int i = 0; i < 4; i++) store_relaxed(to + i * 16, words[i], words[i + 4]);
    }
};

// The items of all tokens, one after the other, are dealt out over the attention warps of all blocks; the same ones in every layer.
template <bool ZEROS>
__device__ __forceinline__ void attention(const Args& p, Shared<ZEROS>& shared, uint32_t tokens) {
    if (threadIdx.x % 32 < tokens) shared.token[threadIdx.x % 32] = p.step->token[threadIdx.x % 32];  // each warp for itself
    __syncwarp();
    const uint32_t tiles = attn_head_tiles(p.heads);
#pragma unroll 1
    for (uint32_t l = 0; l < p.layers; l++)
#pragma unroll 1
        for (uint32_t item = (threadIdx.x / 32 - ATTENTION) * gridDim.x + blockIdx.x;; item += (WARPS - ATTENTION) * gridDim.x) {
            // Little stays in registers from item to item: attn_decode_item needs them all.
            uint32_t m = 0, i = item;
            for (; m < tokens; m++) {
                const uint32_t items = tiles * attn_chunks(min(shared.token[m].position, p.max_context - 1));
                if (i < items) break;
                i -= items;
            }
            if (m == tokens) break;
            attn_decode_item(p.attn[l], {m, i % tiles, i / tiles}, attn_token(p.attn[l], m, shared.token[m]), FetchReady{p, l}, StoreWide{p, l});
        }
}

// A warp multiplies WARP_UNITS units of every strip, without a branch; those the strip does not have are zeros that no copy touches.
// (The head's stages reach over them, after the last strip of the layers.) Sums of warps without units are zeros too.
template <bool ZEROS>
__device__ __forceinline__ void pad(const Args& p, Shared<ZEROS>& shared) {
    constexpr uint32_t BYTES = Shared<ZEROS>::BYTES;
    for (uint32_t i = threadIdx.x; i < sizeof(shared.sums) / 16; i += THREADS)
        reinterpret_cast<uint4*>(shared.sums)[i] = make_uint4(0, 0, 0, 0);
    const uint32_t units = p.units - (p.groups - 1) * GROUP_UNITS, missing = (WARP_UNITS - units % WARP_UNITS) % WARP_UNITS;
    for (uint32_t s = p.groups - 1; s < Shared<ZEROS>::DEPTH * p.groups; s += p.groups)
        for (uint32_t i = threadIdx.x; i < missing * BYTES / 16; i += THREADS)
            reinterpret_cast<uint4*>(shared.ring[s] + units * BYTES)[i] = make_uint4(0, 0, 0, 0);
}

template <bool ZEROS>
__global__ void __launch_bounds__(THREADS, 1) decode_step_kernel(const __grid_constant__ Args p) {
    overlap_next();
    extern __shared__ __align__(128) uint8_t smem[];
    Shared<ZEROS>& shared = *reinterpret_cast<Shared<ZEROS>*>(smem);
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < Shared<ZEROS>::DEPTH * p.groups; s++)
            barrier_init(&shared.full[s], 1), barrier_init(&shared.empty[s], readers(p, s));
        for (uint32_t s = 0; s < SUM_SLOTS; s++) barrier_init(&shared.sums_full[s], p.owners), barrier_init(&shared.sums_empty[s], 1);
        barrier_init_done();
    }
    pad(p, shared);
    __syncthreads();
    if (warp == PRODUCER) {
        if (threadIdx.x % 32 < p.groups) {
            Producer<ZEROS> producer{p, shared};
            producer.run();
        }
        __syncwarp();
    } else {
        wait_previous();
        const uint32_t tokens = min(load_relaxed(&p.step->tokens), TOKENS), half = load_relaxed(p.epoch) & 1;
        uint64_t *residual = p.x + half * TOKENS * p.hidden, *next = p.x + (half ^ 1) * TOKENS * p.hidden;
        if (tokens == 0) {
        } else if (warp < CONSUMERS) {
            Consumer<ZEROS> consumer{p, shared, tokens};
            if (tokens == 1) consumer.template run<true>(residual, next);
            else consumer.template run<false>(residual, next);
        } else if (warp == STORER) {
            Storer<ZEROS> storer{p, shared, tokens};
            storer.run(residual);
        } else {
            attention(p, shared, tokens);
        }
    }
    __syncthreads();
    // The last block to finish turns the residual's halves round for the next step.
    if (threadIdx.x == 0 && load_relaxed(&p.step->tokens) != 0 && atomicAdd(&p.epoch[1], 1) == gridDim.x - 1) p.epoch[1] = 0, p.epoch[0] ^= 1;
}

template <bool ZEROS>
int32_t blocks(uint32_t* count) {
    int device = 0, multiprocessors = 0, capability = 0, cooperative = 0, resident = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    *count = 0;
    if (e != cudaSuccess || capability != 9 || !cooperative) return (int32_t)e;
    // A program built without sm_90a has no such kernel: that is no error, there is another way.
    e = cudaFuncSetAttribute(decode_step_kernel<ZEROS>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<ZEROS>));
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, decode_step_kernel<ZEROS>, THREADS, sizeof(Shared<ZEROS>));
    if (e == cudaSuccess && resident >= 1) *count = (uint32_t)multiprocessors;
    cudaGetLastError();
    return 0;
}

}  // namespace

extern "C" int32_t decode_step_blocks(uint32_t has_zeros, uint32_t* count) { return has_zeros ? blocks<true>(count) : blocks<false>(count); }

extern "C" int32_t decode_step(const DecodeStepParams* p, const Launch* l) {
    if (p->hidden == 0 || p->hidden % UNIT_INPUTS || p->hidden / UNIT_INPUTS > CONSUMERS * WARP_UNITS) return PEREGRINE_BAD_SHAPE;
    if (p->ffn == 0 || p->ffn % p->hidden || p->heads * PEREGRINE_HEAD_DIM != p->hidden) return PEREGRINE_BAD_SHAPE;
    if (p->layers == 0 || p->layers > PEREGRINE_STEP_LAYERS || 1 + p->layers * (p->ffn / p->hidden + 1) > 255) return PEREGRINE_BAD_SHAPE;
    if (p->vocab == 0 || p->vocab % UNIT_ROWS || p->blocks == 0 || p->blocks > p->vocab / UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    if (p->slots == 0 || p->max_context == 0 || attn_chunks(p->max_context - 1) > ATTN_RUNS * 31) return PEREGRINE_BAD_SHAPE;
    const Args args(*p);
    const dim3 grid(min(p->blocks, args.wide_tiles));
    if (grid.x < TOKENS) return PEREGRINE_BAD_SHAPE;  // each norm of several tokens is a block's
    return p->has_zeros ? launch<true>(decode_step_kernel<true>, grid, THREADS, sizeof(Shared<true>), l, args)
                        : launch<true>(decode_step_kernel<false>, grid, THREADS, sizeof(Shared<false>), l, args);
}
#endif
