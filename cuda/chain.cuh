// chain — one unit of weights as it is stored, and in registers; before sm_90, times 8 to 72 tokens' inputs of it, in shared memory. Shared
// by gptq_batch and head.
//
// A chain is the products of a run: the inputs of a unit that have one scale. The tensor core adds it up, then it is scaled and added in
// f32. Accumulators c[n][e]: row lane / 4 (e < 2) or lane / 4 + 8, token 8 n + 2 (lane % 4) + e % 2.
#pragma once
#include "packed.cuh"
#include "wgmma.cuh"

constexpr int TOKEN_BYTES = UNIT_INPUTS * 2;  // of a unit's inputs

// 4-bit units: codes become the exact f16 integers code - zero; a run is the inputs that share a scale.
template <int SCALES, bool ZEROS>
struct GptqUnits {
    static constexpr int BYTES = unit_bytes<SCALES, ZEROS>();
    static constexpr int RUNS = SCALES;
    // This lane's part of a unit as it is stored.
    struct Raw {
        uint4 codes;
        __half2 scale[SCALES], zero[SCALES];

        __device__ __forceinline__ void load(const uint8_t* unit, uint32_t lane) {
            load_at(unit + lane * 16, unit + UNIT_CODE_BYTES + lane / 4 * 4);
        }
        // From where the lane's codes and first scales are.
        __device__ __forceinline__ void load_at(const uint8_t* lane_codes, const uint8_t* q) {
            codes = *reinterpret_cast<const uint4*>(lane_codes);
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
                scale[h] = *reinterpret_cast<const __half2*>(q + h * UNIT_SCALE_BYTES);
                zero[h] = ZEROS ? *reinterpret_cast<const __half2*>(q + (SCALES + h) * UNIT_SCALE_BYTES) : __float2half2_rn(8.f);
            }
        }
        // The A registers of the unit as in unpack_scaled, of scales times `factor` twice.
        __device__ __forceinline__ void unpack(uint32_t (&a)[STEPS][4], __half2 factor) const {
            const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
            for (int h = 0; h < SCALES; h++) {
                const __half2 by = __hmul2(__hmul2(scale[h], factor), factor), offset = subnormal_offset<ZEROS>(by, zero[h]);
#pragma unroll
                for (int s = h * STEPS / SCALES; s < (h + 1) * STEPS / SCALES; s++) unpack_scaled<ZEROS>(words[s], by, offset, a[s]);
            }
        }
    };
    uint32_t a[STEPS][4];
    __half2 scale[SCALES];

    __device__ __forceinline__ void unpack(const Raw& raw) {
        const uint32_t words[4] = {raw.codes.x, raw.codes.y, raw.codes.z, raw.codes.w};
#pragma unroll
        for (int h = 0; h < SCALES; h++) {
            scale[h] = raw.scale[h];
            const ExactBias bias(raw.zero[h]);
#pragma unroll
            for (int s = h * STEPS / SCALES; s < (h + 1) * STEPS / SCALES; s++) unpack_exact(words[s], bias, a[s]);
        }
    }
    __device__ __forceinline__ void add(float acc[4], const float chain[4], int run) const {
#pragma unroll
        for (int e = 0; e < 4; e++) acc[e] = fmaf(e < 2 ? __low2float(scale[run]) : __high2float(scale[run]), chain[e], acc[e]);
    }
};

// Units of a table, see TableWords.
template <bool PACKED_>
struct TableUnits {
    static constexpr bool PACKED = PACKED_;
    static constexpr int BYTES = table_unit_bytes(PACKED);
    static constexpr int RUNS = 1;
    struct Raw {
        TableWords<PACKED> words;
        __device__ __forceinline__ void load(const uint8_t* unit, uint32_t lane) { words.load(unit, lane); }
        __device__ __forceinline__ void unpack(uint32_t (&a)[STEPS][4]) const {
#pragma unroll
            for (int s = 0; s < STEPS; s++) words.unpack(s, a[s]);
        }
    };
    uint32_t a[STEPS][4];

    __device__ __forceinline__ void unpack(const Raw& raw) {
#pragma unroll
        for (int s = 0; s < STEPS; s++) raw.words.unpack(s, a[s]);
#pragma unroll
        for (int s = 0; s < STEPS; s++) asm volatile("" : "+r"(a[s][0]), "+r"(a[s][1]), "+r"(a[s][2]), "+r"(a[s][3]));
    }
    // A chain of one unit, then an f32 add: the tensor core's own adds truncate.
    __device__ __forceinline__ void add(float acc[4], const float chain[4], int) const {
#pragma unroll
        for (int e = 0; e < 4; e++) acc[e] += chain[e];
    }
};

#if !PEREGRINE_WGMMA
// acc += run `run` of the unit's inputs times the weights, scaled; `x` is the unit's activations in shared memory.
template <class Weights, int TOKENS>
__device__ __forceinline__ void add_chain(float (&acc)[TOKENS / 8][4], const Weights& w, uint32_t x, int run) {
    constexpr int RUN_STEPS = STEPS / Weights::RUNS;
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) {
        const uint32_t row = x + (n * 8 + lane % 8) * TOKEN_BYTES;
        float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = run * RUN_STEPS; s < (run + 1) * RUN_STEPS; s += 2) {
            uint32_t b[4];
            ldmatrix(b, row + ((lane / 8 + s * 2) ^ (lane % 8)) * 16);
            mma(c, w.a[s], b[0], b[1]);
            mma(c, w.a[s + 1], b[2], b[3]);
        }
        w.add(acc[n], c, run);
        if (Weights::RUNS == 2 && TOKENS >= 64 && n % 3 == 2) __syncwarp();  // holds back loads, for want of registers
    }
}
#endif
