// batch_planes — gptq_batch on sm_90a of 9 to 16 tokens whose activations are planes of bytes (planes.cuh): what a warp multiplies, and how
// it stores GELU's outputs. The rest is gptq_batch_wgmma.cu's.
//
// A unit's codes less 8, times 16, are signed bytes; wgmma gives sums of 64 of their products with high and low bytes, exactly:
//
//     B of a unit      |token 0 .. 15: 64 high bytes|token 0 .. 15: 64 low bytes|        32 columns
//     sums[token] += scale * step[unit][token] * (256 * high + low)                      f32
//
// Why      a step of 16 texts runs against the power limit: a multiply-add of bytes takes 0.6 pJ, one of f16 1.9, and each value is two.
// Numbers  a weight is scale * (code - 8), not rounded to f16; sums of a unit are exact, and added in f32: relative error 1.4e-7.
//
// While the tensor cores work on one unit, the sums of the one before are scaled and the next is unpacked.
// Loop     inputs are rounded up to stages that fill the ring, so that nothing leaves the loop midway: with an exit ptxas lets each product
//          wait for the one before (C7511, C7514, C7518). What lies beyond is multiplied and not added. Falcon-7B's 71 units are 72.
// Cost     58 instructions a unit, of which 32 scale: 8 sums' bytes joined, made f32, times the step, times the scale and added; gptq_batch
//          of f16 has 55, but reads A from registers four times, for 13 cycles each, where this does twice.
// Measured steps of 16 texts at 128, ms, by turns with f16 on one H200: fastest tenths of 120 1.161, 1.166 for 1.138, 1.139; medians
//          1.192, 1.195 for 1.221, 1.220; slowest tenths 1.219, 1.212 for 1.234, 1.238. 10 texts in bursts 1.147 for 1.120.
// Short    in bursts 2 % longer, which is what was not there in a what-if (1.102 for 1.125): without steps 1.140 for 1.156, with GELU's
//          outputs stored as f16 1.143.
// Tried    Activations by boxes of a tensor map, fastest tenths: planes of a token, of which a box has rows of 64 bytes, 1.160 for 1.121,
//          with boxes of 128, half of which lie across two lines of 128, 1.192 for 1.135. As here, but a barrier whose number ptxas does not
//          know, so that it takes all 16, and divisions for steps: 1.165 for 1.126. Multiply-adds with a predicate instead of a branch around
//          them: copies of sums. Neither, and scales of zero for units that are not there: C7512, as the branch is what holds back other
//          instructions. Products that end before the next begins: the same. 32 texts, without steps: 1.50 for 1.28 by one product of 64
//          columns a unit (and the boxes of 64 bytes), 1.52 by two of 32, one under way while the other is scaled: scaling 16 sums takes more
//          than unpacking f16.
//          Scale times step made before the wait, and the next unit unpacked before it, where what waits is shorter: 1.5 % less where [down |
//          dense] runs behind itself, in bursts and busy, but steps of 1.168 for 1.157, by turns, four times (medians, 10 % and 90 % alike).
#pragma once
#include "batch_wgmma.cuh"
#include "planes.cuh"

#if PEREGRINE_WGMMA

// c = (add ? c : 0) + a * b: 64 rows of signed bytes times 32 columns, 32 inputs.
__device__ __forceinline__ void wgmma_bytes(int32_t (&c)[4][4], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
                 "{%16,%17,%18,%19}, %20, p;}"
                 : "+r"(c[0][0]), "+r"(c[0][1]), "+r"(c[0][2]), "+r"(c[0][3]), "+r"(c[1][0]), "+r"(c[1][1]), "+r"(c[1][2]), "+r"(c[1][3]),
                   "+r"(c[2][0]), "+r"(c[2][1]), "+r"(c[2][2]), "+r"(c[2][3]), "+r"(c[3][0]), "+r"(c[3][1]), "+r"(c[3][2]), "+r"(c[3][3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// Of rows of 64 bytes, 64-byte swizzle.
__device__ __forceinline__ uint64_t bytes_descriptor(uint32_t x) {
    return (uint64_t)(8 * UNIT_INPUTS / 16 | 2u << 30) << 32 | (x / 16 | 1 << 16);
}

// Codes less 8, times 16: those of the high nibbles.
__device__ __forceinline__ uint32_t code_bytes(uint32_t w) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(w), "n"(0xf0f0f0f0u), "r"(0x80808080u));  // (w & mask) ^ 0x80..
    return r;
}

// One unit as a warp has it in registers.
struct PlaneUnit {
    uint4 codes;
    __half2 scale;

    __device__ __forceinline__ void load(const uint8_t* unit, uint32_t lane) {
        codes = *reinterpret_cast<const uint4*>(unit + lane * 16);
        scale = *reinterpret_cast<const __half2*>(unit + UNIT_CODE_BYTES + lane / 4 * 4);
    }
    // The A registers of two k32 steps.
    __device__ __forceinline__ void unpack(uint32_t (&a)[2][4]) const {
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int i = 0; i < 4; i++) a[i / 2][i % 2 * 2] = code_bytes(words[i] << 4), a[i / 2][i % 2 * 2 + 1] = code_bytes(words[i]);
#pragma unroll
        for (int s = 0; s < 2; s++) asm volatile("" : "+r"(a[s][0]), "+r"(a[s][1]), "+r"(a[s][2]), "+r"(a[s][3])::"memory");
    }
};

// sums = this warp's row tile times the tokens, 16 times as much.
template <class Shape, bool NEAR>
__device__ __forceinline__ void multiply_planes(typename Shape::Sums& sums, const Span<Shape>& s, uint8_t* smem, Barriers<Shape>& b) {
    static_assert(Shape::TOGETHER && Shape::X_UNIT == 2 * PLANE_BYTES, "constant addresses");
    constexpr int LAST = Shape::X_STAGES - 1;
    const uint32_t lane = threadIdx.x % 32, stages = s.stages();
    const uint8_t* mine = smem + Shape::W_AT + threadIdx.x / 32 * Shape::W_TILE;
    const float2* steps = reinterpret_cast<const float2*>(smem + Shape::STEPS_AT) + lane % 4;
    const uint64_t x = bytes_descriptor(smem_address(smem));
    // As in multiply().
    const bool arrives = lane < (NEAR && threadIdx.x / 32 < GROUP_TILES ? MOST_GROUPS + 1 - s.groups : 1);
    uint32_t a[2][2][4];
    int32_t acc[2][4][4];
    float2 scale[2], step[2];
    PlaneUnit raw[AHEAD];
    const auto load = [&](int u, int slot) { raw[u % AHEAD].load(mine + slot * Shape::W_STAGE + u * Shape::Units::BYTES, lane); };
    const auto unpack = [&](int u) {
        raw[u % AHEAD].unpack(a[u % 2]);
        scale[u % 2] = __half22float2(raw[u % AHEAD].scale);
    };
    const auto add = [&](int u) {
#pragma unroll
        for (int n = 0; n < 4; n++)
            asm volatile("" : "+r"(acc[u % 2][n][0]), "+r"(acc[u % 2][n][1]), "+r"(acc[u % 2][n][2]), "+r"(acc[u % 2][n][3])::"memory");
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float unit = __int2float_rn(acc[u % 2][n][e] * 256 + acc[u % 2][n + 2][e]) * (e % 2 ? step[n].y : step[n].x);
                sums[n][e] = fmaf(e < 2 ? scale[u % 2].x : scale[u % 2].y, unit, sums[n][e]);
            }
    };
    barrier_wait(&b.w_full[0], 0);
    load(0, 0);
    unpack(0);
#pragma unroll
    for (int u = 1; u <= AHEAD; u++) load(u, 0);
    barrier_wait(&b.x_full[0], 0);
    uint32_t parity = 0;
    for (uint32_t j0 = 0; j0 < stages; j0 += Shape::X_STAGES, parity ^= 1) {
#pragma unroll
        for (int slot = 0; slot < Shape::X_STAGES; slot++) {
            const uint32_t j = j0 + slot, next_parity = parity ^ (slot == LAST);
            const int left = (int)(s.count - j * Shape::UNITS), next_slot = slot == LAST ? 0 : slot + 1;
#pragma unroll
            for (int u = 0; u < Shape::UNITS; u++) {
                const bool ends = u + 1 == Shape::UNITS;
                const uint64_t x_unit = x + (slot * Shape::X_STAGE + u * Shape::X_UNIT) / 16;
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 2; i++) wgmma_bytes(acc[u % 2], a[u % 2][i], x_unit + i * 2, i > 0);
                wgmma_commit();
                if (u > 0 || slot > 0) {
                    wgmma_wait<1>();
                    if (left >= u) add(u + 1);
                }
                unpack(u + 1);
                if (u == 0 && arrives && (slot > 0 || j > 0)) barrier_arrive(&b.x_empty[slot == 0 ? LAST : slot - 1]);
#pragma unroll
                for (int n = 0; n < 2; n++) step[n] = steps[(slot * Shape::UNITS + u) * (PLANE_TOKENS / 2) + n * 4];
                if (u + 2 == Shape::UNITS) {
                    __syncwarp();
                    if (arrives) barrier_arrive(&b.w_empty[slot]);
                }
                if (u + 1 + AHEAD == Shape::UNITS && j + 1 < stages) barrier_wait(&b.w_full[next_slot], next_parity);
                load((u + 1 + AHEAD) % Shape::UNITS, u + 1 + AHEAD < Shape::UNITS ? slot : next_slot);
                if (ends && j + 1 < stages) barrier_wait(&b.x_full[next_slot], next_parity);
                if (ends && slot == LAST) {
                    wgmma_wait<0>();
                    if (left > u) add(u);
                }
            }
        }
    }
}

// GELU of the sums of 64 rows, as planes: by the four warps of a group, whose rows are inputs of one unit. Each finds the largest of its
// own 16 rows; by way of `most` all have those of 64. `staged`: the unit.
__device__ __forceinline__ void store_planes(const GptqMatmulParams& p, uint32_t row, float2 bias, float (&acc)[2][4], uint8_t* staged,
                                             float* most, uint32_t group) {
    const uint32_t lane = threadIdx.x % 32, tile = threadIdx.x / 32 % GROUP_TILES;
    const uint32_t unit = (row - p.y.split_row) / UNIT_INPUTS;
    float2* mine = reinterpret_cast<float2*>(most) + lane % 4;
    float2 top[2];
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] = gelu(acc[n][e] + (e < 2 ? bias.x : bias.y));
        top[n] = make_float2(larger(acc[n][0], acc[n][2]), larger(acc[n][1], acc[n][3]));
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
            top[n].x = larger(top[n].x, __shfl_xor_sync(~0u, top[n].x, step));
            top[n].y = larger(top[n].y, __shfl_xor_sync(~0u, top[n].y, step));
        }
        if (lane < 4) mine[tile * 8 + n * 4] = top[n];
    }
    // By constants: for a number that it does not know ptxas takes all 16 barriers, and other blocks beside this one may find none.
    static_assert(MOST_GROUPS == 3, "a barrier each");
    if (group == 0) asm volatile("bar.sync 2, 128;" ::: "memory");
    else if (group == 1) asm volatile("bar.sync 3, 128;" ::: "memory");
    else asm volatile("bar.sync 4, 128;" ::: "memory");
    uint32_t halves[4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int t = 0; t < (int)GROUP_TILES; t++) {
            const float2 other = mine[t * 8 + n * 4];
            top[n] = make_float2(larger(top[n].x, other.x), larger(top[n].y, other.y));
        }
        const PlaneStep step[2] = {PlaneStep(top[n].x), PlaneStep(top[n].y)};
        int32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; e++) v[e] = step[e % 2](acc[n][e]);
        // Rows g and g + 8 of a token are neighbours: halves of an 8 x 8 matrix, whose transpose has a token's chunk in a row.
        halves[n * 2] = high_bytes(v[0], v[2], v[1], v[3]), halves[n * 2 + 1] = low_bytes(v[0], v[2], v[1], v[3]);
        if (lane < 4 && tile == 0)
            reinterpret_cast<float2*>(plane_steps(p.y.gelu_out, p.y.gelu_stride) + unit * PLANE_TOKENS)[n * 4 + lane] =
                make_float2(step[0].step, step[1].step);
    }
    // Matrix i of the four: tokens 8 (i / 2) .., plane i % 2; lane l names token l % 8 of matrix l / 8.
    const uint32_t place = lane / 8 % 2 * PLANE_BYTES + plane_chunk(lane / 16 * 8 + lane % 8, tile);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem_address(staged) + place), "r"(halves[0]),
                 "r"(halves[1]), "r"(halves[2]), "r"(halves[3]) : "memory");
    __syncwarp();
    const uint32_t own = lane / 16 * PLANE_BYTES + plane_chunk(lane % 16, tile);
    *reinterpret_cast<uint4*>(plane_unit(p.y.gelu_out, unit) + own) = *reinterpret_cast<const uint4*>(staged + own);
}

#endif
