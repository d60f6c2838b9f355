// decode_norm — norms of several tokens: the block that computes one publishes it as the operands that all others multiply by.
//
// In a turn, a unit of all tokens is twice 64 bytes a token, digits of v (decode_strip.cuh) in the order of the operands, so that a lane's
// words are one read: of q = 0 .. 3 words 4 q .. 4 q + 3. With one tile they are those of its four steps, with two the high words of two
// steps and then the low ones.
//
//     up to 4 tokens (a tile)   unit | token 0: high, low | token 1: high, low | ...        1024 bytes a unit, of which a warp reads whole
//     5 to 8 (two tiles)        unit | steps 0, 1: token 0, 1, .. 7 | steps 2, 3: ..  |      sectors or whole lines
//
// Behind the units a record of 32 bytes for each warp's inputs of each token, [warp][token]: sums of v of its six units, as the operand of
// subtrahends (decode_strip.cuh) has them, and the step:
//
//     | units 0, 1: f16, rest | units 2, 3: f16, rest | units 4, 5: f16, rest | step, 0 |    lane q reads the q-th of these pairs of words
//
// None of its words can be NO_DIGITS either: sums are over 64, so multiples of 2^-6, where half of NO_DIGITS is -2^-17 as an f16; the step
// is a power of two or no number.
//
// Measured  ms, by turns with norms published as f16, which each reader converts: 2 tokens 0.955 for 0.967, sustained 0.981 for 0.992; 4
//           tokens 0.980 for 0.994, sustained 0.987 for 0.998; with slices as bytes too, 8 tokens of one text 1.009 for 1.070,
//           sustained 1.065 for 1.093; 8 texts 0.975 for 0.977, sustained 1.020 for 1.040. What readers no longer do, the owner does once
//           on the way that all wait for.
// Tried     8 texts, where it took 0.996: polling for the record as well as for a word of the last unit 1.004, for the record alone 1.004,
//           the record asked for again by itself 0.999, written first 1.004. v as f16: 0.992 for 0.994, sustained 1.053 for 1.038.
#pragma once
#include "decode_bytes.cuh"
#include "decode_plan.cuh"
#include "decode_planes.cuh"

namespace {

constexpr uint32_t NORM_UNIT = 2 * TOKENS * UNIT_INPUTS, NORM_RECORD = PEREGRINE_NORM_RECORD;
static_assert(NORM_RECORD == (WARP_UNITS / 2 + 1) * 8 && WARP_UNITS == 6, "three pairs of units, and the step");
template <bool MANY>
constexpr uint32_t NORM_TOKEN = MANY ? UNIT_INPUTS : 2 * UNIT_INPUTS;
template <bool MANY>
constexpr uint32_t NORM_PIECE = MANY ? TOKENS * UNIT_INPUTS : UNIT_INPUTS;

// A token's share of a turn, in bytes.
__device__ __forceinline__ uint32_t norm_bytes(const Args& p) { return 2 * p.hidden + CONSUMERS * NORM_RECORD; }
__device__ __forceinline__ uint8_t* norms_of(const Args& p, uint32_t layer) { return p.norms + layer % TURNS * (TOKENS * norm_bytes(p)); }

// Of the norms after `layer` layers what warp `warp` of consumers multiplies by: its `units` units.
template <bool MANY>
struct WarpNorms {
    const Args& p;
    uint32_t layer, warp, units, lane;

    __device__ __forceinline__ uint8_t* place(uint32_t m, uint32_t piece) const {
        return norms_of(p, layer) + warp * WARP_UNITS * NORM_UNIT + m * NORM_TOKEN<MANY> + piece * NORM_PIECE<MANY>;
    }
    __device__ __forceinline__ uint8_t* record(uint32_t m) const {
        return norms_of(p, layer) + TOKENS * 2 * p.hidden + (warp * TOKENS + m) * NORM_RECORD;
    }

    // pairs[i] is inputs 2 lane, 2 lane + 1 of unit i of token m. Lanes l and l ^ 4 have the four bytes of a word of each plane.
    __device__ __forceinline__ void publish(const uint32_t (&pairs)[WARP_UNITS], uint32_t m) const {
        uint32_t top = 0, words[WARP_UNITS];
        int sum[WARP_UNITS];
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) top = most(top, pairs[i]);
        const uint32_t bits = __reduce_max_sync(~0u, bits_of(top));
        const float share = FixedPoint::inverse_of(bits), step = FixedPoint::step_of(bits, share);
        // If some are no numbers, which the step then is not either, the others must still not be NO_DIGITS.
        const __half2 inverse = __float2half2_rn(isfinite(__uint_as_float(bits)) ? share : 0.f);
        const bool second = lane / 4 % 2;
        const uint32_t pick = second ? 0x3726 : PICK_HIGH;
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++) {
            const uint32_t own = bytes_of<FixedPoint::BASE>(pairs[i], inverse);
            words[i] = __byte_perm(own, __shfl_xor_sync(~0u, own, 4), pick);
            sum[i] = __dp4a((int)own, 0x01010000, __dp4a((int)own, 0x00004040, 0) * (FixedPoint::BASE / 0x40));
        }
        const uint32_t s = lane / 8, word = MANY ? s % 2 + 2 * second : s;
        uint8_t* to = place(m, MANY ? s / 2 : second) + lane % 4 * 16 + word * 4;
#pragma unroll
        for (int i = 0; i < WARP_UNITS; i++)
            if (i < units) store_relaxed(to + i * NORM_UNIT, words[i]);
        uint32_t sums[WARP_UNITS / 2][2];
#pragma unroll
        for (int i = 0; i < WARP_UNITS / 2; i++) {
            float mean[2];
#pragma unroll
            for (int k = 0; k < 2; k++) mean[k] = __int2float_rn(__reduce_add_sync(~0u, sum[2 * i + k])) * (1.f / UNIT_INPUTS);
            FixedPoint::split_sums(sums[i], mean);
        }
        if (lane != 0) return;
        store_relaxed(record(m), sums[0][0], sums[0][1], sums[1][0], sums[1][1]);
        store_relaxed(record(m) + 16, sums[2][0], sums[2][1], __float_as_uint(step), 0);
    }

    // x = these inputs of all tokens; in place of a token or a unit that is not there another one's.
    template <class Inputs>
    __device__ __forceinline__ void take(Inputs& x, uint32_t tokens) const {
        constexpr int PIECES = Inputs::PIECES;
        const uint32_t column = lane / 4, m = min(MANY ? column : column / 2, tokens - 1);
        const uint8_t* from = place(m, MANY ? 0 : column % 2) + lane % 4 * 16;
        const uint2* pair = reinterpret_cast<const uint2*>(record(m)) + lane % 4;
        uint2 known;
        const auto load = [&] {
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
                for (int h = 0; h < PIECES; h++)
                    x.b[i][h] = load_relaxed(reinterpret_cast<const uint4*>(from + min(i, units - 1) * NORM_UNIT + h * NORM_PIECE<MANY>));
            known = load_relaxed(pair);
            // Of two bytes as a number the least there can be, if they are not there.
            uint32_t least = 0;
#pragma unroll
            for (int i = 0; i < WARP_UNITS; i++)
#pragma unroll
                for (int h = 0; h < PIECES; h++)
                    least = __vimin3_s16x2(__vimin3_s16x2(least, x.b[i][h].x, x.b[i][h].y), x.b[i][h].z, x.b[i][h].w);
            const uint32_t none = NO_DIGITS & 0xffff;
            return (least & 0xffff) != none && least >> 16 != none && known.x != NO_DIGITS && known.y != NO_DIGITS;
        };
        const auto glance = [&] { return load_relaxed(reinterpret_cast<const uint32_t*>(from + (units - 1) * NORM_UNIT)) != NO_DIGITS; };
        poll(p, Awaited::WIDE, layer, glance, load);
        x.set_record(known, lane);
    }
};

}  // namespace
