// decode_planes — norms of 5 to 8 tokens for decode_strip: a tile of high bytes of v and one of low ones, column t token t. They come as
// they are multiplied by (decode_norm.cuh).
//
// Cost      cycles of a scheduler with three warps (H200): a product 6.2; with 2, 4, 6 other instructions for each
//               LOP3, SHF, PRMT, IMAD, I2FP   7.0  10.1  14.1     (four alone 8.2)
//               HADD2                         6.8  10.7  15.3     (4.5)
//               HFMA2                         7.5  11.9  16.1     (6.3)
//               FFMA                          7.4   8.6  10.1     (3.6)
//               IMAD.HI                      14.4  22.2  30.0    (15.7)
//               F2FP of e4m3                  7.4  13.8  17.9    (10.8)
//           So they add, to each other and to products. A strip is 231 instructions of a warp: 24 products, 48 masks, 48 to join digits. A
//           multiply-add by mma.sync is 1.9 pJ in f16 and 0.66 of bytes, of which there are two.
// Measured  operands loaded to where they stay, in the order that a product wants them in, 16 bytes fewer spilled: 8 texts at 128 0.992 for
//           0.996, at 1024 1.117 for 1.123, 1 text 0.924 for 0.926.
// Tried     Digits joined in f32, sums beginning at 1.5 * 2^23: 1.028 for 1.014, at 1024 1.137 for 1.082. All codes of a strip loaded ahead:
//           1.024 for 0.994; 2 units side by side, 2 or 4 loaded ahead, 1.012, 1.003.
#pragma once
#include "decode_strip.cuh"

template <int UNITS_>
struct PlaneInputs {
    static constexpr int UNITS = UNITS_, TOKENS = 2, PIECES = 2, PARTS = 2;
    static constexpr float ONE = 1.f;  // a product of a code 1 and v 1
    static constexpr bool ALL_AHEAD = false;
    using Sums = uint32_t[2][4];
    uint4 b[UNITS][PIECES];  // of each half of a unit the high words of its two steps, then the low ones: an operand is two registers
    float step[TOKENS];      // of tokens 2 q, 2 q + 1
    uint32_t sums[2];        // see FixedPoint; column t is token t

    // `b` is a norm as it is published, see decode_norm.cuh.
    __device__ __forceinline__ void set_record(uint2 record, uint32_t lane) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) step[t] = __uint_as_float(__shfl_sync(~0u, record.x, (lane % 4 * 2 + t) * 4 + 3));
        const bool none = lane % 4 == 3;
        sums[0] = none ? 0 : record.x, sums[1] = none ? 0 : record.y;
    }

    // Half `part` of unit i.
    __device__ __forceinline__ void multiply(Sums& c, const uint4& codes, int i, int part) const {
        uint32_t a[4];
        unpack_bytes(codes, part, a);
        const uint4& v = b[i][part];
        mma_bytes(c[0], a, v.x, v.y), mma_bytes(c[1], a, v.z, v.w);
    }
    static __device__ __forceinline__ float value(const Sums& c, int t, int r) {
        return FixedPoint::both_digits(c[0][2 * r + t], c[1][2 * r + t]);
    }
};
