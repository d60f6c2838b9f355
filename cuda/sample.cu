// sample — one token from one row of logits, and the state of the next step.   Reference: src/sampler.rs
// start  — the state of the first.
// Order    Hugging Face's: repetition penalty, no-repeat n-gram, then (temperature > 0) temperature, top_k, top_p, min_p, choice.
//          Equal logits stand or fall together in top_k and top_p.
// Choice   Gumbel-max: the largest of logit / temperature + g(id), g from Philox4x32-10 at counter (id, position), key = seed. It
//          needs no sum and no order, so it is the same on any device, and later for a token verified by speculation.
// Mapping  one block; each pass reads 260 KB from L2. top_k and top_p find their threshold by radix select, 8 bits of the
//          ordered logit a pass; probability mass is summed in integers (2^-40 steps), so that the order of the atomics is
//          without effect: same token every run.
// Cost     greedy 3 passes, top_k + top_p 12: the step's 1 ms hides none of it, see the header's figure in README.
#include <math_constants.h>
#include "block.cuh"
#include "launch.cuh"

namespace {

constexpr int BINS = 256;
constexpr float MASS_ONE = 1099511627776.f;  // 2^40 steps for a probability weight of 1
constexpr float TAIL = 12.f;  // a logit this far below the largest has a weight of 6e-6

// Larger float, larger key.
__device__ __forceinline__ uint32_t ordered(float v) {
    const uint32_t b = __float_as_uint(v);
    return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u);
}

struct Best {
    float score;
    uint32_t id;
};
// Larger score, then lower id: associative and commutative.
__device__ __forceinline__ Best better(Best a, Best b) {
    return b.score > a.score || (b.score == a.score && b.id < a.id) ? b : a;
}

// Word 0 of Philox4x32-10 (Salmon et al. 2011) at counter (id, position, 0, 0).
__device__ uint32_t philox(uint32_t id, uint32_t position, uint32_t key0, uint32_t key1) {
    uint32_t c0 = id, c1 = position, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ key0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ key1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c0;
}

__device__ __forceinline__ float gumbel(uint32_t random) {
    const float v = fminf(((float)random + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
    return -logf(-log1pf(-v));
}

// Weight of a scaled logit as an integer; `top` is the largest.
__device__ __forceinline__ unsigned long long mass(float v, float top) { return (unsigned long long)(expf(v - top) * MASS_ONE); }

// Radix select over the ordered keys of scratch that are >= floor_key, eight bits a pass.
// COUNT: the wanted-th largest key. Otherwise: the smallest key at which the mass, added from the smallest key up, passes `wanted`.
template <bool COUNT>
__device__ uint32_t threshold(const SampleParams& p, float top, uint32_t floor_key, unsigned long long wanted, unsigned long long* bins) {
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t base = 0; base < p.vocab; base += BLOCK_THREADS) {
            const uint32_t i = base + threadIdx.x;
            const float v = i < p.vocab ? p.scratch[i] : 0.f;
            const uint32_t key = ordered(v);
            const bool in = i < p.vocab && key >= floor_key && (key & mask) == prefix;
            const uint32_t digit = in ? key >> shift & 255 : BINS;
            if (COUNT) {
                // Most logits share a few exponents: one atomic for all lanes of a warp that hit a bin.
                const uint32_t peers = __match_any_sync(~0u, digit);
                if (in && threadIdx.x % 32 == __ffs(peers) - 1) atomicAdd(&bins[digit], (unsigned long long)__popc(peers));
            } else if (in) {
                atomicAdd(&bins[digit], mass(v, top));
            }
        }
        __syncthreads();
        // Every thread walks the bins: 256 broadcasts, and nobody waits for a result.
        uint32_t digit = COUNT ? 0 : BINS - 1;
        for (int i = 0; i < BINS; i++) {
            const int bin = COUNT ? BINS - 1 - i : i;
            const unsigned long long weight = bins[bin];
            if (COUNT ? weight >= wanted : weight > wanted) {
                digit = bin;
                break;
            }
            wanted -= weight;
        }
        prefix |= digit << shift;
        mask |= 255u << shift;
        __syncthreads();
    }
    return prefix;
}

// Mass of the keys in [from, below).
__device__ unsigned long long mass_between(const SampleParams& p, float top, uint32_t from, uint32_t below, unsigned long long* shared) {
    unsigned long long sum = 0;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += BLOCK_THREADS) {
        const float v = p.scratch[i];
        const uint32_t key = ordered(v);
        if (key >= from && key < below) sum += mass(v, top);
    }
    return block_reduce(sum, shared, [](unsigned long long a, unsigned long long b) { return a + b; });
}

// Smallest key that top_p keeps, of those >= floor_key.
__device__ uint32_t top_p_key(const SampleParams& p, float top, uint32_t floor_key, unsigned long long* bins) {
    const unsigned long long total = mass_between(p, top, floor_key, 0xffffffffu, bins);
    unsigned long long removed = (unsigned long long)((1.0 - (double)p.top_p) * (double)total);
    // Thousands of atomics on few bins are slow, so the far tail goes at once where its whole mass may go.
    const uint32_t tail_key = ordered(top - TAIL);
    if (tail_key > floor_key) {
        const unsigned long long tail = mass_between(p, top, floor_key, tail_key, bins);
        if (tail <= removed) floor_key = tail_key, removed -= tail;
    }
    __syncthreads();
    return min(threshold<false>(p, top, floor_key, removed, bins), ordered(top));
}

// Penalises what was seen, bans what would complete an n-gram a second time. Leaves the processed logits in scratch.
__device__ void process(const SampleParams& p, uint32_t length) {
    for (uint32_t i = threadIdx.x; i < p.vocab; i += BLOCK_THREADS) {
        float v = p.logits[i];
        if (p.repetition_penalty != 1.f && p.seen[i / 32] >> (i % 32) & 1) v = v < 0.f ? v * p.repetition_penalty : v / p.repetition_penalty;
        p.scratch[i] = v;
    }
    __syncthreads();
    const uint32_t n = p.no_repeat_ngram_size;
    if (n == 0 || length < n) return;
    for (uint32_t i = threadIdx.x; i + n <= length; i += BLOCK_THREADS) {
        bool same = true;
        for (uint32_t j = 0; j + 1 < n && same; j++) same = p.history[i + j] == p.history[length - n + 1 + j];
        if (same) p.scratch[p.history[i + n - 1]] = -CUDART_INF_F;
    }
    __syncthreads();
}

// The choice among the processed logits in scratch, which it divides by the temperature.
__device__ Best choose(const SampleParams& p, uint32_t length, unsigned long long* bins, Best* best_shared) {
    Best best = {-CUDART_INF_F, 0xffffffffu};
    const bool greedy = p.temperature == 0.f;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += BLOCK_THREADS) {
        const float v = greedy ? p.scratch[i] : p.scratch[i] / p.temperature;
        if (!greedy) p.scratch[i] = v;
        best = better(best, {v, i});
    }
    best = block_reduce(best, best_shared, better);
    if (greedy) return best;

    const float top = best.score;
    uint32_t floor_key = 0;
    if (p.top_k && p.top_k < p.vocab) floor_key = threshold<true>(p, top, 0, p.top_k, bins);
    if (p.top_p < 1.f) floor_key = top_p_key(p, top, floor_key, bins);
    best = {-CUDART_INF_F, 0xffffffffu};
    for (uint32_t i = threadIdx.x; i < p.vocab; i += BLOCK_THREADS) {
        const float v = p.scratch[i];
        if (ordered(v) < floor_key || v == -CUDART_INF_F || expf(v - top) < p.min_p) continue;
        best = better(best, {v + gumbel(philox(i, length, p.seed_low, p.seed_high)), i});
    }
    return block_reduce(best, best_shared, better);
}

__global__ void __launch_bounds__(BLOCK_THREADS) sample_kernel(const __grid_constant__ SampleParams p) {
    overlap_next();
    __shared__ unsigned long long bins[BINS];
    __shared__ Best best_shared[BLOCK_WARPS];
    __shared__ float float_shared[BLOCK_WARPS];
    wait_previous();
    const uint32_t length = p.state->length;

    // The unprocessed logits: largest, lowest id that is NaN or +infinity, log of the sum of exponentials.
    Best top = {-CUDART_INF_F, 0};
    uint32_t fault = 0xffffffffu;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += BLOCK_THREADS) {
        const float v = p.logits[i];
        if (!(v < CUDART_INF_F)) fault = min(fault, i);
        top.score = fmaxf(top.score, v);
    }
    top.score = block_reduce(top.score, float_shared, [](float a, float b) { return fmaxf(a, b); });
    fault = block_reduce(fault, reinterpret_cast<uint32_t*>(float_shared), [](uint32_t a, uint32_t b) { return min(a, b); });
    float sum = 0.f;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += BLOCK_THREADS) sum += expf(p.logits[i] - top.score);
    sum = block_reduce(sum, float_shared, [](float a, float b) { return a + b; });

    process(p, length);
    const Best best = choose(p, length, bins, best_shared);
    if (threadIdx.x != 0) return;
    const uint32_t id = best.id < p.vocab ? best.id : 0;  // every logit -infinity or NaN: `fault` tells, or id 0
    DecodeState* state = p.state;
    const uint32_t step = state->step + 1;
    state->token = id;
    state->position += 1;
    state->step = step;
    if (length < p.history_capacity) {
        p.history[length] = id;
        state->length = length + 1;
    }
    p.seen[id / 32] |= 1u << (id % 32);
    SampledToken* out = p.out + (step - 1) % p.out_capacity;
    out->id = id;
    out->logprob = p.logits[id] - top.score - logf(sum);
    out->fault = fault == 0xffffffffu ? 0 : fault + 1;
    __threadfence_system();
    *reinterpret_cast<volatile uint32_t*>(&out->step) = step;
}

__global__ void __launch_bounds__(BLOCK_THREADS) start_kernel(const __grid_constant__ StartParams p) {
    overlap_next();
    wait_previous();
    for (uint32_t i = threadIdx.x; i < (p.vocab + 31) / 32; i += BLOCK_THREADS) p.seen[i] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.length; i += BLOCK_THREADS) {
        const uint32_t id = p.history[i];
        if (id < p.vocab) atomicOr(p.seen + id / 32, 1u << (id % 32));
    }
    if (threadIdx.x == 0) *p.state = {p.position, 0, 0, p.length};
}

}  // namespace

extern "C" int32_t sample(const SampleParams* p, const Launch* l) {
    if (p->vocab == 0 || p->out_capacity == 0 || p->temperature < 0.f) return PEREGRINE_BAD_SHAPE;
    return launch(sample_kernel, dim3(1), BLOCK_THREADS, 0, l, *p);
}

extern "C" int32_t start(const StartParams* p, const Launch* l) {
    if (p->vocab == 0) return PEREGRINE_BAD_SHAPE;
    return launch(start_kernel, dim3(1), BLOCK_THREADS, 0, l, *p);
}
