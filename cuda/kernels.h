// The one definition of everything that crosses the language line: parameter structs and launchers of every op.
// build.rs turns this file into Rust with bindgen; it includes <stdint.h> only, so that needs no CUDA headers.
//
// Conventions. f16 is uint16_t bits here. `[m, n] f16` means m rows of n, row-major. Every pointer is device memory unless
// it says host. `tokens` (M) is the number of tokens in a call, all of one timeline, at positions *position, *position + 1 ...
// Values that only the device knows (ids, positions, act-order sources, groups) are clamped to the buffer they index: the host checks
// them where they come from, and a wrong one gives a wrong result, never a stray access.
// A launcher copies *p, enqueues, and returns: 0, a cudaError_t (> 0), or a PEREGRINE_* code (< 0) if the shape is not one the
// kernel is written for. It never prints, waits or allocates. The op's name is the same word in cuda/<op>.cu, in
// src/gpu/ops.rs, in src/reference.rs and in the tests.
#ifndef PEREGRINE_KERNELS_H
#define PEREGRINE_KERNELS_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PEREGRINE_BAD_SHAPE (-1)

#define PEREGRINE_UNIT_ROWS 16     // output rows of a unit
#define PEREGRINE_UNIT_INPUTS 64   // inputs of a unit
#define PEREGRINE_HEAD_DIM 64
#define PEREGRINE_GEMV_TOKENS 8    // most tokens of a gptq_gemv or attn_decode call: the N of mma.m16n8k16
#define PEREGRINE_BATCH_TOKENS 64  // most tokens of a gptq_batch or head call
#define PEREGRINE_SLICE_UNITS 72   // most units of one K slice of a gptq_gemv
#define PEREGRINE_ATTN_CHUNK 256   // keys of one attn_decode block

struct CUstream_st;

// Where a launch goes.
typedef struct Launch {
    struct CUstream_st* stream;
    uint32_t overlap;  // 1: programmatic dependent launch (sm_90): the kernel may start while its predecessor drains
} Launch;

// A quantised matrix [n, k] in units (cuda/units.cuh draws them). unit_bytes = 512 + 32 * scales_per_row * (1 + has_zeros).
typedef struct GptqMatrix {
    const uint8_t* units;     // [n / 16][k / 64][unit_bytes]
    uint32_t n, k;            // n % 16 == 0, k % 64 == 0
    uint32_t scales_per_row;  // 1: one scale for a row's 64 inputs of a unit; 2: one for each 32 (group size 32)
    uint32_t has_zeros;       // 0: every zero point is 8 and none is stored
} GptqMatrix;

// Where a quantised product goes. Exactly one of the three destinations is used:
//   partials != NULL: f32 sums of each K slice apart, to be added by `layernorm` in slice order: partials[slice][m][row]
//   residual != NULL: residual[m, row] += sum + bias, f32
//   else            : rows < split_row to out[m * out_stride + row] as f16, the others through GELU to
//                     gelu_out[m * gelu_stride + row - split_row] as f16
typedef struct GptqOutput {
    const float* bias;   // [n] or NULL; not used with partials (layernorm adds it)
    float* partials;     // [slices, tokens, n]
    float* residual;     // [tokens, n]
    uint16_t* out;
    uint16_t* gelu_out;
    uint32_t out_stride, gelu_stride;
    uint32_t split_row;  // a multiple of 16
} GptqOutput;

// gptq_gemv, gptq_batch, gptq_gemm: y[m, row] = sum_k x[m, k] * W[row, k].
typedef struct GptqMatmulParams {
    GptqMatrix w;
    const uint16_t* x;   // [tokens, x_stride] f16; the first k of each row are used
    uint32_t x_stride;   // a multiple of 8
    uint32_t tokens;
    uint32_t slices;     // K slices: 1, or more with partials
    GptqOutput y;
} GptqMatmulParams;
int32_t gptq_gemv(const GptqMatmulParams* p, const Launch* l);  // tokens <= PEREGRINE_GEMV_TOKENS
int32_t gptq_batch(const GptqMatmulParams* p, const Launch* l); // tokens <= PEREGRINE_BATCH_TOKENS
int32_t gptq_gemm(const GptqMatmulParams* p, const Launch* l);  // any number of tokens

// gptq_repack: AutoGPTQ's tensors to units, into rows [row0, row0 + n) and inputs [input0, input0 + k) of a matrix.
typedef struct GptqRepackParams {
    const uint32_t* qweight;       // [k / 8, n]
    const uint32_t* qzeros;        // [groups, n / 8]; NULL when has_zeros is 0
    const uint16_t* scales;        // [groups, n] f16
    const uint32_t* source_input;  // [k]: which input of the file stands at input i, or NULL for i itself (act-order)
    const uint32_t* group;         // [k / 32]: group of inputs 32 i .. 32 i + 31, after reordering
    uint8_t* units;
    uint32_t n, k, row0, input0, groups;
    uint32_t matrix_k;             // k of the whole matrix
    uint32_t scales_per_row, has_zeros, zero_offset;
} GptqRepackParams;
int32_t gptq_repack(const GptqRepackParams* p, const Launch* l);

// table_repack: a row-major f16 table [rows, k] (embedding, head) to f16 units: [rows / 16][k / 64][2048 bytes].
typedef struct TableRepackParams {
    const uint16_t* table;  // [rows, k]
    uint16_t* units;        // the units of row tile row0 / 16 on
    uint32_t rows, k, row0; // rows, row0 multiples of 16
} TableRepackParams;
int32_t table_repack(const TableRepackParams* p, const Launch* l);

// embed: x[m] = row ids[m] of the table.
typedef struct EmbedParams {
    const uint16_t* units;  // f16 units [vocab / 16][hidden / 64]
    const uint32_t* ids;    // [tokens]; an id >= vocab reads as row 0 (the caller has checked)
    float* x;               // [tokens, hidden]
    uint32_t tokens, hidden, vocab;
} EmbedParams;
int32_t embed(const EmbedParams* p, const Launch* l);

// layernorm: x += sum of the partials (in order) + bias, then out = (x - mean) / sqrt(variance + epsilon) * weight + bias.
typedef struct LayernormParams {
    float* x;                // [tokens, hidden], updated when there are partials
    const float* partials;   // [slices, tokens, hidden] or NULL
    const float* partials_bias;  // [hidden] or NULL
    const float* weight;     // [hidden]
    const float* bias;       // [hidden]
    uint16_t* out;           // [tokens, hidden] f16
    uint32_t tokens, hidden, slices;
    float epsilon;
} LayernormParams;
int32_t layernorm(const LayernormParams* p, const Launch* l);

// permute: out[m, i] = x[m, source[i]] (act-order).
typedef struct PermuteParams {
    const uint16_t* x;       // [tokens, n]
    const uint32_t* source;  // [n]
    uint16_t* out;           // [tokens, n]
    uint32_t tokens, n;
} PermuteParams;
int32_t permute(const PermuteParams* p, const Launch* l);

// rope: rotates the query heads in place and the key into the cache, and copies the value into the cache.
typedef struct RopeParams {
    uint16_t* qkv;            // [tokens, (heads + 2) * 64] f16: queries, key, value
    uint16_t* k_cache;        // [max_context, 64] f16 of this layer
    uint16_t* v_cache;        // [max_context, 64] f16
    const float* table;       // [max_context, 32, 2]: cos and sin of position * theta^(-2i/64)
    const uint32_t* position; // one value: position of the first token
    uint32_t tokens, heads, max_context;
} RopeParams;
int32_t rope(const RopeParams* p, const Launch* l);

// attn_decode, attn_prefill: multi-query causal attention of `tokens` queries on the cache, which holds their keys already.
typedef struct AttnParams {
    const uint16_t* qkv;      // [tokens, (heads + 2) * 64] f16, queries rotated
    const uint16_t* k_cache;  // [max_context, 64] f16
    const uint16_t* v_cache;  // [max_context, 64] f16
    const uint32_t* position;
    uint16_t* out;            // [tokens, out_stride] f16: heads * 64 values a token
    float* partials;          // attn_decode: [tokens, head tiles, chunks, 16, 66] f32
    uint32_t* arrivals;       // attn_decode: [tokens, head tiles], zero before and after
    uint32_t tokens, heads, out_stride, max_context;
} AttnParams;
int32_t attn_decode(const AttnParams* p, const Launch* l);   // tokens <= PEREGRINE_GEMV_TOKENS
int32_t attn_prefill(const AttnParams* p, const Launch* l);

// head: logits[m, v] = sum_k x[m, k] * E[v, k], f32.
typedef struct HeadParams {
    const uint16_t* units;  // f16 units [vocab / 16][hidden / 64]
    const uint16_t* x;      // [tokens, hidden] f16
    float* logits;          // [tokens, vocab]
    uint32_t tokens, hidden, vocab;
} HeadParams;
int32_t head(const HeadParams* p, const Launch* l);  // tokens <= PEREGRINE_BATCH_TOKENS

// What the sampler tells the host about one token; lies in pinned host memory.
typedef struct SampledToken {
    uint32_t id;
    float logprob;   // log softmax of the unprocessed logits
    uint32_t fault;  // 0, or 1 + the lowest id whose logit is NaN or +infinity
    uint32_t step;   // 1 for the first token of a generation; written last
} SampledToken;

// What a decode step reads and the sampler advances. One struct in device memory.
typedef struct DecodeState {
    uint32_t position;  // tokens in the cache = position of the next token to be appended
    uint32_t token;     // that token
    uint32_t step;      // tokens sampled in this generation
    uint32_t length;    // tokens in `history`
} DecodeState;

// sample: one token from one row of logits, by the formulas of src/sampler.rs; advances the state.
typedef struct SampleParams {
    const float* logits;     // [vocab]
    float* scratch;          // [vocab]
    uint32_t* history;       // [history_capacity] every token so far; the new one is appended
    uint32_t* seen;          // [ceil(vocab / 32)] bit set of the history
    DecodeState* state;
    SampledToken* out;       // pinned host memory, [out_capacity]: token of step s is at (s - 1) % out_capacity
    uint32_t vocab, history_capacity, out_capacity;
    uint32_t top_k, no_repeat_ngram_size;
    uint32_t seed_low, seed_high;
    float temperature, top_p, min_p, repetition_penalty;
} SampleParams;
int32_t sample(const SampleParams* p, const Launch* l);

// start: fills `seen` from the history and sets the state for a generation that follows a prefill.
typedef struct StartParams {
    const uint32_t* history;  // [length]
    uint32_t* seen;           // [ceil(vocab / 32)]
    DecodeState* state;
    uint32_t length, position, vocab;
} StartParams;
int32_t start(const StartParams* p, const Launch* l);

// unpack_check: counts the (code, activation) pairs for which a subnormal f16 operand of mma.sync is not exact.
typedef struct UnpackCheckParams {
    uint32_t* mismatches;  // one value, zero before
} UnpackCheckParams;
int32_t unpack_check(const UnpackCheckParams* p, const Launch* l);

// stream_read: reads `bytes` bytes once. For measuring.
typedef struct StreamReadParams {
    const uint8_t* data;
    uint32_t* mix;    // one value: exclusive or of all words, so that the reads are not optimised away
    uint64_t bytes;   // a multiple of 16
    uint32_t blocks;
} StreamReadParams;
int32_t stream_read(const StreamReadParams* p, const Launch* l);

// The text of a launcher's positive code.
const char* launch_error_name(int32_t code);

#ifdef __cplusplus
}
#endif
#endif
