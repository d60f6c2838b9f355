// rope — the rotation of one pair, as `rope` and `attn_decode` both do it: the operations are spelled out, so that a key has the
// same bits whoever rotates it.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

// (a, b) = values i and i + 32 of a head; cs = cos and sin. Gives (a cos - b sin, b cos + a sin).
__device__ __forceinline__ float2 rotate(float a, float b, float2 cs) {
    return make_float2(__fmaf_rn(a, cs.x, -__fmul_rn(b, cs.y)), __fmaf_rn(b, cs.x, __fmul_rn(a, cs.y)));
}
