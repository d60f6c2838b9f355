// table — reading single rows of an f16 table in units (embedding); the layout is drawn in units.cuh.
#pragma once
#include "units.cuh"

// Inputs 2 pair and 2 pair + 1 of row `id` of a table [.., hidden].
__device__ __forceinline__ float2 table_pair(const uint8_t* units, uint32_t id, uint32_t pair, uint32_t hidden) {
    const uint8_t* tile = units + (size_t)(id / UNIT_ROWS) * (hidden / UNIT_INPUTS) * TABLE_UNIT_BYTES;
    // Unit, k16 step, half of the step (register a2/a3), q.
    const uint32_t u = pair / 32, s = pair / 8 % 4, high_k = pair / 4 % 2, q = pair % 4, high_row = id % UNIT_ROWS / 8;
    const uint8_t* at = tile + (size_t)u * TABLE_UNIT_BYTES + s * 512 + (id % 8 * 4 + q) * 16 + (high_k * 2 + high_row) * 4;
    return __half22float2(*reinterpret_cast<const __half2*>(at));
}
