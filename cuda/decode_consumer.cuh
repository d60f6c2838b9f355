// decode_consumer — multiplies strips from the ring by inputs kept in registers; norms of the residual stream.
//
// A strip is 6 units a warp, see decode_strip.cuh. Tokens are columns of the product: sums of a token do not depend on the others.
// Inputs of up to 4 tokens are bytes, two planes of them in one tile of 8 columns; of 5 to 8 norms are two tiles, slices f16.
#pragma once
#include <type_traits>
#include "decode_halves.cuh"
#include "decode_norm.cuh"
#include "table.cuh"

namespace {

using Words = uint32_t[WARP_UNITS][2 * STEPS];

// What a lane has of token m's inputs, of `size` a token, for the head. Input 16 s + 8 h + 2 q + e of a unit is at 32 (s / 2) + 8 q +
// 4 (s % 2) + 2 h + e, so that the 16 bytes of lanes q = 0 .. 3 are whole sectors: half a unit. `first` and `units`: those of the warp. In
// place of a token or a unit that is not there another one's, since all must be read: registers that are written under a condition are
// taken for occupied all the time.
template <bool MANY>
__device__ __forceinline__ void fetch(Words& w, const Args& p, const uint16_t* activations, uint32_t size, uint32_t m, uint32_t tokens,
                                      uint32_t first, uint32_t units, uint32_t layer) {
    constexpr uint32_t HALF = HALF_STEP<MANY>, UNIT = 2 * HALF;
    const uint16_t* from = activations + min(m, tokens - 1) * token_step<MANY>(size) + first * UNIT + threadIdx.x % 4 * 8;
    const auto load = [&] {
        bool complete = true;
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<uint4*>(w[i] + 4 * half) =
                    load_relaxed(reinterpret_cast<const uint4*>(from + min(i, units - 1) * UNIT + half * HALF));
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
            for (int j = 0; j < 2 * STEPS; j++) complete &= w[i][j] != NOT_READY;
        return complete;
    };
    const auto glance = [&] { return load_relaxed(reinterpret_cast<const uint32_t*>(from + (units - 1) * UNIT)) != NOT_READY; };
    poll(p, Awaited::WIDE, layer, glance, load);
}

// MANY: there are more than ByteInputs take.
template <bool ZEROS, bool PACKED, bool MANY>
struct Consumer {
    using S = Shared<ZEROS>;
    using Inputs = std::conditional_t<MANY, PlaneInputs<WARP_UNITS>, ByteInputs<WARP_UNITS>>;
    const Args& p;
    S& shared;
    // Kept in registers: the compiler would read and compute them anew for each strip, 50 cycles each.
    const uint32_t base, thread;
    uint32_t tokens, turn = 0, phase = 0;
    Inputs x;

    __device__ __forceinline__ Consumer(const Args& p, S& shared, uint32_t tokens)
        : p(p), shared(shared), base(opaque(smem_address(&shared))), thread(opaque(threadIdx.x)), tokens(tokens) {}
    static __device__ __forceinline__ uint32_t opaque(uint32_t v) {
        asm volatile("" : "+r"(v));
        return v;
    }
    // Of something in `shared`.
    template <typename T>
    __device__ __forceinline__ uint32_t address(const T& at) const {
        return anew(base) + (uint32_t)(reinterpret_cast<const uint8_t*>(&at) - reinterpret_cast<const uint8_t*>(&shared));
    }
    // With many tokens what follows from these is computed anew each time: registers are short.
    static __device__ __forceinline__ uint32_t anew(uint32_t v) { return MANY ? opaque(v) : v; }
    __device__ __forceinline__ uint32_t warp() const { return anew(thread) / 32; }
    __device__ __forceinline__ uint32_t lane() const { return anew(thread) % 32; }
    // Of each strip this warp has `units()` units from first() on.
    __device__ __forceinline__ uint32_t first() const { return min(warp() * WARP_UNITS, p.units); }
    __device__ __forceinline__ uint32_t units() const { return min(first() + WARP_UNITS, p.units) - first(); }

    static __device__ __forceinline__ void consumers_sync() {
        __syncwarp();  // bar.sync is for whole warps
        asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * 32) : "memory");
    }

    // Puts what lane `thread` has of sums into a slot for the storer.
    __device__ __forceinline__ void put(uint32_t slot, uint32_t thread, const float (&sum)[Inputs::TOKENS][2]) const {
        const uint32_t at = slot * CONSUMERS * 32 + thread;
        if constexpr (MANY)
            store_shared16(address(shared.many[0][0]) + at * 16, make_float4(sum[0][0], sum[0][1], sum[1][0], sum[1][1]));
        else
            store_shared8(address(shared.few.sums[0][0]) + at * 8, __float_as_uint(sum[0][0]), __float_as_uint(sum[0][1]));
    }
    __device__ __forceinline__ uint32_t sums_full(uint32_t slot) const { return address(shared.sums_full[0]) + slot * 8; }
    __device__ __forceinline__ uint32_t sums_empty(uint32_t slot) const { return address(shared.sums_empty[0]) + slot * 8; }

    // Multiplies the next strip, hands this warp's share of the sums to the storer, and then the strip's stage back to the producer: not
    // earlier, since an arrival may overtake reads whose values nobody has needed yet.
    template <class In>
    __device__ __forceinline__ void strip(const In& x) {
        const uint32_t thread = anew(this->thread), lane = thread % 32, warp = thread / 32;
        const uint32_t stage = stage_of(p, turn, warp / GROUP_WARPS), unit = warp % GROUP_WARPS * (WARP_UNITS * S::BYTES);
        barrier_wait(address(shared.full[0]) + stage * 8, phase);
        barrier_wait(sums_empty(turn), phase ^ 1);
        float sum[In::TOKENS][2];
        multiply_strip<ZEROS>(sum, address(shared.ring[0][0]) + stage * S::STAGE_BYTES + unit, x, lane);
        put(turn, thread, sum);
        __syncwarp();
        if (lane == 0) barrier_arrive(sums_full(turn)), barrier_arrive(address(shared.empty[0]) + stage * 8);
        if (++turn == S::DEPTH) turn = 0, phase ^= 1;
    }

    template <class In>
    __device__ __forceinline__ void strips(const In& x, uint32_t count) {
#pragma unroll 1
        for (; count; count--) strip(x);
    }

    // Norm of one token's residual, of which this warp has the inputs of its own units: pairs[i] is 2 lane, 2 lane + 1 of unit i.
    __device__ __forceinline__ void norm_token(uint32_t (&pairs)[WARP_UNITS], const uint64_t* residual, const float* weight,
                                               const float* bias, uint32_t layer) {
        const uint32_t lane = this->lane(), units = this->units(), count = 1 + layer * p.slices;
        const uint64_t* mine = residual + first() * UNIT_INPUTS;
        float2 w[WARP_UNITS], b[WARP_UNITS];
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) {
            const uint32_t e = (first() + i) * UNIT_INPUTS + 2 * lane;
            w[i] = b[i] = make_float2(0.f, 0.f);
            if (i < units) w[i] = load_here(weight + e), b[i] = load_here(bias + e);
        }
        ulonglong2 r[WARP_UNITS];  // what is complete is not asked for again
        const uint32_t none = opaque(count ^ 1), present = opaque(units);
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) r[i].x = r[i].y = i < present ? none : count;
        const auto differs = [&](const ulonglong2& v) { return (((uint32_t)v.x ^ count) | ((uint32_t)v.y ^ count)) & 255; };
        const auto load = [&] {
            uint32_t odd = 0;
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++)
                if (differs(r[i])) r[i] = load_relaxed(reinterpret_cast<const ulonglong2*>(mine + i * UNIT_INPUTS + 2 * lane));
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++) odd |= differs(r[i]);
            return odd == 0;
        };
        const auto glance = [&] { return lane >= units || (load_relaxed(mine + lane * UNIT_INPUTS + UNIT_INPUTS - 1) & 255) == count; };
        poll(p, Awaited::RESIDUAL, layer, glance, load);
        float v[2 * WARP_UNITS];
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) v[2 * i] = residual_value(r[i].x), v[2 * i + 1] = residual_value(r[i].y);
        const float2 moments = all_moments(layer, v, residual_value(count));
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++)
            pairs[i] = as_u32(__floats2half2_rn((v[2 * i] - moments.x) * moments.y * w[i].x + b[i].x,
                                                (v[2 * i + 1] - moments.x) * moments.y * w[i].y + b[i].y));
    }

    // Mean and 1 / standard deviation of a token whose inputs the consumers hold. Each warp's squares are about the warp's own mean;
    // they are joined as Chan et al. (1979) do it, by each lane for itself: a tree of shuffles takes longer. Inputs of units that are not
    // there are `absent`, and taken off the sums: a condition each would be a predicate each, which ptxas spills.
    __device__ __forceinline__ float2 all_moments(uint32_t layer, const float v[2 * WARP_UNITS], float absent) {
        float sum = 0.f, squares = 0.f;
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) sum += v[2 * i] + v[2 * i + 1];
#pragma unroll
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        const bool last = warp() + 1 == p.owners;
        const float missing = WARP_UNITS * UNIT_INPUTS - p.inputs[warp()];
        const float own_mean = (sum - missing * absent) * (last ? p.last_share : 1.f / (WARP_UNITS * UNIT_INPUTS));
#pragma unroll
        for (int i = 0; i < 2 * WARP_UNITS; i++) squares += (v[i] - own_mean) * (v[i] - own_mean);
#pragma unroll
        for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
        squares -= missing * (absent - own_mean) * (absent - own_mean);
        const uint32_t parts = address(shared.moments[0][0]) + layer % 2 * sizeof(shared.moments[0]);  // the others may still be read
        if (lane() == 0) store_shared8(parts + warp() * sizeof(float2), __float_as_uint(own_mean), __float_as_uint(squares));
        consumers_sync();
        float means[CONSUMERS], mean = 0.f, all_squares = 0.f;
#pragma unroll
        for (int w = 0; w < CONSUMERS; w += 2) {
            const uint4 two = load_shared16(parts + w * sizeof(float2));
            means[w] = __uint_as_float(two.x), means[w + 1] = __uint_as_float(two.z);
            mean += p.inputs[w] * means[w] + p.inputs[w + 1] * means[w + 1];
            all_squares += __uint_as_float(two.y) + __uint_as_float(two.w);
        }
        mean *= p.hidden_share;
#pragma unroll
        for (int w = 0; w < CONSUMERS; w++) all_squares += p.inputs[w] * (means[w] - mean) * (means[w] - mean);
        return make_float2(mean, rsqrtf(all_squares * p.hidden_share + p.epsilon));
    }

    // Where a lane's pair of the norm goes, in words of a unit, as `fetch` wants it.
    __device__ __forceinline__ uint32_t place() const { return lane() / 16 * 16 + lane() % 4 * 4 + lane() / 8 % 2 * 2 + lane() / 4 % 2; }

    // Several tokens' norms after `layer` layers: blocks that computed all for themselves, as with one token, would read 36 KB for each.
    // Instead one block a token does, and publishes what all others read.
    __device__ __forceinline__ void publish_norm(const uint64_t* residual, const float* weight, const float* bias, uint32_t layer) {
        const uint32_t m = norm_owner_of(shared.block);
        if (m >= tokens) return;
        uint32_t pairs[WARP_UNITS];
        norm_token(pairs, residual + m * p.hidden, weight, bias, layer);
        if (layer < p.layers) return norms(layer).publish(pairs, m);
        uint16_t* normed = p.final_norm + value_at<MANY>(m, first() * UNIT_INPUTS + place() * 2, p.hidden);  // f16, for the head
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++)
            if (i < units()) store_relaxed(normed + i * 2 * HALF_STEP<MANY>, pairs[i]);
    }
    __device__ __forceinline__ WarpNorms<MANY> norms(uint32_t layer) const { return {p, layer, warp(), units(), lane()}; }
    __device__ __forceinline__ uint32_t own_inputs() const {
        return address(shared.few.inputs[0][0]) + warp() * sizeof(shared.few.inputs[0]);
    }
    // The f16 words of the one token's norm, for the head.
    __device__ __forceinline__ void exchange(Words& w, const uint32_t (&pairs)[WARP_UNITS]) const {
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) store_shared4(own_inputs() + i * 128 + place() * 4, pairs[i]);
        __syncwarp();
        const uint32_t from = own_inputs() + lane() % 4 * 16;
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<uint4*>(w[i] + 4 * half) = load_shared16(from + i * 128 + half * 64);
    }
    // x = this warp's inputs of a slice. All are asked for together: each trip through L2 is a microsecond. A lane has of each unit the 16
    // bytes that In::set describes, of one half or of both.
    template <class In>
    __device__ __forceinline__ void take(In& x, const uint16_t* slice, uint32_t layer) const {
        constexpr uint32_t HALF = HALF_STEP<MANY>, UNIT = 2 * HALF;
        constexpr int HALVES = In::PIECES, LANES = 8 / HALVES;
        const uint32_t units = this->units();
        // In place of a token that is not there another one's.
        const uint32_t m = min(lane() / LANES, tokens - 1);
        const uint16_t* from = slice + m * token_step<MANY>(p.wide_size) + first() * UNIT + lane() % LANES * 8;
        uint32_t top;
        // What is not there yet is not a number, which the largest then is not either. If that is so for another reason, each word tells.
        const auto load = [&] {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    x.b[i][h] = load_relaxed(reinterpret_cast<const uint4*>(from + min(i, units - 1) * UNIT + h * HALF));
            top = 0;
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
                for (int h = 0; h < HALVES; h++) top = most(top, x.b[i][h]);
            if (are_numbers(top)) return true;
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
                for (int h = 0; h < HALVES; h++) complete &= ready(x.b[i][h]);
            return complete;
        };
        const auto glance = [&] { return load_relaxed(reinterpret_cast<const uint32_t*>(from + (units - 1) * UNIT)) != NOT_READY; };
        poll(p, Awaited::WIDE, layer, glance, load);
        x.set(top, lane());
    }
    // x = this warp's inputs of the one token.
    __device__ __forceinline__ void take_one(const uint16_t* activations, uint32_t layer) {
        const uint32_t present = units() * 8;
        const uint4* from = reinterpret_cast<const uint4*>(activations + first() * UNIT_INPUTS);
        uint4 pieces[Inputs::ONE_PIECES];
        const auto load = [&] {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < Inputs::ONE_PIECES; i++) {
                pieces[i] = load_relaxed(from + min(lane() + 32 * i, present - 1));
                complete &= ready(pieces[i]);
            }
            return complete;
        };
        const auto glance = [&] {
            return lane() >= units() || load_relaxed(reinterpret_cast<const uint32_t*>(from + lane() * 8)) != NOT_READY;
        };
        poll(p, Awaited::WIDE, layer, glance, load);
        x.set_one(pieces, own_inputs(), lane());
    }

    // Strips of the head's table. Each warp's units are a stage of their own, and a stage is always the same warp's: else a warp
    // could take the phase before the last for the one it waits for.
    __device__ __forceinline__ void head(const Words& b) {
        const uint32_t group = warp() / GROUP_WARPS, warps = readers(p, group), turns = S::DEPTH / warps * warps;
        uint32_t phases = turn_phases(turn, phase), slot = turn, slot_phase = phase;
        turn = warp() % GROUP_WARPS;
#pragma unroll 1
        for (uint32_t t = shared.block; t < p.head_tiles; t += gridDim.x) {
            const uint32_t stage = stage_of(p, turn, group), from = address(shared.ring[0][0]) + stage * S::STAGE_BYTES + lane() * 16;
            barrier_wait(address(shared.full[0]) + stage * 8, phases >> turn & 1);
            float acc[4] = {0.f, 0.f, 0.f, 0.f};
            // In place of a unit that is not there any other, which is not added.
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++) {
                if (PACKED) __syncwarp();  // for the compiler: there are no registers for more of them
                const uint32_t unit = from + (i < units() ? i * table_unit_bytes(PACKED) : 0);
                TableWords<PACKED> words;
#pragma unroll
                for (int j = 0; j < TableWords<PACKED>::COUNT; j++) words.v[j] = load_shared16(unit + j * 512);
                // A chain of one unit, then an f32 add: the tensor core's own adds truncate.
                float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    uint32_t a[4];
                    words.unpack(s, a);
                    mma(c, a, b[i][2 * s], b[i][2 * s + 1]);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) acc[j] += i < units() ? c[j] : 0.f;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) acc[j] *= table_scale(PACKED);
            barrier_wait(sums_empty(slot), slot_phase ^ 1);
            if constexpr (MANY) {
                put(slot, thread, {{acc[0], acc[2]}, {acc[1], acc[3]}});
            } else if (lane() % 4 < COLUMN_TOKENS / 2) {
                const uint32_t own = thread + lane() % 4;  // of token 2 q: a lane has two tokens here, where its sums of a strip are one's
                put(slot, own, {{acc[0], acc[2]}}), put(slot, own + 1, {{acc[1], acc[3]}});
            }
            __syncwarp();
            if (lane() == 0) barrier_arrive(sums_full(slot)), barrier_arrive(address(shared.empty[0]) + stage * 8, warps);
            if (++slot == S::DEPTH) slot = 0, slot_phase ^= 1;
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
            const float2 v = table_pair(p.embedding, p.embedding_packed, id < p.vocab ? id : 0, pair, p.hidden);
            add_relaxed(residual + (size_t)m * p.hidden + 2 * pair, contribution(v.x));
            add_relaxed(residual + (size_t)m * p.hidden + 2 * pair + 1, contribution(v.y));
        }
    }

    // SINGLE: there is one token.
    template <bool SINGLE>
    __device__ void run(uint64_t* residual, uint64_t* next) {
        embed(residual, next);
        uint32_t pairs[WARP_UNITS];  // of the one token's norm
#pragma unroll 1
        for (uint32_t l = 0;; l++) {
            const bool last = l == p.layers;
            const float* weight = last ? p.final_weight : p.layer[l].norm_weight;
            const float* bias = last ? p.final_bias : p.layer[l].norm_bias;
            if (SINGLE) {
                norm_token(pairs, residual, weight, bias, l);
            } else {
                publish_norm(residual, weight, bias, l);
                consumers_sync();  // as with one token: no warp is a layer ahead of another
            }
            if (opaque(l) == p.layers) break;
            if (warp() >= p.owners) continue;  // no units: of use to the norm's barrier alone
            const uint16_t* wide = p.wide + l % TURNS * p.wide_turn;
#pragma unroll 1
            for (const uint32_t* run = shared.runs; *run; run++) {
                const uint32_t slice = run_slice(*run);
                const uint16_t* values = wide + value_at<MANY>(0, slice * p.hidden, 0);
                if constexpr (SINGLE) {
                    if (slice == QKV_UP) x.set_pairs(pairs, own_inputs(), lane());
                    else take_one(values, l);
                } else if (slice == QKV_UP) {
                    norms(l).take(x, tokens);
                } else if constexpr (MANY) {
                    HalfInputs<WARP_UNITS> halves;
                    take(halves, values, l);
                    strips(halves, run_count(*run));
                    continue;
                } else {
                    take(x, values, l);
                }
                strips(x, run_count(*run));
            }
        }
        if (warp() >= p.owners) return;
        Words b;  // lane l holds token l / 4
        if (SINGLE) exchange(b, pairs);
        else fetch<MANY>(b, p, p.final_norm, p.hidden, lane() / 4, tokens, first(), units(), p.layers);
        head(b);
    }
};

}  // namespace
