// decode_words — words in global memory that blocks of one running kernel write for each other. Used by decode_step.
//
// There is no flag and no barrier beside the data: a word tells by its value whether it is there, and who needs it polls for it. That
// takes one trip through L2 from writer to reader; a flag after a fence takes three. All accesses are relaxed, since no word says
// anything about another one.
//
//   two f16 (qkv, MLP, attention)   NOT_READY, a pair of NaN that no conversion gives, until written
//   four digits (norms)             NO_DIGITS, four times -128, until written: digits are -127 to 127
//   residual, u64 a value           63      32 31        8 7      0    contributions are added by atomics: integer sums have no order,
//                                   | integer  | fraction  | count |     so the bits are the same every run
//
// The residual is complete when its count has reached the number of contributions, 1 + layers * slices at most, which is below 256.
// The integer part is good for +-2^31; a contribution beyond X_LIMIT makes all logits NaN, which the sampler reports.
#pragma once
#include "kernels.h"

namespace {

constexpr uint32_t NOT_READY = 0xffffffffu;  // two f16 NaN that no conversion gives
constexpr uint32_t NO_DIGITS = 0x80808080u;  // NO_DIGIT of src/gpu/ops/decode_step.rs
constexpr float X_ONE = 16777216.f;   // residual: steps of 2^-24 above an 8 bit count of contributions
constexpr float X_LIMIT = 1073741824.f;

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
__device__ __forceinline__ uint2 load_relaxed(const uint2* p) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
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
__device__ __forceinline__ void store_relaxed(uint8_t* p, uint32_t v) { store_relaxed(reinterpret_cast<uint16_t*>(p), v); }
__device__ __forceinline__ void store_relaxed(uint8_t* p, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
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
// Integer part and fraction apart: a conversion of 64 bits takes eight times as long as one of 32. The count stays in: it is less than a
// step, and the same for all who read.
__device__ __forceinline__ float residual_value(uint64_t v) {
    return __int2float_rn((int32_t)(v >> 32)) + __uint2float_rn((uint32_t)v) * 0x1p-32f;
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

// Calls `load` until all lanes say that what they loaded is complete; before that `glance` until a few words of it are there, since
// polling for all would be traffic in the way of those who write it.
template <typename Glance, typename Load>
__device__ __forceinline__ void poll(const DecodeStepParams& p, Awaited what, uint32_t layer, Glance glance, Load load) {
    uint32_t tries = 0;
    while (!__all_sync(~0u, glance()) && tries != p.patience) tries++;
    while (!__all_sync(~0u, load()) && tries != p.patience) tries++;
    if (tries == p.patience) give_up(p, what, layer);
}

}  // namespace
