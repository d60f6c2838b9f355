// choice — the random choice among one row's processed logits, by one block.   Reference: src/sampler.rs::kept, gumbel
//
// Choice   Gumbel-max: the largest of logit / temperature + g(id), g from Philox4x32-10 at counter (id, position), key = seed. It
//          needs no sum and no order, so it is the same on any device, and the same for a token verified by speculation.
// top_k    The wanted-th largest of the surveys' largest logits is at most the wanted-th largest logit, so candidates are read from
//          the surveys that reach it alone: some 6000 of 65024 values for k = 50. Then a binary search for the key, a bit a barrier.
// top_p    finds its threshold in a coarse histogram, then by radix select of one of its bins. Probability mass is summed in integers
//          (2^-40 steps), so that the order of the atomics is without effect: same token every run.
// Lists    Once few candidates are left they are kept in shared memory, where further passes cost little.
// Ties     Equal logits stand or fall together in top_k and top_p.
// Tried    radix select of all logits: the first pass's atomics fall on few bins, 0.8 ms for top_p of a bell of logits; match.any to
//          join a warp's atomics: 263 us for the card's settings; no lists in shared memory: 174 us; top_k by histogram of all: 73 us.
#pragma once
#include <math_constants.h>
#include "block.cuh"
#include "launch.cuh"

namespace {

constexpr int BINS = 256;
constexpr float MASS_ONE = 1099511627776.f;  // 2^40 steps for a probability weight of 1
constexpr int LIMB_BITS = 14;  // 131072 limbs fit 32 bits
constexpr float COARSE_STEP = 0.125f;

constexpr uint32_t NO_ID = 0xffffffffu;

// Larger float, larger key; and back.
__device__ __forceinline__ uint32_t ordered(float v) {
    const uint32_t b = __float_as_uint(v);
    return b ^ ((b >> 31) ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float unordered(uint32_t key) {
    return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

// A block's part of a row, in vectors of four: `own` of them from `begin` on, warp w has those at w * 32 + lane, and so on.
constexpr uint32_t SURVEYS = PEREGRINE_SAMPLE_BLOCKS * PEREGRINE_SAMPLE_WARPS;
static_assert(PEREGRINE_SAMPLE_WARPS == BLOCK_WARPS && SURVEYS == BLOCK_THREADS, "a thread for each survey");
struct Part {
    uint32_t begin, end;
};
// Whole words of the bit set of seen ids.
__host__ __device__ __forceinline__ uint32_t part_vectors(uint32_t vocab) {
    return ((vocab / 4 + PEREGRINE_SAMPLE_BLOCKS - 1) / PEREGRINE_SAMPLE_BLOCKS + 7) / 8 * 8;
}
__device__ __forceinline__ Part part_of(uint32_t block, uint32_t vocab) {
    const uint32_t own = part_vectors(vocab);
    return {min(block * own, vocab / 4), min((block + 1) * own, vocab / 4)};
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
struct alignas(16) List {
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
#pragma unroll 2  // all at once would spill
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
    uint32_t keys[BLOCK_WARPS];
    Best best[BLOCK_WARPS];
};

// The largest key that at least `wanted` threads reach with their `key`.
__device__ uint32_t nth_largest(uint32_t key, uint32_t wanted) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1)
        if (__syncthreads_count(key >= (found | bit)) >= wanted) found |= bit;
    return found;
}

// The candidates for the `wanted` largest values of a row, as a list in w.kept; all of the row if they are too many. `key`: of the
// largest value of survey threadIdx.x.
__device__ Source narrow(const float* values, uint32_t vocab, uint32_t key, uint32_t wanted, Workspace& w) {
    const Source all = {values, nullptr, vocab};
    if (wanted > SURVEYS) return all;
    const uint32_t floor_key = nth_largest(key, wanted);
    uint32_t* surveys = w.bin.ids;
    if (threadIdx.x == 0) w.bin.count = w.kept.count = 0;
    __syncthreads();
    if (key >= floor_key) surveys[atomicAdd(&w.bin.count, 1u)] = threadIdx.x;
    __syncthreads();
    const uint32_t count = w.bin.count;
    const float4* vectors = reinterpret_cast<const float4*>(values);
    const auto keep = [&](uint32_t id, float v) {
        if (ordered(v) < floor_key) return;
        const uint32_t at = atomicAdd(&w.kept.count, 1u);
        if (at < LIST) w.kept.values[at] = v, w.kept.ids[at] = id;
    };
    constexpr uint32_t BATCH = 4;  // surveys whose loads are issued together
    for (uint32_t behind = 0; behind < part_vectors(vocab); behind += BLOCK_THREADS) {
        for (uint32_t s = threadIdx.x / 32; s < count; s += BLOCK_WARPS * BATCH) {
            uint32_t at[BATCH];
            float4 v[BATCH];
#pragma unroll
            for (uint32_t j = 0; j < BATCH; j++) {
                const uint32_t survey = surveys[min(s + j * BLOCK_WARPS, count - 1)];
                const Part part = part_of(survey / BLOCK_WARPS, vocab);
                at[j] = part.begin + behind + survey % BLOCK_WARPS * 32 + threadIdx.x % 32;
                if (s + j * BLOCK_WARPS >= count || at[j] >= part.end) at[j] = NO_ID;
                if (at[j] != NO_ID) v[j] = __ldcg(vectors + at[j]);
            }
#pragma unroll
            for (uint32_t j = 0; j < BATCH; j++) {
                if (at[j] == NO_ID) continue;
                const uint32_t id = at[j] * 4;
                keep(id, v[j].x), keep(id + 1, v[j].y), keep(id + 2, v[j].z), keep(id + 3, v[j].w);
            }
        }
    }
    __syncthreads();
    return w.kept.count <= LIST ? Source{w.kept.values, w.kept.ids, w.kept.count} : all;
}

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

// As `threshold<false>`, of at most one candidate a thread.
__device__ uint32_t threshold_of_few(const Source& source, float top, uint32_t floor_key, unsigned long long wanted, Workspace& w) {
    unsigned long long* masses = reinterpret_cast<unsigned long long*>(w.bin.values);
    const uint32_t key = threadIdx.x < source.count ? ordered(source.values[threadIdx.x]) : 0;
    const bool candidate = threadIdx.x < source.count && key >= floor_key;
    __syncthreads();
    masses[threadIdx.x] = candidate ? mass(source.values[threadIdx.x], top) : 0;
    __syncthreads();
    unsigned long long up_to = 0;
#pragma unroll 2  // likewise
    for (uint32_t i = 0; i < source.count; i++) up_to += ordered(source.values[i]) <= key ? masses[i] : 0;
    const uint32_t found = candidate && up_to > wanted ? key : 0xffffffffu;
    return block_reduce(found, w.keys, [](uint32_t a, uint32_t b) { return min(a, b); });
}

// Smallest key that top_p keeps, of those >= floor_key.
__device__ uint32_t top_p_key(const Source& source, float top, uint32_t floor_key, float top_p, Workspace& w) {
    unsigned long long total = 0;
    for_each(source, [&](uint32_t, float v) {
        if (ordered(v) >= floor_key) total += mass(v, top);
    });
    total = block_reduce(total, w.sums, [](unsigned long long a, unsigned long long b) { return a + b; });
    const unsigned long long removed = (unsigned long long)((1.0 - (double)top_p) * (double)total);
    const bool few = source.ids && source.count <= BLOCK_THREADS;
    const uint32_t key = few ? threshold_of_few(source, top, floor_key, removed, w) : threshold<false>(source, top, floor_key, removed, w);
    return min(key, ordered(top));
}

// The key of the k-th largest value, of `source`, which holds them all.
__device__ uint32_t top_k_key(const Source& source, float top, uint32_t k, Workspace& w) {
    if (!source.ids || source.count > BLOCK_THREADS) return threshold<true>(source, top, 0, k, w);
    return nth_largest(threadIdx.x < source.count ? ordered(source.values[threadIdx.x]) : 0, k);
}

// The random choice among the processed and scaled logits `values` [vocab], of which `top` is the largest; `key` as in `narrow`.
__device__ Best choose(const SampleParams& p, const float* values, uint32_t position, float top, uint32_t key) {
    __shared__ Workspace w;
    Source source = {values, nullptr, p.vocab};
    uint32_t floor_key = 0;
    if (p.top_k && p.top_k < p.vocab) {
        source = narrow(values, p.vocab, key, p.top_k, w);
        floor_key = top_k_key(source, top, p.top_k, w);
        if (!source.ids) {
            const Source all = source;
            gather(all, w.kept, source, [&](float v) { return ordered(v) >= floor_key; });
        }
    }
    if (p.top_p < 1.f) floor_key = top_p_key(source, top, floor_key, p.top_p, w);
    Best best = {-CUDART_INF_F, NO_ID};
    for_each(source, [&](uint32_t id, float v) {
        if (ordered(v) < floor_key || v == -CUDART_INF_F || expf(v - top) < p.min_p) return;
        best = better(best, {v + gumbel(philox(id, position, p.seed_low, p.seed_high)), id});
    });
    return block_reduce(best, w.best, better);
}

}  // namespace
