// decode_storer — adds the consumers' sums of a strip, and sends them to where the blocks that need them poll.
//
// [qkv ; up]       f16 pairs: queries, keys and values as they are, the rest after gelu in the order of the operands
// [down | dense]   contributions to the residual, one atomic a value
// head             logits, f32
//
// It also marks buffers as not ready again, a layer behind, when it has nothing else to do.
#pragma once
#include "decode_plan.cuh"
#include "gelu.cuh"
#include "launch.cuh"

namespace {

// Adds the consumers' sums and sends them where they belong. The warp has all outputs of a strip at once, ROWS of them a lane: rows
// row(), row() + STEP, ..., so that what lanes send together lies side by side.
template <bool ZEROS, uint32_t ROWS>
struct Storer {
    using S = Shared<ZEROS>;
    static constexpr uint32_t STEP = UNIT_ROWS / ROWS;    // lanes of a token
    static constexpr uint32_t MOST_TOKENS = 32 / STEP;
    static constexpr bool MANY = MOST_TOKENS > COLUMN_TOKENS;  // then there are more than that
    static_assert(MOST_TOKENS <= TOKENS && STEP % 2 == 0, "neighbouring rows are neighbouring lanes'");
    const Args& p;
    S& shared;
    uint32_t tokens, slot = 0, phase = 0;
    bool broken = false;  // a sum was not a number or beyond the residual's range

    static __device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
    static __device__ __forceinline__ uint32_t token() { return lane() / STEP; }
    static __device__ __forceinline__ uint32_t row() { return lane() % STEP; }

    // Calls send(sums, active) for the outputs of the next strip, on all lanes together; `active` says whether there is such a token. The
    // order of a sum is the same whatever the number of tokens. The slot goes back as soon as the sums are added: consumers wait for
    // it. That the adds stand before the arrival is the compiler's doing, and was looked up in the SASS; see Pitfalls in decode_step.cu.
    template <typename Send>
    __device__ __forceinline__ void take(Send send) {
        barrier_wait(&shared.sums_full[slot], phase);
        const bool active = token() < tokens;
        const float* from = shared.sums[slot][0] + token() * SUM_STRIDE + row();
        float low[ROWS] = {}, high[ROWS] = {};  // of warps that have no units: zeros; of tokens that are not there: anything
#pragma unroll
        for (int w = 0; w < CONSUMERS; w++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) (w < CONSUMERS / 2 ? low : high)[r] += from[w * TOKENS * SUM_STRIDE + r * STEP];
#pragma unroll
        for (int r = 0; r < ROWS; r++) low[r] += high[r];
        __syncwarp();
        if (lane() == 0) barrier_arrive(&shared.sums_empty[slot]);
        if (++slot == SUM_SLOTS) slot = 0, phase ^= 1;
        send(low, active);
    }
    __device__ __forceinline__ void store_wide(uint32_t layer, uint32_t m, uint32_t e, uint32_t pair) const {
        store_relaxed(p.wide + layer % TURNS * p.wide_turn + value_at<MANY>(m, e, p.wide_size), pair);
    }
    // Two neighbouring rows of a tile of [qkv ; up]: queries, keys and values as they are, the rest in the order of `fetch`.
    __device__ __forceinline__ void store(uint32_t layer, uint32_t tile, uint32_t m, uint32_t row, uint32_t pair) const {
        const uint32_t first = tile * UNIT_ROWS;
        if (first < p.qkv_size) {
            store_relaxed(p.qkv + layer % TURNS * p.qkv_turn + m * p.qkv_size + first + row, pair);
        } else {
            const uint32_t r = first - p.qkv_size;
            store_wide(layer, m, r / 32 * 32 + r % 32 / 4 + row % 8 * 4 + row / 8 * 2, pair);
        }
    }
    // The outputs of a tile of [qkv ; up] as pairs of neighbouring rows. Of two lanes, which have such rows, each takes half of the pairs.
    __device__ __forceinline__ void store_pairs(uint32_t layer, uint32_t tile, const float (&sum)[ROWS], bool active) const {
        const bool odd = row() % 2;
        if constexpr (ROWS == 1) {
            const float next = __shfl_down_sync(~0u, sum[0], 1);
            if (active && !odd) store(layer, tile, token(), row(), as_u32(__floats2half2_rn(sum[0], next)));
        } else {
            constexpr uint32_t HALF = ROWS / 2;
            uint32_t pairs[HALF];
#pragma unroll
            for (int r = 0; r < HALF; r++) {
                const float low = sum[r], high = sum[HALF + r];
                const float own = odd ? high : low, other = __shfl_xor_sync(~0u, odd ? low : high, 1);
                pairs[r] = as_u32(__floats2half2_rn(odd ? other : own, odd ? own : other));
            }
#pragma unroll
            for (int r = 0; r < HALF; r++)
                if (active) store(layer, tile, token(), row() / 2 * 2 + (odd ? HALF + r : r) * STEP, pairs[r]);
        }
    }
    // Marks what this block has written in `layer`, and its part of attention's output, as not ready. Everybody has read it: their sums
    // of it are in the residual that the layer under way began with. The fence: whoever sees what this block writes from here on
    // sees the marks too.
    __device__ __forceinline__ void clear(uint32_t layer) const {
        for (uint32_t t = shared.block; t < p.qkv_tiles; t += gridDim.x)
            for (uint32_t i = lane(); i < tokens * UNIT_ROWS / 2; i += 32) {
                const uint32_t m = i / (UNIT_ROWS / 2), row = i % (UNIT_ROWS / 2) * 2;
                store(layer, t, m, row, NOT_READY);
                if (t < p.wide_tiles) store_wide(layer, m, p.ffn + t * UNIT_ROWS + row, NOT_READY);
            }
        clear_normed(layer);
        __threadfence();
    }
    // All that any number of tokens may have written, however it lies.
    __device__ __forceinline__ void clear_normed(uint32_t layer) const {
        const uint32_t owned = norm_owner_of(shared.block);
        if (owned >= TOKENS) return;
        for (uint32_t i = lane(); i < p.hidden / 2; i += 32) store_relaxed(normed_of(p, layer) + owned * p.hidden + 2 * i, NOT_READY);
    }
    __device__ __forceinline__ void qkv_up(uint32_t layer) {
        for (uint32_t t = shared.block; t < p.qkv_tiles; t += gridDim.x)
            take([&](float (&sum)[ROWS], bool active) {
                if (t * UNIT_ROWS >= p.qkv_size)
#pragma unroll
                    for (int r = 0; r < ROWS; r++) sum[r] = gelu(sum[r]);
                store_pairs(layer, t, sum, active);
            });
        // Here nobody waits for the storer: all wait for all of [qkv ; up].
        if (layer > 0) clear(layer - 1);
        else clear_normed(p.layers);  // of the step before
    }
    __device__ __forceinline__ void down_dense(uint64_t* residual) {
        for_each_down_dense(shared.runs, shared.block, [&](uint32_t tile, uint32_t) {
            take([&](const float (&sum)[ROWS], bool active) {
                if (!active) return;
                uint64_t* to = residual + token() * p.hidden + tile * UNIT_ROWS + row();
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    broken |= !(fabsf(sum[r]) < X_LIMIT);
                    add_relaxed(to + r * STEP, contribution(sum[r]));
                }
            });
        });
    }
    // The norm's weights of the layer to come, into L2: they would be waited for.
    __device__ __forceinline__ void prefetch(const float* weight, const float* bias) const {
        const uint32_t lines = (p.hidden * 4 + 127) / 128, i = blockIdx.x + threadIdx.x % 32 * gridDim.x;
        if (i < 2 * lines) asm volatile("prefetch.global.L2 [%0];" ::"l"((i < lines ? weight : bias) + i % lines * 32));
    }
    __device__ void run(uint64_t* residual) {
#pragma unroll 1
        for (uint32_t l = 0; l < p.layers; l++) {
            const bool last = l + 1 == p.layers;
            prefetch(last ? p.final_weight : p.layer[l + 1].norm_weight, last ? p.final_bias : p.layer[l + 1].norm_bias);
            qkv_up(l), down_dense(residual);
        }
        for (uint32_t t = shared.block; t < p.head_tiles; t += gridDim.x) {
            take([&](const float (&sum)[ROWS], bool active) {
                if (!active) return;
                float* to = p.logits + (size_t)token() * p.vocab + t * UNIT_ROWS + row();
#pragma unroll
                for (int r = 0; r < ROWS; r++) to[r * STEP] = broken ? __int_as_float(0x7fffffff) : sum[r];  // the sampler will say so
            });
            if (t == shared.block) clear(p.layers - 1);
        }
    }
};

}  // namespace
