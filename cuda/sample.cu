// sample — one token from one row of logits, and the state of the next step.   Reference: src/sampler.rs
// start  — the state of the first.
// Order    Hugging Face's: repetition penalty, no-repeat n-gram, then (temperature > 0) temperature, top_k, top_p, min_p, choice.
//          Equal logits stand or fall together in top_k and top_p.
// Choice   Gumbel-max: the largest of logit / temperature + g(id), g from Philox4x32-10 at counter (id, position), key = seed. It
//          needs no sum and no order, so it is the same on any device, and later for a token verified by speculation.
// Mapping  one block of 1024 threads; each pass reads 260 KB from L2, 16 bytes a load. top_k and top_p find their threshold by radix
//          select, 8 bits of the ordered logit a pass. Atomics on few bins are slow, so a coarse histogram (top_k) or the mass of the
//          tail (top_p) first leaves only some hundred candidates. Probability mass is summed in integers (2^-40 steps), so that
//          the order of the atomics is without effect: same token every run.
// Tried    match.any to join a warp's atomics on all 65024 logits: 50 us a pass, 263 us for the card's settings.
#include <math_constants.h>
#include "block.cuh"
#include "launch.cuh"

namespace {

constexpr int BINS = 256;
constexpr float MASS_ONE = 1099511627776.f;  // 2^40 steps for a probability weight of 1
constexpr float COARSE_STEP = 0.125f;
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

// Calls f(id, value) for every value, four at a time.
// Loads of a batch are issued together: one SM has nothing else to hide its latency with.
template <typename F>
__device__ __forceinline__ void for_each(const float* values, uint32_t vocab, F f) {
    constexpr int BATCH = 4;
    const float4* vectors = reinterpret_cast<const float4*>(values);
    for (uint32_t base = threadIdx.x; base < vocab / 4; base += BLOCK_THREADS * BATCH) {
        float4 v[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            if (base + j * BLOCK_THREADS < vocab / 4) v[j] = __ldcg(vectors + base + j * BLOCK_THREADS);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const uint32_t i = base + j * BLOCK_THREADS;
            if (i >= vocab / 4) break;
            f(i * 4, v[j].x), f(i * 4 + 1, v[j].y), f(i * 4 + 2, v[j].z), f(i * 4 + 3, v[j].w);
        }
    }
}

// Radix select over the ordered keys of scratch that are >= floor_key, eight bits a pass.
// COUNT: the wanted-th largest key. Otherwise: the smallest key at which the mass, added from the smallest key up, passes `wanted`.
template <bool COUNT>
__device__ uint32_t threshold(const SampleParams& p, float top, uint32_t floor_key, unsigned long long wanted, unsigned long long* bins) {
    uint32_t* counts = reinterpret_cast<uint32_t*>(bins);  // 32-bit atomics are much cheaper
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < BINS) bins[threadIdx.x] = 0;
        __syncthreads();
        for_each(p.scratch, p.vocab, [&](uint32_t, float v) {
            const uint32_t key = ordered(v);
            if (key < floor_key || (key & mask) != prefix) return;
            if (COUNT) atomicAdd(counts + (key >> shift & 255), 1u);
            else atomicAdd(bins + (key >> shift & 255), mass(v, top));
        });
        __syncthreads();
        // Every thread walks the bins: 256 broadcasts, and nobody waits for a result.
        uint32_t digit = COUNT ? 0 : BINS - 1;
        for (int i = 0; i < BINS; i++) {
            const int bin = COUNT ? BINS - 1 - i : i;
            const unsigned long long weight = COUNT ? counts[bin] : bins[bin];
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
    for_each(p.scratch, p.vocab, [&](uint32_t, float v) {
        const uint32_t key = ordered(v);
        if (key >= from && key < below) sum += mass(v, top);
    });
    return block_reduce(sum, shared, [](unsigned long long a, unsigned long long b) { return a + b; });
}

// Smallest key that top_k keeps: the top_k-th largest.
__device__ uint32_t top_k_key(const SampleParams& p, float top, unsigned long long* bins) {
    // Count in steps of 1/8 below the largest: everything from the step on that completes top_k is a candidate.
    uint32_t* counts = reinterpret_cast<uint32_t*>(bins);
    if (threadIdx.x < BINS) counts[threadIdx.x] = 0;
    __syncthreads();
    for_each(p.scratch, p.vocab, [&](uint32_t, float v) {
        if (top - v < BINS * COARSE_STEP) atomicAdd(&counts[(uint32_t)((top - v) * (1.f / COARSE_STEP))], 1);
    });
    __syncthreads();
    uint32_t reached = 0, steps = 0;
    while (steps < BINS && reached < p.top_k) reached += counts[steps++];
    __syncthreads();
    // One step more: the bin was found by a rounded division.
    const uint32_t floor_key = reached < p.top_k ? 0 : ordered(top - (float)(steps + 1) * COARSE_STEP);
    return threshold<true>(p, top, floor_key, p.top_k, bins);
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

__device__ __forceinline__ float penalised(const SampleParams& p, uint32_t id, float v) {
    if (p.repetition_penalty == 1.f || !(p.seen[id / 32] >> (id % 32) & 1)) return v;
    return v < 0.f ? v * p.repetition_penalty : v / p.repetition_penalty;
}

// Bans, in scratch, what would complete an n-gram of the history a second time.
__device__ void ban_repeats(const SampleParams& p, uint32_t length) {
    const uint32_t n = p.no_repeat_ngram_size;
    if (n == 0 || length < n) return;
    for (uint32_t i = threadIdx.x; i + n <= length; i += BLOCK_THREADS) {
        bool same = true;
        for (uint32_t j = 0; j + 1 < n && same; j++) same = p.history[i + j] == p.history[length - n + 1 + j];
        if (same) p.scratch[p.history[i + n - 1]] = -CUDART_INF_F;
    }
    __syncthreads();
}

// What the unprocessed logits are like, and the largest processed one. Leaves the processed logits in scratch, if they are needed.
struct Survey {
    Best best;       // of the processed logits
    float top;       // the largest unprocessed one
    uint32_t fault;  // lowest id that is NaN or +infinity
};
__device__ Survey survey(const SampleParams& p, uint32_t length) {
    Survey s = {{-CUDART_INF_F, 0xffffffffu}, -CUDART_INF_F, 0xffffffffu};
    const bool keep = p.temperature != 0.f || p.no_repeat_ngram_size;  // greedy needs them once
    for_each(p.logits, p.vocab, [&](uint32_t id, float v) {
        if (!(v < CUDART_INF_F)) s.fault = min(s.fault, id);
        s.top = fmaxf(s.top, v);
        const float processed = penalised(p, id, v);
        if (keep) p.scratch[id] = processed;
        s.best = better(s.best, {processed, id});
    });
    if (p.no_repeat_ngram_size) {
        __syncthreads();
        ban_repeats(p, length);
        s.best = {-CUDART_INF_F, 0xffffffffu};
        for_each(p.scratch, p.vocab, [&](uint32_t id, float v) { s.best = better(s.best, {v, id}); });
    }
    return s;
}

__device__ __forceinline__ Survey join(Survey a, Survey b) {
    return {better(a.best, b.best), fmaxf(a.top, b.top), min(a.fault, b.fault)};
}

// The random choice among the processed logits in scratch, which it divides by the temperature. `largest` is the largest.
__device__ Best choose(const SampleParams& p, uint32_t length, float largest, unsigned long long* bins, Best* shared) {
    for (uint32_t i = threadIdx.x; i < p.vocab; i += BLOCK_THREADS) p.scratch[i] = p.scratch[i] / p.temperature;
    __syncthreads();
    const float top = largest / p.temperature;
    uint32_t floor_key = 0;
    if (p.top_k && p.top_k < p.vocab) floor_key = top_k_key(p, top, bins);
    if (p.top_p < 1.f) floor_key = top_p_key(p, top, floor_key, bins);
    Best best = {-CUDART_INF_F, 0xffffffffu};
    for_each(p.scratch, p.vocab, [&](uint32_t id, float v) {
        if (ordered(v) < floor_key || v == -CUDART_INF_F || expf(v - top) < p.min_p) return;
        best = better(best, {v + gumbel(philox(id, length, p.seed_low, p.seed_high)), id});
    });
    return block_reduce(best, shared, better);
}

__global__ void __launch_bounds__(BLOCK_THREADS) sample_kernel(const __grid_constant__ SampleParams p) {
    overlap_next();
    __shared__ unsigned long long bins[BINS];
    __shared__ Best best_shared[BLOCK_WARPS];
    __shared__ Survey survey_shared[BLOCK_WARPS];
    __shared__ float float_shared[BLOCK_WARPS];
    wait_previous();
    const uint32_t length = p.state->length;

    const Survey s = block_reduce(survey(p, length), survey_shared, join);
    float sum = 0.f;
    for_each(p.logits, p.vocab, [&](uint32_t, float v) { sum += expf(v - s.top); });
    sum = block_reduce(sum, float_shared, [](float a, float b) { return a + b; });
    const Best best = p.temperature == 0.f ? s.best : choose(p, length, s.best.score, bins, best_shared);
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
    out->logprob = p.logits[id] - s.top - logf(sum);
    out->fault = s.fault == 0xffffffffu ? 0 : s.fault + 1;
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
    if (p->vocab == 0 || p->vocab % 4 || p->out_capacity == 0 || p->temperature < 0.f) return PEREGRINE_BAD_SHAPE;
    return launch(sample_kernel, dim3(1), BLOCK_THREADS, 0, l, *p);
}

extern "C" int32_t start(const StartParams* p, const Launch* l) {
    if (p->vocab == 0) return PEREGRINE_BAD_SHAPE;
    return launch(start_kernel, dim3(1), BLOCK_THREADS, 0, l, *p);
}
