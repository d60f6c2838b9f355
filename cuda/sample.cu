// sample — one token from one row of logits, and the state of the next step.   Reference: src/sampler.rs
// start  — the state of the first.
// Order    Hugging Face's: repetition penalty, no-repeat n-gram, then (temperature > 0) temperature, top_k, top_p, min_p, choice.
//          Equal logits stand or fall together in top_k and top_p.
// Choice   Gumbel-max: the largest of logit / temperature + g(id), g from Philox4x32-10 at counter (id, position), key = seed. It
//          needs no sum and no order, so it is the same on any device, and later for a token verified by speculation.
// Mapping  one block of 512 threads (1024 would leave 64 registers, which spill); each pass reads 260 KB from L2, 16 bytes a load.
//          top_k and top_p find their threshold in a coarse histogram, then by radix select of one of its bins. Once few are left
//          they are kept in shared memory, where further passes cost little. Probability mass is summed in integers (2^-40 steps),
//          so that the order of the atomics is without effect: same token every run.
// Measured greedy 18 us, the model card's temperature 0.7, top_k 50, top_p 0.95 73 us, top_p 0.9 of all 129 us; H200.
// Tried    radix select of all logits: the first pass's atomics fall on few bins, 0.8 ms for top_p of a bell of logits; match.any to
//          join a warp's atomics: 263 us for the card's settings; no lists in shared memory: 174 us.
#include <math_constants.h>
#include "block.cuh"
#include "launch.cuh"

namespace {

constexpr int BINS = 256;
constexpr float MASS_ONE = 1099511627776.f;  // 2^40 steps for a probability weight of 1
constexpr int LIMB_BITS = 14;  // 131072 limbs fit 32 bits
constexpr float COARSE_STEP = 0.125f;

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
    constexpr int BATCH = 8;
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

// Candidates: all of scratch, or, once few are left, a list in shared memory.
struct Source {
    const float* values;
    const uint32_t* ids;  // NULL: the index is the id
    uint32_t count;
};
template <typename F>
__device__ __forceinline__ void for_each(const Source& s, F f) {
    if (!s.ids) return for_each(s.values, s.count, f);
    for (uint32_t i = threadIdx.x; i < s.count; i += BLOCK_THREADS) f(s.ids[i], s.values[i]);
}

constexpr uint32_t LIST = 2048;
struct List {
    float values[LIST];
    uint32_t ids[LIST];
    uint32_t count;
};

// The candidates that `keep` wants, as a list; in the order of arrival, which nothing depends on. `source` itself if they are too many.
template <typename Keep>
__device__ void gather(const Source& source, List& list, Source& kept, Keep keep) {
    __syncthreads();
    if (threadIdx.x == 0) list.count = 0;
    __syncthreads();
    for_each(source, [&](uint32_t id, float v) {
        if (!keep(v)) return;
        const uint32_t at = atomicAdd(&list.count, 1u);
        if (at < LIST) list.values[at] = v, list.ids[at] = id;
    });
    __syncthreads();
    kept = list.count <= LIST ? Source{list.values, list.ids, list.count} : source;
}

// A coarse histogram of the distance below the largest logit; the last bin takes all that is further away.
__device__ __forceinline__ uint32_t coarse_bin(float v, float top) { return (uint32_t)fminf((top - v) * (1.f / COARSE_STEP), BINS - 1.f); }

// What a bin holds: COUNT: logits; otherwise their mass, in three limbs, since 32-bit atomics are much cheaper than 64-bit ones.
struct Bins {
    uint32_t limb[3][BINS];
    __device__ __forceinline__ void clear() {
        for (uint32_t i = threadIdx.x; i < 3 * BINS; i += BLOCK_THREADS) limb[0][i] = 0;
    }
    template <bool COUNT>
    __device__ __forceinline__ void add(uint32_t bin, float v, float top) {
        if (COUNT) {
            atomicAdd(&limb[0][bin], 1u);
            return;
        }
        const unsigned long long m = mass(v, top);
#pragma unroll
        for (int i = 0; i < 3; i++) atomicAdd(&limb[i][bin], (uint32_t)(m >> (LIMB_BITS * i)) & ((1u << LIMB_BITS) - 1));
    }
    __device__ __forceinline__ unsigned long long weight(uint32_t bin) const {
        return limb[0][bin] + ((unsigned long long)limb[1][bin] << LIMB_BITS) + ((unsigned long long)limb[2][bin] << (2 * LIMB_BITS));
    }
};

// The first bin, from bin 0 up or from the last one down, at which the running weight reaches (COUNT) or passes (mass) `wanted`; the
// last one if none does. Takes the weight before that bin off `wanted`. Every warp finds it by a scan of its own, eight bins a lane.
template <bool COUNT>
__device__ uint32_t find_bin(const Bins& bins, bool downwards, unsigned long long& wanted) {
    constexpr uint32_t OWN = BINS / 32;
    const uint32_t lane = threadIdx.x % 32;
    const auto at = [&](uint32_t i) { return downwards ? BINS - 1 - i : i; };
    unsigned long long sum = 0;
    for (uint32_t j = 0; j < OWN; j++) sum += bins.weight(at(lane * OWN + j));
    unsigned long long before = sum;  // inclusive scan over lanes, then exclusive
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const unsigned long long other = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += other;
    }
    before -= sum;
    uint32_t found = BINS - 1;
    bool hit = false;
    for (uint32_t i = lane * OWN; i < (lane + 1) * OWN && !hit; i++) {
        const unsigned long long own = bins.weight(at(i));
        hit = (COUNT ? before + own >= wanted : before + own > wanted) || i == BINS - 1;
        if (hit) found = i;
        else before += own;
    }
    __syncwarp();
    const uint32_t first = __ffs(__ballot_sync(~0u, hit)) - 1;  // the last lane always hits
    wanted -= __shfl_sync(~0u, before, first);
    return at(__shfl_sync(~0u, found, first));
}

struct Range {
    uint32_t low, high;
};

// Shared memory of the choice.
struct Workspace {
    Bins bins;
    List kept, bin;
    Range ranges[BLOCK_WARPS];
    unsigned long long sums[BLOCK_WARPS];
    Best best[BLOCK_WARPS];
};

// COUNT: the wanted-th largest key. Otherwise: of the keys >= floor_key, the smallest at which the mass, added from the smallest key
// up, passes `wanted`. First the coarse bin it is in, then radix select, eight bits a pass, over that bin alone.
template <bool COUNT>
__device__ uint32_t threshold(const Source& source, float top, uint32_t floor_key, unsigned long long wanted, Workspace& w) {
    Bins& bins = w.bins;
    __syncthreads();
    bins.clear();
    __syncthreads();
    for_each(source, [&](uint32_t, float v) {
        if (ordered(v) >= floor_key) bins.add<COUNT>(coarse_bin(v, top), v, top);
    });
    __syncthreads();
    // Coarse bins count away from the largest logit: top_k starts there, top_p at the far end.
    const uint32_t coarse = find_bin<COUNT>(bins, !COUNT, wanted);
    const auto in = [&](float v) { return ordered(v) >= floor_key && coarse_bin(v, top) == coarse; };
    Source bin;
    gather(source, w.bin, bin, in);

    // Leading bits that all keys of the bin share need no pass.
    Range range = {0xffffffffu, 0};
    for_each(bin, [&](uint32_t, float v) {
        if (in(v)) range = {min(range.low, ordered(v)), max(range.high, ordered(v))};
    });
    range = block_reduce(range, w.ranges, [](Range a, Range b) { return Range{min(a.low, b.low), max(a.high, b.high)}; });
    if (range.low >= range.high) return range.high;
    const int top_bit = 31 - __clz(range.low ^ range.high);
    uint32_t prefix = 0, mask = 0;
    for (int shift = top_bit / 8 * 8; shift >= 0; shift -= 8) {
        if (mask == 0 && shift < 24) mask = 0xffffffffu << (shift + 8), prefix = range.low & mask;
        __syncthreads();
        bins.clear();
        __syncthreads();
        for_each(bin, [&](uint32_t, float v) {
            const uint32_t key = ordered(v);
            if (in(v) && (key & mask) == prefix) bins.add<COUNT>(key >> shift & 255, v, top);
        });
        __syncthreads();
        prefix |= find_bin<COUNT>(bins, COUNT, wanted) << shift;
        mask |= 255u << shift;
    }
    return prefix;
}

// Smallest key that top_p keeps, of those >= floor_key.
__device__ uint32_t top_p_key(const Source& source, float top, uint32_t floor_key, float top_p, Workspace& w) {
    unsigned long long total = 0;
    for_each(source, [&](uint32_t, float v) {
        if (ordered(v) >= floor_key) total += mass(v, top);
    });
    total = block_reduce(total, w.sums, [](unsigned long long a, unsigned long long b) { return a + b; });
    const unsigned long long removed = (unsigned long long)((1.0 - (double)top_p) * (double)total);
    return min(threshold<false>(source, top, floor_key, removed, w), ordered(top));
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
        const uint32_t id = p.history[i + n - 1];
        if (same && id < p.vocab) p.scratch[id] = -CUDART_INF_F;
    }
    __syncthreads();
}

// What the unprocessed logits are like, and the largest processed and scaled one. Leaves the processed logits, divided by the
// temperature, in scratch, if they are needed.
struct Survey {
    Best best;       // of the processed logits, divided by the temperature unless that is 0
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
        if (keep) p.scratch[id] = p.temperature == 0.f ? processed : processed / p.temperature;
        if (processed > s.best.score) s.best = {processed, id};  // ids rise, so of equal ones the first stays
    });
    if (p.no_repeat_ngram_size) {
        __syncthreads();
        ban_repeats(p, length);
        s.best = {-CUDART_INF_F, 0xffffffffu};
        for_each(p.scratch, p.vocab, [&](uint32_t id, float v) {
            if (v > s.best.score) s.best = {v, id};
        });
        // What was found is scaled already; `choose` wants it so in any case.
        return s;
    }
    if (p.temperature != 0.f) s.best.score /= p.temperature;
    return s;
}

__device__ __forceinline__ Survey join(Survey a, Survey b) {
    return {better(a.best, b.best), fmaxf(a.top, b.top), min(a.fault, b.fault)};
}

// The random choice among the processed and scaled logits in scratch, of which `top` is the largest.
__device__ Best choose(const SampleParams& p, uint32_t length, float top) {
    __shared__ Workspace w;
    Source source = {p.scratch, nullptr, p.vocab};
    uint32_t floor_key = 0;
    if (p.top_k && p.top_k < p.vocab) {
        floor_key = threshold<true>(source, top, 0, p.top_k, w);
        const Source all = source;
        gather(all, w.kept, source, [&](float v) { return ordered(v) >= floor_key; });
    }
    if (p.top_p < 1.f) floor_key = top_p_key(source, top, floor_key, p.top_p, w);
    Best best = {-CUDART_INF_F, 0xffffffffu};
    for_each(source, [&](uint32_t id, float v) {
        if (ordered(v) < floor_key || v == -CUDART_INF_F || expf(v - top) < p.min_p) return;
        best = better(best, {v + gumbel(philox(id, length, p.seed_low, p.seed_high)), id});
    });
    return block_reduce(best, w.best, better);
}

__global__ void __launch_bounds__(BLOCK_THREADS) sample_kernel(const __grid_constant__ SampleParams p) {
    overlap_next();
    __shared__ Survey survey_shared[BLOCK_WARPS];
    __shared__ float float_shared[BLOCK_WARPS];
    wait_previous();
    const uint32_t length = min(p.state->length, p.history_capacity);

    const Survey s = block_reduce(survey(p, length), survey_shared, join);
    float sum = 0.f;
    for_each(p.logits, p.vocab, [&](uint32_t, float v) { sum += expf(v - s.top); });
    sum = block_reduce(sum, float_shared, [](float a, float b) { return a + b; });
    const Best best = p.temperature == 0.f ? s.best : choose(p, length, s.best.score);
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
    if (threadIdx.x == 0) *p.state = {1, {}, 0, p.position, 0, 0, 0, p.length};
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
