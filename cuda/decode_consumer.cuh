// decode_consumer — multiplies strips from the ring by inputs kept in registers; norms of the residual stream.
//
// A strip is 6 units a warp: the four 16-byte words of a lane, 5 logic operations for 8 weights (units.cuh), four mma a unit. That is
// what bounds the step: 0.9 us of a strip's 1.13 us. Each token is a column of the mma: sums of a token do not depend on the others.
#pragma once
#include "decode_plan.cuh"
#include "table.cuh"

namespace {

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
            for_each_down_dense(
                p, [&](uint32_t slice) { load(wide + slice * p.hidden, p.wide_size, l); }, [&](uint32_t, uint32_t) { strip<SINGLE>(); });
        }
        if (warp() < p.owners) head();
    }
};

}  // namespace
