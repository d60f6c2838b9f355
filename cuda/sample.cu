// sample — a token from each row of logits, and the state of the next step.   Reference: src/sampler.rs, src/speculate.rs
// start  — the state of the first.
// Order    Hugging Face's: repetition penalty, no-repeat n-gram, then (temperature > 0) temperature, top_k, top_p, min_p, choice.
// Mapping  grid (32 blocks, rows); of more than 8 rows 8 or 4, with as many parts each. Each warp surveys its share of a part (at 65024
//          one vector of four a thread): the best processed logit, the largest unprocessed one, the sum of exponentials, the lowest id
//          that is no number. The last block of a row to arrive joins the surveys, in the order of a fixed tree (same bits every
//          run), and makes the random choice (choice.cuh). The last row of a slot to arrive walks over its rows, tells the host, and
//          sets up the next step.
// Rows     Row j of a single slot supposes drafts 1 .. j of the step to be right: they are part of its history, of the ids it has
//          seen, and of its position. So all rows choose at once, and what the walk keeps is what decoding one by one gives.
// Arrivals Blocks of a row without a token arrive too: else one might look at step->tokens after the walk has set the next step's.
// Floor    65024 logits from L2: 260 KB, 0.1 us; it is all latency: launch, logits, arrival, surveys, the end of the kernel.
// Measured with a fence more at each arrival and one for the host, launched from the host: greedy 6.9 us; 8 rows with drafts 10.1; 8 slots
//          6.9; the model card's temperature 0.7, top_k 50, top_p 0.95 22.8, 8 slots of it 24.7, 64 slots 52.9; top_p 0.9 of all 106; H200.
//          Of more than 8 rows several parts a block, cold: greedy 10.3, 12.7, 19.1 at 16, 32, 64 slots; 64 slots of the card's 41.3.
// Spills   24 bytes, of more than 8 rows.
// Tried    one block a row: greedy 18 us, the card's settings 73. A fence for the host, so that it may look before the kernel has ended.
#include "choice.cuh"

namespace {

constexpr uint32_t MOST_PART_IDS = 8192;

// What is known of some of a row's logits.
struct Survey {
    uint32_t key;    // ordered, of the largest processed logit
    uint32_t id;     // its lowest id
    float logit;     // that one unprocessed
    float top;       // the largest unprocessed one
    float sum;       // of exp(unprocessed - top)
    uint32_t fault;  // lowest id that is NaN or +infinity
};
__device__ __forceinline__ Survey nothing() { return {ordered(-CUDART_INF_F), NO_ID, -CUDART_INF_F, -CUDART_INF_F, 0.f, NO_ID}; }

// The surveys of a warp's lanes as one, in every lane.
__device__ Survey join_warp(const Survey& s) {
    Survey all;
    all.key = __reduce_max_sync(~0u, s.key);
    all.id = __reduce_min_sync(~0u, s.key == all.key ? s.id : NO_ID);
    all.logit = __shfl_sync(~0u, s.logit, __ffs(__ballot_sync(~0u, s.key == all.key && s.id == all.id)) - 1);
    all.top = unordered(__reduce_max_sync(~0u, ordered(s.top)));
    all.fault = __reduce_min_sync(~0u, s.fault);
    all.sum = s.top > -CUDART_INF_F ? s.sum * expf(s.top - all.top) : 0.f;
#pragma unroll
    for (int step = 16; step; step /= 2) all.sum += __shfl_xor_sync(~0u, all.sum, step);
    return all;
}

// A row's place: the slot's history, of `base` tokens, and the step's `ahead` drafts behind it.
struct Row {
    uint32_t index, slot, base, ahead;
};
__device__ __forceinline__ uint32_t token_at(const SampleParams& p, const Row& r, uint32_t i) {
    return i < r.base ? __ldcg(p.history + (size_t)r.slot * p.history_capacity + i) : p.step->token[1 + i - r.base].id;
}

// Bits of the ids of a block's part of the row.
struct Marks {
    uint32_t seen[MOST_PART_IDS / 32], banned[MOST_PART_IDS / 32];
};
__device__ __forceinline__ void mark(uint32_t* bits, uint32_t id, const Part& part) {
    const uint32_t at = id - part.begin * 4;
    if (id >= part.begin * 4 && id < part.end * 4) atomicOr(bits + at / 32, 1u << (at % 32));
}
__device__ __forceinline__ bool marked(const uint32_t* bits, uint32_t at) { return bits[at / 32] >> (at % 32) & 1; }

// The ids the row has seen, for the repetition penalty, and those that would complete an n-gram of its history a second time.
__device__ void mark_part(const SampleParams& p, const Row& r, const Part& part, Marks& m) {
    const uint32_t n = p.no_repeat_ngram_size, length = r.base + r.ahead;
    const bool penalty = p.repetition_penalty != 1.f;
    if (!penalty && n == 0) return;
    const uint32_t* seen = p.seen + (size_t)r.slot * ((p.vocab + 31) / 32) + part.begin / 8;
    for (uint32_t w = threadIdx.x; w < (part.end - part.begin + 7) / 8; w += BLOCK_THREADS) {
        if (penalty) m.seen[w] = __ldcg(seen + w);
        m.banned[w] = 0;
    }
    __syncthreads();
    if (penalty && threadIdx.x < r.ahead) mark(m.seen, p.step->token[1 + threadIdx.x].id, part);
    for (uint32_t i = threadIdx.x; n && i + n <= length; i += BLOCK_THREADS) {
        bool same = true;
        for (uint32_t j = 0; j + 1 < n && same; j++) same = token_at(p, r, i + j) == token_at(p, r, length - n + 1 + j);
        if (same) mark(m.banned, token_at(p, r, i + n - 1), part);
    }
    __syncthreads();
}

// Surveys this warp's values of the part; leaves the processed ones, divided by the temperature, in scratch, if there is one.
// `next`: this thread's first vector.
__device__ Survey survey(const SampleParams& p, const Row& r, const Part& part, float4 next, const Marks& m) {
    const float4* logits = reinterpret_cast<const float4*>(p.logits + (size_t)r.index * p.vocab);
    float4* scratch = reinterpret_cast<float4*>(p.scratch + (size_t)r.index * p.vocab);
    Survey s = nothing();
    float best = -CUDART_INF_F;
    for (uint32_t i = part.begin + threadIdx.x; i < part.end; i += BLOCK_THREADS) {
        const float raw[4] = {next.x, next.y, next.z, next.w};
        if (i + BLOCK_THREADS < part.end) next = __ldcg(logits + i + BLOCK_THREADS);
        const uint32_t first = (i - part.begin) * 4;
        float kept[4];
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) {
            float v = raw[c];
            if (!(v < CUDART_INF_F)) s.fault = min(s.fault, i * 4 + c);
            if (p.repetition_penalty != 1.f && marked(m.seen, first + c))
                v = v < 0.f ? v * p.repetition_penalty : v / p.repetition_penalty;
            if (p.no_repeat_ngram_size && marked(m.banned, first + c)) v = -CUDART_INF_F;
            v += 0.f;  // -0 becomes 0, which it equals, but not as a key
            if (v > best) best = v, s.id = i * 4 + c, s.logit = raw[c];  // ids rise, so of equal ones the first stays
            kept[c] = v;
        }
        if (p.temperature != 0.f) {
            const float t = p.temperature;
            scratch[i] = make_float4(kept[0] / t, kept[1] / t, kept[2] / t, kept[3] / t);
        }
        const float top = fmaxf(s.top, fmaxf(fmaxf(raw[0], raw[1]), fmaxf(raw[2], raw[3])));
        if (top == -CUDART_INF_F) continue;
        s.sum *= expf(s.top - top);
#pragma unroll
        for (uint32_t c = 0; c < 4; c++) s.sum += expf(raw[c] - top);
        s.top = top;
    }
    s.key = ordered(best);
    return join_warp(s);
}

__device__ __forceinline__ float4* survey_at(const SampleParams& p, uint32_t row, uint32_t i) {
    return reinterpret_cast<float4*>(p.surveys) + ((size_t)row * SURVEYS + i) * (PEREGRINE_SURVEY_FLOATS / 4);
}

// Counts this block in; true in the last one, to which everything the others wrote before is visible then.
__device__ bool last_to_arrive(uint32_t* arrivals, uint32_t wanted) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        // Lighter than two __threadfence: those order more than is needed here.
        uint32_t before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
        last = before == wanted - 1;
        if (last) *arrivals = 0;
    }
    __syncthreads();
    return last;
}

struct Result {
    uint32_t id;
    float logprob;
    uint32_t fault;  // as SampledToken
};

// Joins a row's surveys and chooses its token: the same in all threads.
__device__ Result choose_row(const SampleParams& p, const Row& r) {
    __shared__ Survey joined[BLOCK_WARPS], whole;
    const float4 a = __ldcg(survey_at(p, r.index, threadIdx.x)), b = __ldcg(survey_at(p, r.index, threadIdx.x) + 1);
    const Survey mine = {__float_as_uint(a.x), __float_as_uint(a.y), b.x, a.z, a.w, __float_as_uint(b.y)};
    const Survey warp = join_warp(mine);
    if (threadIdx.x % 32 == 0) joined[threadIdx.x / 32] = warp;
    __syncthreads();
    Survey all = join_warp(threadIdx.x % 32 < BLOCK_WARPS ? joined[threadIdx.x % 32] : nothing());
    uint32_t id = all.id;
    if (p.temperature != 0.f) {
        // Dividing keeps the order, so this is the largest of what the survey left in scratch.
        const auto scaled = [&](uint32_t key) { return unordered(key) / p.temperature; };
        if (threadIdx.x == 0) whole = all;  // out of the registers while the choice, which has barriers, is made
        id = choose(p, p.scratch + (size_t)r.index * p.vocab, r.base + r.ahead, scaled(all.key), ordered(scaled(mine.key))).id;
        all = whole;
        if (id != all.id && id < p.vocab) all.logit = __ldcg(p.logits + (size_t)r.index * p.vocab + id);
    }
    if (id >= p.vocab) id = 0;  // every logit -infinity or NaN: `fault` tells, or id 0
    return {id, all.logit - all.top - logf(all.sum), all.fault == NO_ID ? 0 : all.fault + 1};
}

// Where to read on after the latest earlier occurrence of the last three tokens of history, else of the last two; 0: there is none.
__device__ uint32_t find_repeat(const uint32_t* history, uint32_t length) {
    __shared__ uint32_t found[2];
    if (threadIdx.x < 2) found[threadIdx.x] = 0;
    __syncthreads();
    if (length >= 3) {
        const uint32_t a = __ldcg(history + length - 3), b = __ldcg(history + length - 2), c = __ldcg(history + length - 1);
#pragma unroll 4
        for (uint32_t i = threadIdx.x + 2; i < length; i += BLOCK_THREADS) {
            const uint32_t x = i > 2 ? __ldcg(history + i - 3) : NO_ID;
            if (__ldcg(history + i - 2) != b || __ldcg(history + i - 1) != c) continue;
            atomicMax(found, i);
            if (x == a) atomicMax(found + 1, i);
        }
    }
    __syncthreads();
    return found[1] ? found[1] : found[0];
}

// What the walk over a slot's rows came to.
struct Walk {
    uint32_t emitted, last, done;
};

// Warp 0: keeps the tokens that follow from one another, of `count` rows from `first` on. `mine`: the result of row `own`.
__device__ Walk walk(const SampleParams& p, const DecodeState& s, uint32_t slot, uint32_t first, uint32_t count, uint32_t own,
                     Result mine) {
    const uint32_t lane = threadIdx.x;
    Result r = mine;
    if (lane < count && first + lane != own) {
        const float4 v = __ldcg(survey_at(p, first + lane, 0));
        r = {__float_as_uint(v.x), v.y, __float_as_uint(v.z)};
    }
    bool ends = s.step + lane + 1 >= p.max_new_tokens || s.position + lane + 1 >= p.max_context;
    for (uint32_t i = 0; i < p.stop_count; i++) ends |= r.id == p.stop_ids[i];
    const bool goes_on = lane + 1 < count && !ends && r.id == p.step->token[first + lane + 1].id;
    const uint32_t emitted = __ffs(__ballot_sync(~0u, !goes_on));
    const Walk w = {emitted, __shfl_sync(~0u, r.id, emitted - 1), __shfl_sync(~0u, (uint32_t)ends, emitted - 1)};
    if (lane >= emitted) return w;
    if (s.length + lane < p.history_capacity) p.history[(size_t)slot * p.history_capacity + s.length + lane] = r.id;
    atomicOr(p.seen + (size_t)slot * ((p.vocab + 31) / 32) + r.id / 32, 1u << (r.id % 32));
    SampledToken* out = p.out + (size_t)slot * p.out_capacity + (s.step + lane) % p.out_capacity;
    // The host reads it once the kernel has ended.
    *out = {r.id, r.logprob, r.fault, emitted, count - 1, s.step + lane + 1};
    return w;
}

// The state after the walk over rows `first` .. `first + count`, and the step that follows.
__device__ void advance(const SampleParams& p, DecodeState s, uint32_t slot, uint32_t count, const Walk& w) {
    s.position += w.emitted;
    s.step += w.emitted;
    s.length = min(s.length + w.emitted, p.history_capacity);
    s.done = w.done;
    if (count > 1 && w.emitted > 1) s.draft_wait = 0, s.draft_backoff = 1;
    if (count > 1 && w.emitted == 1) s.draft_wait = s.draft_backoff, s.draft_backoff = min(2 * s.draft_backoff, PEREGRINE_BACKOFF);
    const bool waits = s.draft_wait > 0;
    s.draft_wait -= waits;

    const uint32_t* history = p.history + (size_t)slot * p.history_capacity;
    uint32_t drafts = 0, from = 0;
    if (p.drafts && !s.done && !waits) {
        from = find_repeat(history, s.length);
        // No further than the last position, and no more tokens than are wanted.
        if (from) drafts = min(p.drafts, min(p.max_context - s.position, p.max_new_tokens - s.step) - 1);
    }
    const uint32_t i = threadIdx.x;
    if (i == 0) {
        p.state[slot] = s;
        if (p.slots == 1) p.step->tokens = s.done ? 0 : 1 + drafts;
    }
    if (s.done) return;
    if (p.slots > 1) {
        if (i == 0) p.step->token[slot] = {w.last, s.position, slot, slot};
    } else if (i < p.rows) {
        const bool draft = i > 0 && i <= drafts;
        const uint32_t id = draft ? __ldcg(history + from + (i - 1) % (s.length - from)) : w.last;
        p.step->token[i] = {id, s.position + (draft ? i : 0), 0, draft ? 0 : i};
    }
}

// Two blocks an SM, 264 on an H200: 8 rows of 32 blocks are one wave. Of more rows a block has several parts, of which TOGETHER are asked
// for at once, so that 32 rows of 8 blocks and 64 of 4 are one wave too.
template <int TOGETHER>
__global__ void __launch_bounds__(BLOCK_THREADS, 2) sample_kernel(const __grid_constant__ SampleParams p) {
    overlap_next();
    __shared__ Marks marks;
    __shared__ Walk walked;
    __shared__ DecodeState state;
    const uint32_t row = blockIdx.y, slot = p.slots == 1 ? 0 : row, warp = threadIdx.x / 32;
    const uint32_t parts = PEREGRINE_SAMPLE_BLOCKS / gridDim.x, first_part = blockIdx.x * parts;
    wait_previous();
    float4 values[TOGETHER] = {};
    const auto ask = [&](uint32_t from) {
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const Part part = part_of(from + j, p.vocab);
            const uint32_t i = part.begin + threadIdx.x;
            if (i < part.end) values[j] = __ldcg(reinterpret_cast<const float4*>(p.logits + (size_t)row * p.vocab) + i);
        }
    };
    ask(first_part);  // before it is known whether the row has a token: one latency less
    const uint32_t tokens = min(p.step->tokens, p.rows);
    const DecodeState now = p.state[slot];
    if (threadIdx.x == 0) state = now;  // wanted at the end, and out of the registers until then
    const Row r = {row, slot, min(now.length, p.history_capacity), p.slots == 1 ? row : 0};
    const bool live = row < tokens && !now.done;

    for (uint32_t from = first_part; live && from < first_part + parts; from += TOGETHER) {
        if (from != first_part) ask(from);
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const Part part = part_of(from + j, p.vocab);
            mark_part(p, r, part, marks);
            const Survey s = survey(p, r, part, values[j], marks);
            if (TOGETHER > 1) __syncthreads();  // the marks are the next part's
            if (threadIdx.x % 32 != 0) continue;
            float4* at = survey_at(p, row, (from + j) * BLOCK_WARPS + warp);
            at[0] = make_float4(__uint_as_float(s.key), __uint_as_float(s.id), s.top, s.sum);
            at[1] = make_float4(s.logit, __uint_as_float(s.fault), 0.f, 0.f);
        }
    }
    if (!last_to_arrive(p.arrivals + row, gridDim.x)) return;
    Result result = {};
    if (live) result = choose_row(p, r);
    if (p.slots == 1 && p.rows > 1) {
        if (live && threadIdx.x == 0)
            *survey_at(p, row, 0) = make_float4(__uint_as_float(result.id), result.logprob, __uint_as_float(result.fault), 0.f);
        if (!last_to_arrive(p.arrivals + p.rows, p.rows)) return;
    }
    if (tokens == 0 || now.done) return;

    const uint32_t first = p.slots == 1 ? 0 : row, count = p.slots == 1 ? tokens : 1;
    if (warp == 0) {
        const Walk w = walk(p, state, slot, first, count, row, result);
        if (threadIdx.x == 0) walked = w;
    }
    __syncthreads();
    advance(p, state, slot, count, walked);
}

__global__ void __launch_bounds__(BLOCK_THREADS) start_kernel(const __grid_constant__ StartParams p) {
    overlap_next();
    wait_previous();
    for (uint32_t i = threadIdx.x; i < (p.vocab + 31) / 32; i += BLOCK_THREADS) p.seen[i] = 0;
    for (uint32_t i = threadIdx.x; i < p.out_capacity; i += BLOCK_THREADS) p.out[i].step = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.length; i += BLOCK_THREADS) {
        const uint32_t id = p.history[i];
        if (id < p.vocab) atomicOr(p.seen + id / 32, 1u << (id % 32));
    }
    const uint32_t last = p.history[p.length - 1], i = threadIdx.x;
    if (i == 0) *p.state = {p.position, 0, p.length, 0, 0, 1}, p.step->tokens = p.slots;
    if (p.slots == 1 ? i < PEREGRINE_STEP_TOKENS : i == p.slot) p.step->token[i] = {last, p.position, p.slot, i};
}

}  // namespace

extern "C" int32_t sample(const SampleParams* p, const Launch* l) {
    const uint32_t most_rows = p->slots == 1 ? PEREGRINE_DRAFT_ROWS : PEREGRINE_STEP_TOKENS;
    const bool shape = p->rows > 0 && p->rows <= most_rows && (p->slots == 1 || p->slots == p->rows) && p->vocab > 0 && p->vocab % 4 == 0;
    const bool room = p->out_capacity > 0 && part_vectors(p->vocab) * 4 <= MOST_PART_IDS;
    const bool settings = p->temperature >= 0.f && p->stop_count <= PEREGRINE_STOP_IDS;
    const bool drafts = p->drafts < p->rows && (p->slots == 1 || p->drafts == 0);
    if (!shape || !room || !settings || !drafts) return PEREGRINE_BAD_SHAPE;
    static_assert(PEREGRINE_SAMPLE_BLOCKS % 8 == 0, "parts of a block");
    const uint32_t parts = p->rows <= 8 ? 1 : p->rows <= 32 ? 4 : 8;  // of a block: see sample_kernel
    return launch(parts == 1 ? sample_kernel<1> : sample_kernel<4>, dim3(PEREGRINE_SAMPLE_BLOCKS / parts, p->rows), BLOCK_THREADS, 0, l, *p);
}

extern "C" int32_t start(const StartParams* p, const Launch* l) {
    const bool slots = p->slots <= PEREGRINE_STEP_TOKENS && p->slot < p->slots;
    if (!slots || p->vocab == 0 || p->length == 0) return PEREGRINE_BAD_SHAPE;
    return launch(start_kernel, dim3(1), BLOCK_THREADS, 0, l, *p);
}
