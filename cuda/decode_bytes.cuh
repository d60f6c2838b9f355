// decode_bytes — inputs of up to 4 tokens for decode_strip: v as two signed bytes, columns 2 t (high) and 2 t + 1 (low) of token t.
#pragma once
#include "decode_strip.cuh"

// What a lane holds of a warp's inputs: columns g.
template <int UNITS_>
struct ByteInputs {
    static constexpr int UNITS = UNITS_, TOKENS = 1, PIECES = 1, PARTS = 2, ONE_PIECES = (UNITS * 8 + 31) / 32;
    static constexpr float ONE = 1.f;  // a product of a code 1 and v 1
    static constexpr bool ALL_AHEAD = true;
    using Sums = uint32_t[4];
    uint4 b[UNITS][PIECES];  // the words of a unit's steps
    float step[TOKENS];      // of token q
    uint32_t sums[2];        // see FixedPoint; column 2 t is token t, those between are zeros

    // `b` is f16. The lanes of a token's two columns have one half of each unit, steps 2 p and 2 p + 1 of the column of plane p: the
    // words of k 16 s + 8 h + 2 q, + 1 of unit i, at 2 (s % 2) + h. A lane converts them to both planes, keeps its own and gives the other
    // one away. Units beyond the warp's have codes and scales of zero: their inputs do not matter, as long as they are not larger than the
    // others.
    __device__ __forceinline__ void set(uint32_t top, uint32_t lane) {
        uint32_t bits = bits_of(top);
#pragma unroll
        for (int apart = 1; apart < 8; apart *= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, apart));
        const float share = FixedPoint::inverse_of(bits);
        const __half2 inverse = __float2half2_rn(share);
        const bool low = lane / 4 % 2;
        const uint32_t own = low ? PICK_LOW : PICK_HIGH, other = low ? PICK_HIGH : PICK_LOW;
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint4 v = b[i][0];
            uint32_t words[STEPS];
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const uint32_t even = bytes_of<FixedPoint::BASE>(s ? v.z : v.x, inverse);
                const uint32_t odd = bytes_of<FixedPoint::BASE>(s ? v.w : v.y, inverse);
                keep_plane(words, s, __byte_perm(even, odd, own), __byte_perm(even, odd, other), low);
            }
            b[i][0] = make_uint4(words[0], words[1], words[2], words[3]);
        }
        step[0] = __shfl_sync(~0u, FixedPoint::step_of(bits, share), lane % 4 * 8);
        add_up(lane);
    }
    // `b` is a norm as it is published, see decode_norm.cuh.
    __device__ __forceinline__ void set_record(uint2 record, uint32_t lane) {
        step[0] = __uint_as_float(__shfl_sync(~0u, record.x, lane % 4 * 8 + 3));
        const bool none = lane / 4 % 2 || lane % 4 == 3;
        sums[0] = none ? 0 : record.x, sums[1] = none ? 0 : record.y;
    }
    // As `set`, for one token alone, whose inputs all lanes have a part of. Each is converted once, not by both its columns, and reaches
    // them through `bytes`, the shared address of two planes of UNITS * 64 bytes: high bytes and low ones, in the order of the codes.
    // With more tokens `set` has fewer instructions. The bits are the same.
    //
    // From memory: piece lane + 32 i is as many chunks of eight f16 on, which are s / 2 and q of a unit in this order.
    __device__ __forceinline__ void set_one(const uint4 (&pieces)[ONE_PIECES], uint32_t bytes, uint32_t lane) {
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < ONE_PIECES; i++) top = most(top, pieces[i]);
        const __half2 inverse = scale_of_one(top);
        const uint32_t to = bytes + lane / 8 * 64 + lane % 4 * 16 + lane / 4 % 2 * 8;
#pragma unroll
        for (int i = 0; i < ONE_PIECES; i++) {
            uint32_t high[2], low[2];
            both<FixedPoint::BASE>(pieces[i].x, pieces[i].y, inverse, high[0], low[0]);
            both<FixedPoint::BASE>(pieces[i].z, pieces[i].w, inverse, high[1], low[1]);
            if (lane + 32 * i < UNITS * 8)
                store_shared8(to + i * 256, high[0], high[1]), store_shared8(to + UNITS * 64 + i * 256, low[0], low[1]);
        }
        take_planes(bytes, lane);
    }
    // From the norm: pairs[i] is inputs 2 lane, 2 lane + 1 of unit i. Lanes l and l ^ 4 have the four bytes of a word of each plane.
    __device__ __forceinline__ void set_pairs(const uint32_t (&pairs)[UNITS], uint32_t bytes, uint32_t lane) {
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < UNITS; i++) top = most(top, pairs[i]);
        const __half2 inverse = scale_of_one(top);
        const bool second = lane / 4 % 2;
        const uint32_t pick = second ? 0x3726 : PICK_HIGH;
        const uint32_t to = bytes + second * (UNITS * 64) + lane % 4 * 16 + lane / 8 * 4;
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint32_t own = bytes_of<FixedPoint::BASE>(pairs[i], inverse);
            store_shared4(to + i * 64, __byte_perm(own, __shfl_xor_sync(~0u, own, 4), pick));
        }
        take_planes(bytes, lane);
    }
    // The one token's step, from the largest of each lane's inputs; returns what inputs are multiplied by.
    __device__ __forceinline__ __half2 scale_of_one(uint32_t top) {
        const uint32_t bits = __reduce_max_sync(~0u, bits_of(top));
        const float share = FixedPoint::inverse_of(bits);
        step[0] = FixedPoint::step_of(bits, share);
        return __float2half2_rn(share);
    }
    // Operands from the planes. For the sums a column of the product is a unit, the weights are ones.
    __device__ __forceinline__ void take_planes(uint32_t bytes, uint32_t lane) {
        __syncwarp();
        const uint32_t g = lane / 4, from = bytes + lane % 4 * 16, own = from + min(g, UNITS - 1) * 64;
        const uint4 high = load_shared16(own), low = load_shared16(own + UNITS * 64);
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            b[i][0] = lane < 8 ? load_shared16(from + g * (UNITS * 64) + i * 64) : make_uint4(0, 0, 0, 0);
        }
        const uint32_t ones[4] = {0x01010101, 0, 0x01010101, 0};
        uint32_t h[4] = {}, l[4] = {};
        mma_bytes(h, ones, high.x, high.y), mma_bytes(l, ones, low.x, low.y);
        mma_bytes(h, ones, high.z, high.w), mma_bytes(l, ones, low.z, low.w);
        float mean[2];
#pragma unroll
        for (int e = 0; e < 2; e++) mean[e] = FixedPoint::both_digits(h[e], l[e]) * (1.f / UNIT_INPUTS);
        FixedPoint::split_sums(sums, mean);
        static_assert(UNITS % 2 == 0, "a lane's two units are or are not");
        if (g || lane % 4 * 2 >= UNITS) sums[0] = sums[1] = 0;  // the token is column 0
        __syncwarp();
    }
    // Sums. A product with ones in row i for unit i; transposed it is the operand.
    __device__ __forceinline__ void add_up(uint32_t lane) {
        uint32_t c[2][4] = {};
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const uint32_t ones = lane / 4 == i ? 0x01010101u : 0, a[4] = {ones, 0, ones, 0};
            mma_bytes(c[0], a, b[i][0].x, b[i][0].y), mma_bytes(c[1], a, b[i][0].z, b[i][0].w);
        }
        const float mean[2] = {FixedPoint::both_digits(c[0][0] + c[1][0], c[0][1] + c[1][1]) * (1.f / UNIT_INPUTS), 0.f};
        FixedPoint::split_sums(sums, mean);
        sums[0] = FixedPoint::transpose(sums[0]), sums[1] = FixedPoint::transpose(sums[1]);
    }

    // Half `part` of unit i.
    __device__ __forceinline__ void multiply(Sums& c, const uint4& codes, int i, int part) const {
        uint32_t a[4];
        unpack_bytes(codes, part, a);
        const uint4& v = b[i][0];
        mma_bytes(c, a, part ? v.z : v.x, part ? v.w : v.y);
    }
    static __device__ __forceinline__ float value(const Sums& c, int, int r) { return FixedPoint::both_digits(c[2 * r], c[2 * r + 1]); }
};
