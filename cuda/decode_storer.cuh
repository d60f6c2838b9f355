// decode_storer — adds the consumers' sums of a strip, and sends them to where the blocks that need them poll.
//
// [qkv ; up]       f16 pairs: queries, keys and values as they are, the rest after gelu in the order of the operands
// [down | dense]   contributions to the residual, one atomic a value
// head             logits, f32
//
// It also marks buffers as not ready again, a layer behind, when it has nothing else to do.
#pragma once
#include "decode_norm.cuh"
#include "gelu.cuh"
#include "launch.cuh"

namespace {

// Adds the consumers' sums and sends them where they belong. The warp has all outputs of a strip at once, VALUES of them a lane.
template <bool ZEROS, uint32_t VALUES>
struct Storer {
    using S = Shared<ZEROS>;
    static constexpr uint32_t MOST_TOKENS = 32 * VALUES / UNIT_ROWS;
    static constexpr bool MANY = MOST_TOKENS > COLUMN_TOKENS;  // then there are more than that
    static_assert(MOST_TOKENS <= TOKENS && (!MANY || MOST_TOKENS == TOKENS));
    const Args& p;
    S& shared;
    uint32_t tokens, turn = 0, phase = 0;
    bool broken = false;  // a sum was not a number or beyond the residual's range

    static __device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }
    // What value i is. MANY: as the product's lane has it, rows g, g + 8 of tokens 2 q, 2 q + 1. Else all values are of one token.
    static __device__ __forceinline__ uint32_t token(uint32_t i) { return MANY ? lane() % 4 * 2 + i / 2 : lane() * VALUES / UNIT_ROWS; }
    static __device__ __forceinline__ uint32_t row(uint32_t i) {
        return MANY ? lane() / 4 + i % 2 * 8 : lane() % (UNIT_ROWS / VALUES) + i * (UNIT_ROWS / VALUES);
    }
    static constexpr uint32_t NEIGHBOUR = MANY ? 4 : 1;  // to the lane that has the row of the same pair

    // A warp's sums of a strip.
    __device__ __forceinline__ void load(float (&v)[VALUES], uint32_t warp) const {
        const float2* few = shared.few.sums[turn][warp];  // lane 4 g + q: rows g, g + 8 of token q
        if constexpr (MANY) {
            const float4 sums = shared.many[turn][warp][lane()];
            v[0] = sums.x, v[1] = sums.y, v[2] = sums.z, v[3] = sums.w;
        } else if constexpr (VALUES == 2) {
            const float2 sums = few[row(0) * 4 + token(0)];
            v[0] = sums.x, v[1] = sums.y;
        } else {
            v[0] = reinterpret_cast<const float*>(few)[(row(0) % 8 * 4 + token(0)) * 2 + row(0) / 8];
        }
    }
    // Calls send(sums) for the outputs of the next strip, on all lanes together; tokens that are not there have any. The order of a sum is
    // the same whatever the number of tokens. The slot goes back as soon as the sums are added: consumers wait for it. That the adds stand
    // before the arrival is the compiler's doing, and was looked up in the SASS; see Pitfalls in decode_step.cu.
    template <typename Send>
    __device__ __forceinline__ void take(Send send) {
        barrier_wait(&shared.sums_full[turn], phase);
        float low[VALUES] = {}, high[VALUES] = {};  // of warps that have no units: zeros
#pragma unroll
        for (uint32_t w = 0; w < CONSUMERS; w++) {
            float v[VALUES];
            load(v, w);
#pragma unroll
            for (uint32_t i = 0; i < VALUES; i++) (w < CONSUMERS / 2 ? low : high)[i] += v[i];
        }
#pragma unroll
        for (uint32_t i = 0; i < VALUES; i++) low[i] += high[i];
        __syncwarp();
        if (lane() == 0) barrier_arrive(&shared.sums_empty[turn]);
        if (++turn == S::DEPTH) turn = 0, phase ^= 1;
        send(low);
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
    __device__ __forceinline__ void store_pairs(uint32_t layer, uint32_t tile, const float (&sum)[VALUES]) const {
        const bool odd = row(0) % 2;
        if constexpr (VALUES == 1) {
            const float next = __shfl_down_sync(~0u, sum[0], NEIGHBOUR);
            if (token(0) < tokens && !odd) store(layer, tile, token(0), row(0), as_u32(__floats2half2_rn(sum[0], next)));
        } else {
            constexpr uint32_t HALF = VALUES / 2;
            uint32_t pairs[HALF];
#pragma unroll
            for (uint32_t i = 0; i < HALF; i++) {
                const float own = odd ? sum[HALF + i] : sum[i], other = __shfl_xor_sync(~0u, odd ? sum[i] : sum[HALF + i], NEIGHBOUR);
                pairs[i] = as_u32(__floats2half2_rn(odd ? other : own, odd ? own : other));
            }
#pragma unroll
            for (uint32_t i = 0; i < HALF; i++) {
                const uint32_t own = odd ? HALF + i : i;
                if (token(own) < tokens) store(layer, tile, token(own), row(own) / 2 * 2, pairs[i]);
            }
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
        clear_norms(layer);
        __threadfence();
    }
    // A token's share of the norms, whatever token's it was: any number of them may have been written, however they lie; of one token none
    // is. By 16 bytes: the storers of norms' owners are those that all others wait for.
    __device__ __forceinline__ void clear_norms(uint32_t layer) const {
        const uint32_t owned = norm_owner_of(shared.block), bytes = norm_bytes(p);
        if (owned >= TOKENS || tokens == 1) return;
        for (uint32_t i = lane() * 16; i < bytes; i += 512)
            store_relaxed(norms_of(p, layer) + owned * bytes + i, NO_DIGITS, NO_DIGITS, NO_DIGITS, NO_DIGITS);
    }
    __device__ __forceinline__ void clear_final_norm() const {
        const uint32_t owned = norm_owner_of(shared.block);
        if (owned >= TOKENS) return;
        for (uint32_t i = lane() * 2; i < p.hidden; i += 64) store_relaxed(p.final_norm + owned * p.hidden + i, NOT_READY);
    }
    __device__ __forceinline__ void qkv_up(uint32_t layer) {
        for (uint32_t t = shared.block; t < p.qkv_tiles; t += gridDim.x)
            take([&](float (&sum)[VALUES]) {
                if (t * UNIT_ROWS >= p.qkv_size)
#pragma unroll
                    for (uint32_t i = 0; i < VALUES; i++) sum[i] = gelu(sum[i]);
                store_pairs(layer, t, sum);
            });
        // Here nobody waits for the storer: all wait for all of [qkv ; up].
        if (layer > 0) clear(layer - 1);
        else clear_final_norm();  // of the step before
    }
    __device__ __forceinline__ void down_dense(uint64_t* residual) {
        for_each_down_dense(shared.runs, shared.block, [&](uint32_t tile, uint32_t) {
            take([&](const float (&sum)[VALUES]) {
#pragma unroll
                for (uint32_t i = 0; i < VALUES; i++) {
                    if (token(i) >= tokens) continue;
                    broken |= !(fabsf(sum[i]) < X_LIMIT);
                    add_relaxed(residual + token(i) * p.hidden + tile * UNIT_ROWS + row(i), contribution(sum[i]));
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
            take([&](const float (&sum)[VALUES]) {
#pragma unroll
                for (uint32_t i = 0; i < VALUES; i++)
                    if (token(i) < tokens)  // the sampler will say what is broken
                        p.logits[(size_t)token(i) * p.vocab + t * UNIT_ROWS + row(i)] = broken ? __int_as_float(0x7fffffff) : sum[i];
            });
            if (t == shared.block) clear(p.layers - 1);
        }
    }
};

}  // namespace
