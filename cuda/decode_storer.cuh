// decode_storer — adds the consumers' sums of a strip, and sends them to where the blocks that need them poll.
//
// [qkv ; up]       f16 pairs: queries, keys and values as they are, the rest after gelu in the order of the operands
// [down | dense]   contributions to the residual, one atomic a value
// head             logits, f32
//
// It also marks buffers as not ready again, a layer behind, when it has nothing else to do.
#pragma once
#include "decode_plan.cuh"
#include "launch.cuh"

namespace {

// Adds the consumers' sums and sends them where they belong.
template <bool ZEROS>
struct Storer {
    using S = Shared<ZEROS>;
    const Args& p;
    S& shared;
    uint32_t tokens, slot = 0, phase = 0;
    bool broken = false;  // a sum was not a number or beyond the residual's range

    static __device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }

    // Calls send(token, row, sum, active) for each output of the next strip, on all lanes together; `active` says whether there is one.
    // The order of the sum is the same whatever the number of tokens.
    template <typename Send>
    __device__ __forceinline__ void take(Send send) {
        barrier_wait(&shared.sums_full[slot], phase);
        for (uint32_t first = 0; first < tokens * UNIT_ROWS; first += 32) {
            const uint32_t m = (first + lane()) / UNIT_ROWS, row = lane() % UNIT_ROWS;
            const float* from = shared.sums[slot][0] + m * SUM_STRIDE + row;
            float low = 0.f, high = 0.f;  // of warps that have no units: zeros
            if (m < tokens) {
#pragma unroll
                for (int w = 0; w < CONSUMERS / 2; w++) low += from[w * TOKENS * SUM_STRIDE];
#pragma unroll
                for (int w = CONSUMERS / 2; w < CONSUMERS; w++) high += from[w * TOKENS * SUM_STRIDE];
            }
            send(m, row, low + high, m < tokens);
        }
        __syncwarp();
        if (lane() == 0) barrier_arrive(&shared.sums_empty[slot]);
        if (++slot == SUM_SLOTS) slot = 0, phase ^= 1;
    }
    // Two neighbouring rows of a tile of [qkv ; up]: queries, keys and values as they are, the rest as `Consumer::load` wants them.
    __device__ __forceinline__ void store(uint32_t layer, uint32_t tile, uint32_t m, uint32_t row, uint32_t pair) const {
        const uint32_t first = tile * UNIT_ROWS;
        if (first < p.qkv_size) {
            store_relaxed(p.qkv + layer % TURNS * p.qkv_turn + m * p.qkv_size + first + row, pair);
        } else {
            const uint32_t r = first - p.qkv_size;
            store_relaxed(p.wide + layer % TURNS * p.wide_turn + m * p.wide_size + r / UNIT_INPUTS * UNIT_INPUTS + r % UNIT_INPUTS / 4 +
                              row % 8 * 8 + row / 8 * 2, pair);
        }
    }
    // Marks what this block has written in `layer`, and its part of attention's output, as not ready. Everybody has read it: their sums
    // of it are in the residual that the layer under way began with. The fence: whoever sees what this block writes from here on
    // sees the marks too.
    __device__ __forceinline__ void clear(uint32_t layer) const {
        for (uint32_t t = blockIdx.x; t < p.qkv_tiles; t += gridDim.x)
            for (uint32_t i = lane(); i < tokens * UNIT_ROWS / 2; i += 32) {
                const uint32_t m = i / (UNIT_ROWS / 2), row = i % (UNIT_ROWS / 2) * 2;
                store(layer, t, m, row, NOT_READY);
                if (t < p.wide_tiles)
                    store_relaxed(p.wide + layer % TURNS * p.wide_turn + m * p.wide_size + p.ffn + t * UNIT_ROWS + row, NOT_READY);
            }
        clear_normed(layer);
        __threadfence();
    }
    __device__ __forceinline__ void clear_normed(uint32_t layer) const {
        const uint32_t owned = norm_owner_of();
        if (owned >= TOKENS) return;
        for (uint32_t i = lane(); i < p.hidden / 2; i += 32) store_relaxed(normed_of(p, layer) + owned * p.hidden + 2 * i, NOT_READY);
    }
    __device__ __forceinline__ void qkv_up(uint32_t layer) {
        for (uint32_t t = blockIdx.x; t < p.qkv_tiles; t += gridDim.x)
            take([&](uint32_t m, uint32_t row, float sum, bool active) {
                if (t * UNIT_ROWS >= p.qkv_size) sum = gelu(sum);
                const float next = __shfl_down_sync(~0u, sum, 1);
                const __half2 pair = __floats2half2_rn(sum, next);
                if (active && row % 2 == 0) store(layer, t, m, row, *reinterpret_cast<const uint32_t*>(&pair));
            });
        // Here nobody waits for the storer: all wait for all of [qkv ; up].
        if (layer > 0) clear(layer - 1);
        else clear_normed(p.layers);  // of the step before
    }
    __device__ __forceinline__ void down_dense(uint64_t* residual) {
        for_each_down_dense(
            p, [](uint32_t) {},
            [&](uint32_t tile, uint32_t) {
                take([&](uint32_t m, uint32_t row, float sum, bool active) {
                    if (!active) return;
                    broken |= !(fabsf(sum) < X_LIMIT);
                    add_relaxed(residual + m * p.hidden + tile * UNIT_ROWS + row, contribution(sum));
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
        for (uint32_t t = blockIdx.x; t < p.head_tiles; t += gridDim.x) {
            take([&](uint32_t m, uint32_t row, float sum, bool active) {
                if (broken) sum = __int_as_float(0x7fffffff);  // the sampler will say so
                if (active) p.logits[(size_t)m * p.vocab + t * UNIT_ROWS + row] = sum;
            });
            if (t == blockIdx.x) clear(p.layers - 1);
        }
    }
};

}  // namespace
