// table — reading single rows of a table in units (embedding); the layouts are drawn in units.cuh and packed.cuh.
#pragma once
#include "packed.cuh"

// Inputs 2 pair and 2 pair + 1 of row `id` of a table [.., hidden].
__device__ __forceinline__ float2 table_pair(const uint8_t* units, bool packed, uint32_t id, uint32_t pair, uint32_t hidden) {
    const uint8_t* tile = units + (size_t)(id / UNIT_ROWS) * (hidden / UNIT_INPUTS) * table_unit_bytes(packed);
    // Unit, k16 step, half of the step (register a2/a3), q.
    const uint32_t u = pair / 32, s = pair / 8 % 4, high_k = pair / 4 % 2, q = pair % 4, high_row = id % UNIT_ROWS / 8;
    const uint8_t* at = tile + (size_t)u * table_unit_bytes(packed) + (id % 8 * 4 + q) * 16;
    const uint32_t i = high_k * 2 + high_row;
    if (!packed) return __half22float2(*reinterpret_cast<const __half2*>(at + s * 512 + i * 4));
    uint32_t words[PACKED_WORDS], a[4];
#pragma unroll
    for (int j = 0; j < PACKED_WORDS; j++) words[j] = *reinterpret_cast<const uint32_t*>(at + j * 512 + s * 4);
    unpack_table(words[0], words[1], words[2], a);
    const float2 v = __half22float2(as_half2(high_k ? (high_row ? a[3] : a[2]) : (high_row ? a[1] : a[0])));
    return make_float2(v.x * PACKED_SCALE, v.y * PACKED_SCALE);
}
