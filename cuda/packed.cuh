// packed — f16 tables in units of 12 bits a value, without loss: for values that were bf16 before, as Falcon's are.
//
// Such a value has 8 significant bits. Times 8 as an f16 it is   s 0 eeee mmmmmmm 000   if it is below 1/4; smaller ones than f16's
// normal numbers are whole steps of 2^-24, and times 8 steps of 2^-21: m counts them. So four bits of each half of a register are free,
// and three registers have room for a fourth. Sums of such registers are eight times too large, exactly, which the end undoes.
//
//     word j of step s of lane l at byte 512 j + 16 l + 4 s, each half:
//          15    14    13 .. 3    2 .. 0
//     0    a0    b15   a0         b5 .. 3        a0, a1, a2 of the four A registers with a mask,
//     1    a1    b13   a1         b8 .. 6        b = a3 from what is left
//     2    a2    b12   a2         b11 .. 9
#pragma once
#include "units.cuh"

constexpr int PACKED_UNIT_BYTES = TABLE_UNIT_BYTES / 4 * 3;
constexpr int PACKED_WORDS = 3;  // of a lane and step
constexpr float PACKED_SCALE = 1.f / 8.f;
constexpr uint32_t PACKED_MASK = 0xbff8bff8u;

__host__ __device__ constexpr int table_unit_bytes(bool packed) { return packed ? PACKED_UNIT_BYTES : TABLE_UNIT_BYTES; }
// What sums of a unit's A registers are multiplied by.
__host__ __device__ constexpr float table_scale(bool packed) { return packed ? PACKED_SCALE : 1.f; }

// The four A registers of a step, times 8.
__device__ __forceinline__ void unpack_table(uint32_t v, uint32_t w, uint32_t x, uint32_t a[4]) {
    a[0] = v & PACKED_MASK, a[1] = w & PACKED_MASK, a[2] = x & PACKED_MASK;
    a[3] = (v << 3 & 0x00380038u) | (w << 6 & 0x01c001c0u) | (x << 9 & 0x0e000e00u) | (v << 1 & 0x80008000u) | (w >> 1 & 0x20002000u) |
           (x >> 2 & 0x10001000u);
}

// A lane's words of a unit of a table, packed or f16, and its A registers; those of a packed one are 8 times too large.
template <bool PACKED>
struct TableWords {
    static constexpr int COUNT = PACKED ? PACKED_WORDS : STEPS;
    uint4 v[COUNT];

    __device__ __forceinline__ void load(const uint8_t* unit, uint32_t lane) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) v[i] = *reinterpret_cast<const uint4*>(unit + i * 512 + lane * 16);
    }
    __device__ __forceinline__ void unpack(int s, uint32_t a[4]) const {
        if constexpr (PACKED) unpack_table(word(v[0], s), word(v[1], s), word(v[2], s), a);
        else a[0] = v[s].x, a[1] = v[s].y, a[2] = v[s].z, a[3] = v[s].w;
    }
    static __device__ __forceinline__ uint32_t word(const uint4& v, int s) { return s == 0 ? v.x : s == 1 ? v.y : s == 2 ? v.z : v.w; }
};

// The reverse; false if a value is not of that kind.
__device__ __forceinline__ bool pack_table(const uint32_t a[4], uint32_t words[PACKED_WORDS]) {
    uint32_t b[4], others = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) b[i] = as_u32(__hmul2(as_half2(a[i]), __float2half2_rn(8.f))), others |= b[i] & ~PACKED_MASK;
    words[0] = b[0] | (b[3] >> 3 & 0x00070007u) | (b[3] >> 1 & 0x40004000u);
    words[1] = b[1] | (b[3] >> 6 & 0x00070007u) | (b[3] << 1 & 0x40004000u);
    words[2] = b[2] | (b[3] >> 9 & 0x00070007u) | (b[3] << 2 & 0x40004000u);
    return others == 0;
}
