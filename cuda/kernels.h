// The one definition of everything that crosses the language line: parameter structs and launchers of every op; those that ask what a GPU
// is like are in probes.h. build.rs turns both files into Rust with bindgen; they include <stdint.h> only, so that needs no CUDA headers.
//
// Conventions. f16 is uint16_t bits here. `[m, n] f16` means m rows of n, row-major. Every pointer is device memory unless
// it says host. `tokens` (M) is the number of tokens in a call; what each one is stands in a StepToken.
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
#define PEREGRINE_GEMV_TOKENS 8    // most tokens of a gptq_gemv call: the N of mma.m16n8k16
#define PEREGRINE_BATCH_TOKENS 72  // most tokens of a gptq_batch call
#define PEREGRINE_PLANE_TOKENS 16  // most tokens whose activations are planes (cuda/planes.cuh)
#define PEREGRINE_HEAD_TOKENS 64   // most tokens of a head call
#define PEREGRINE_GEMM_TILE 32768  // most sums of a tile of gptq_gemm
#define PEREGRINE_GEMM_GROUPS 3    // most groups of four warps they are spread over
#define PEREGRINE_SLICE_UNITS 72   // most units of one K slice of a gptq_gemv
#define PEREGRINE_STEP_TOKENS 64   // most tokens of a decode step
#define PEREGRINE_STOP_IDS 16      // most ids that end a generation on the device
#define PEREGRINE_SAMPLE_BLOCKS 32 // blocks that survey one row of logits
#define PEREGRINE_SAMPLE_WARPS 16  // warps of each: a survey is a warp's
#define PEREGRINE_SURVEY_FLOATS 8
#define PEREGRINE_DRAFT_ROWS 32    // most rows of a single slot: the walk over them is one warp's
#define PEREGRINE_BACKOFF 64       // most steps without drafts
#define PEREGRINE_ATTN_CHUNK 128   // fewest keys of an item of attention in a decode step, where a token has several
#define PEREGRINE_READY_WORDS 4    // by which attention and the products around it know how far each other are (cuda/ready.cuh)
#define PEREGRINE_PIECE_BYTES 4096 // of memory that are on the same side of L2 (cuda/sides.cuh)
#define PEREGRINE_STEP_SMS 256     // numbers that multiprocessors may have

struct CUstream_st;

// Where a launch goes.
typedef struct Launch {
    struct CUstream_st* stream;
    uint32_t overlap;  // 1: programmatic dependent launch (sm_90): the kernel may start while its predecessor drains
} Launch;

// One token of a call. Tokens of one slot follow each other, at following positions: first .. of the call.
typedef struct StepToken {
    uint32_t id;
    uint32_t position;  // where it is appended
    uint32_t slot;      // sequence: which part of the KV cache
    uint32_t first;     // index in the call of its slot's first token
} StepToken;

// The tokens of the next decode step, as the sampler leaves them. One struct in device memory.
typedef struct Step {
    uint32_t tokens;  // 0: nothing is left to do
    uint32_t reserved[3];
    StepToken token[PEREGRINE_STEP_TOKENS];
} Step;

// A quantised matrix [n, k] in units (cuda/units.cuh draws them). unit_bytes = 512 + 32 * scales_per_row * (1 + has_zeros).
typedef struct GptqMatrix {
    const uint8_t* units;     // [n / 16][k / 64][unit_bytes]
    uint32_t n, k;            // n % 16 == 0, k % 64 == 0
    uint32_t scales_per_row;  // 1: one scale for a row's 64 inputs of a unit; 2: one for each 32 (group size 32)
    uint32_t has_zeros;       // 0: every zero point is 8 and none is stored
    const uint32_t* row_factors;  // [n / 16][8] half2, rows g and g + 8, of row_factors; gptq_gemv does not use them
    // Only gptq_batch uses these:
    uint32_t attn_input;      // the first of the inputs that attention writes, which are the last; 0: it writes none
    const uint8_t* near;      // NULL, or the same by gptq_near, for as many slices as the product has
    uint32_t sides;           // of `near`
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
    uint32_t out_stride, gelu_stride, split_row;  // split_row a multiple of 16
    uint32_t planes;     // 1: gelu_out gets planes, of 9 to 16 tokens, by a gptq_batch whose x is planes
} GptqOutput;

// A product that comes later in the stream.
typedef struct GptqNext {
    GptqMatrix w;  // units NULL: none
    uint32_t slices;
} GptqNext;

// How blocks take their shares of what lies by the sides of L2 (cuda/claims.cuh).
typedef struct SideClaims {
    uint32_t* words;                                  // in two pieces, the first on side 0; zero before and after
    uint32_t side_of[PEREGRINE_STEP_SMS / 32];        // the side of multiprocessor %smid is bit %smid % 32 of word %smid / 32
} SideClaims;

// gptq_gemv, gptq_batch, gptq_gemm: y[m, row] = sum_k x[m, k] * W[row, k].
typedef struct GptqMatmulParams {
    GptqMatrix w;
    const uint16_t* x;   // [tokens, x_stride] f16; the first k of each row are used
    uint32_t x_stride, tokens;  // x_stride a multiple of 8
    uint32_t slices;     // K slices: 1, or more with partials
    uint32_t planes;     // 1: x is planes, for gptq_batch where gptq_batch_planes says so
    GptqOutput y;
    // Only gptq_gemm uses these, to spread a product evenly over the GPU; without them it takes whole tiles:
    float* split_sums;     // [multiprocessors, GEMM_TILE]: sums of tiles that blocks share
    uint32_t* split_flags; // [multiprocessors, GEMM_GROUPS], zero before and after
    // Only gptq_batch uses these: NULL, or the words of the attn_decode in front of it (cuda/ready.cuh), which writes inputs
    // w.attn_input .. k - 1 of x and none before.
    uint32_t* ready;
    uint32_t overtakes;  // with `ready`: 1 if it is launched to wait for what that attn_decode follows (src/gpu/overtake.rs)
    uint32_t* announce;  // NULL, or the words of the attn_decode behind it, which may wait for the rows below split_row alone
    GptqNext next;       // a gptq_batch of as many tokens, whose first weights it brings into L2 before it ends
    SideClaims claims;   // if w.near
} GptqMatmulParams;
int32_t gptq_gemv(const GptqMatmulParams* p, const Launch* l);  // tokens <= PEREGRINE_GEMV_TOKENS
int32_t gptq_batch(const GptqMatmulParams* p, const Launch* l); // tokens <= PEREGRINE_BATCH_TOKENS
int32_t gptq_gemm(const GptqMatmulParams* p, const Launch* l);  // any number of tokens

uint32_t gptq_batch_planes(const GptqMatrix* w);  // 1: gptq_batch of 9 to 16 tokens takes planes, on this GPU; else 0
// gptq_near: a matrix once more, in the order in which gptq_batch reads it, by the sides of L2 (cuda/near.cuh).
typedef struct GptqNearParams {
    GptqMatrix w;
    uint32_t slices;    // of the products
    uint8_t* to;        // [gptq_near_pieces][PEREGRINE_PIECE_BYTES]
    uint32_t sides;     // the bits of an offset whose parity is a piece's side
} GptqNearParams;
uint32_t gptq_near_pieces(const GptqMatrix* w, uint32_t slices); // 0: gptq_batch would not read it, on this GPU
int32_t gptq_near(const GptqNearParams* p, const Launch* l);

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

// to_sides: a matrix in units once more, in the order in which its bytes come from the near side of L2 (cuda/sides.cuh).
typedef struct ToSidesParams {
    const uint8_t* units;  // [tiles][tile_bytes]
    uint8_t* to;           // pairs of pieces, as many as the longer of the two streams of row tiles takes
    uint32_t tiles, tile_bytes;  // tile_bytes a multiple of 16
    uint32_t sides;        // the bits of an offset whose parity is a piece's side
} ToSidesParams;
int32_t to_sides(const ToSidesParams* p, const Launch* l);

// row_factors: what GptqMatrix::row_factors points to. The largest scale of a row, times its factor twice, is in [2^13, 2^15).
typedef struct RowFactorsParams {
    GptqMatrix w;       // its row_factors are not used
    uint32_t* factors;  // [n / 16][8] half2
} RowFactorsParams;
int32_t row_factors(const RowFactorsParams* p, const Launch* l);

// table_repack: a row-major f16 table [rows, k] (embedding, head) to f16 units: [rows / 16][k / 64][2048 bytes].
typedef struct TableRepackParams {
    const uint16_t* table;  // [rows, k]
    uint16_t* units;        // the units of row tile row0 / 16 on
    uint32_t rows, k, row0; // rows, row0 multiples of 16
} TableRepackParams;
int32_t table_repack(const TableRepackParams* p, const Launch* l);

// table_pack: f16 units to packed ones, 1536 bytes each (packed.cuh), for values of 8 significant bits below 1/4.
typedef struct TablePackParams {
    const uint16_t* units;  // [count][1024] f16
    uint16_t* packed;       // [count][768]; of no use if there is a misfit
    uint32_t* misfit;       // set to 1 if a value has too many bits, else left alone
    uint32_t count;
} TablePackParams;
int32_t table_pack(const TablePackParams* p, const Launch* l);

// embed: x[m] = row token[m].id of the table.
typedef struct EmbedParams {
    const uint16_t* units;  // units [vocab / 16][hidden / 64]: f16, or packed by table_pack
    const StepToken* token; // [tokens]; an id >= vocab reads as row 0 (the caller has checked)
    float* x;               // [tokens, hidden]
    uint32_t tokens, hidden, vocab, packed;
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
    uint32_t tokens, hidden, slices, planes;  // planes 1: out gets planes, of up to 16 tokens on sm_90; hidden % 64 == 0
    float epsilon;
} LayernormParams;
int32_t layernorm(const LayernormParams* p, const Launch* l);

// permute: out[m, i] = x[m, source[i]] (act-order).
typedef struct PermuteParams {
    const uint16_t* x;       // [tokens, n]
    const uint32_t* source;  // [n]
    uint16_t* out;           // [tokens, n]
    uint32_t tokens, n;      // n % 8 == 0
} PermuteParams;
int32_t permute(const PermuteParams* p, const Launch* l);

// rope: rotates the query heads in place and the key into the cache, and copies the value into the cache. For prompts; attn_decode
// does it itself.
typedef struct RopeParams {
    uint16_t* qkv;            // [tokens, (heads + 2) * 64] f16: queries, key, value
    uint16_t* k_cache;        // [slots, max_context, 64] f16 of this layer
    uint16_t* v_cache;        // [slots, max_context, 64] f16
    const float* table;       // [max_context, 32, 2]: cos and sin of position * theta^(-2i/64)
    const StepToken* token;   // [tokens]
    uint32_t tokens, heads, slots, max_context;
} RopeParams;
int32_t rope(const RopeParams* p, const Launch* l);

// attn_decode: multi-query causal attention of few tokens. Rotates queries and keys, appends key and value of each token to its slot's
// cache, and attends to the slot's cache and the tokens of the slot in this call.
typedef struct AttnDecodeParams {
    const uint16_t* qkv;      // [tokens, (heads + 2) * 64] f16: queries, key, value, not rotated
    uint16_t* k_cache;        // [slots, max_context, 64] f16, rotated keys
    uint16_t* v_cache;        // [slots, max_context, 64] f16
    const float* table;       // [max_context, 32, 2]: cos and sin
    const StepToken* token;   // [tokens]
    uint16_t* out;            // [tokens, out_stride] f16: heads * 64 values a token
    float* partials;          // [tokens, head tiles, chunks of max_context, 9, 32 lanes, 4] f32
    uint32_t* arrivals;       // [tokens, head tiles], and PEREGRINE_READY_WORDS if awaited; zero before and after
    uint32_t tokens, heads, out_stride, slots, max_context;
    uint32_t planes, first;   // planes 1: out is the begin of planes, and heads are inputs `first`, a multiple of 64, on of each token
    uint32_t reach;           // every token's position is said to be less; longer contexts take more time, no more
    // 1: the gptq_batch behind it awaits it, and it may await the one in front, by the words behind the arrivals (cuda/ready.cuh).
    uint32_t awaited;
} AttnDecodeParams;
#define PEREGRINE_ATTN_SHORT 640  // positions: with a `reach` of no more, blocks of attn_decode may have several head tiles
int32_t attn_decode(const AttnDecodeParams* p, const Launch* l);   // tokens <= PEREGRINE_STEP_TOKENS

// attn_prefill: multi-query causal attention of many tokens of one slot on its cache, which holds their keys already.
typedef struct AttnPrefillParams {
    const uint16_t* qkv;      // [tokens, (heads + 2) * 64] f16, queries rotated
    const uint16_t* k_cache;  // [slots, max_context, 64] f16
    const uint16_t* v_cache;  // [slots, max_context, 64] f16
    const StepToken* token;   // [tokens]: the first one's slot and position count
    uint16_t* out;            // [tokens, out_stride] f16: heads * 64 values a token
    uint32_t tokens, heads, out_stride, slots, max_context;
} AttnPrefillParams;
int32_t attn_prefill(const AttnPrefillParams* p, const Launch* l);

// head: logits[m, v] = sum_k x[m, k] * E[v, k], f32.
typedef struct HeadParams {
    const uint16_t* units;  // units [vocab / 16][hidden / 64]: f16, or packed by table_pack
    const uint16_t* x;      // [tokens, hidden] f16
    float* logits;          // [tokens, vocab]
    uint32_t tokens, hidden, vocab, packed;
    const uint8_t* near;    // NULL, or what table_near made of `units`, for more than PEREGRINE_GEMV_TOKENS tokens
    uint32_t sides;         // if near; as table_near's
    SideClaims claims;      // if near
} HeadParams;
int32_t head(const HeadParams* p, const Launch* l);  // tokens <= PEREGRINE_HEAD_TOKENS

// table_near: a table once more, in the order in which head reads it for more than 8 tokens, by the sides of L2 (cuda/head_near.cuh).
typedef struct TableNearParams {
    const uint16_t* units;  // as head's
    uint8_t* to;            // [table_near_pieces][PEREGRINE_PIECE_BYTES]
    uint32_t vocab, hidden, packed;
    uint32_t sides;         // the bits of an offset whose parity is a piece's side
} TableNearParams;
uint32_t table_near_pieces(const TableNearParams* p);  // 0: head would not read it, on this GPU
int32_t table_near(const TableNearParams* p, const Launch* l);

#define PEREGRINE_STEP_LAYERS 48  // most layers of a decode_step call
#define PEREGRINE_STEP_TURNS 3    // buffers its layers use in turn
#define PEREGRINE_STEP_WARPS 12   // that share the inputs of a token
#define PEREGRINE_NORM_RECORD 32  // bytes that say what a warp's inputs of a norm are multiplied by, and their sums (decode_norm.cuh)

// What a decode step reads of one layer.
typedef struct DecodeLayer {
    const uint8_t* qkv_up;      // units of [qkv ; up]: [((heads + 2) * 64 + ffn) / 16][hidden / 64]; in the order of to_sides if the
    const uint8_t* down_dense;  // call's `sides`. Units of [down | dense]: [hidden / 16][(ffn + hidden) / 64], likewise
    const float* norm_weight;   // [hidden]
    const float* norm_bias;     // [hidden]
    uint16_t* k_cache;          // [slots, max_context, 64] f16, rotated keys
    uint16_t* v_cache;          // [slots, max_context, 64] f16
} DecodeLayer;

// What decode_step says before it gives up: a block waited too long for what others should have written.
typedef struct DecodeFault {
    uint32_t fault;  // 0, or 1 + what was waited for: 0 the residual stream, 1 the MLP's or attention's output, 2 queries, keys and values
    uint32_t layer, block;
} DecodeFault;

// decode_step: one token of each row of *step, from its id to its logits, in one launch of one block a multiprocessor.
typedef struct DecodeStepParams {
    DecodeLayer layer[PEREGRINE_STEP_LAYERS];
    const uint8_t* embedding;   // units [vocab / 16][hidden / 64]: f16, or packed by table_pack
    const uint8_t* head;        // the same, but in the order of to_sides if `sides`
    const float* final_weight;  // [hidden]
    const float* final_bias;    // [hidden]
    const float* table;         // [max_context, 32, 2]: cos and sin
    const Step* step;
    uint64_t* x;                // [2, 8, hidden]: zero before the first call
    uint16_t* qkv;              // [TURNS, 8, (heads + 2) * 64] f16: all bits set before the first call
    uint16_t* wide;             // [TURNS][8 * (ffn + hidden)] f16 as decode_plan.cuh lays them: all bits set before the first call
    uint8_t* norms;             // [TURNS][8 * (2 * hidden + STEP_WARPS * NORM_RECORD)], see decode_norm.cuh: all 0x80 before the first call
    uint16_t* final_norm;       // [8 * hidden] f16, like `wide`
    float* attn_partials;       // as in AttnDecodeParams
    uint32_t* attn_arrivals;
    uint32_t* epoch;            // [2]: which half of x is this step's, and blocks that are done; zero before the first call
    float* logits;              // [8, vocab]
    DecodeFault* fault;         // pinned host memory
    uint32_t layers, hidden, ffn, heads, vocab, slots, max_context, has_zeros;
    uint32_t embedding_packed, head_packed;
    uint32_t blocks;            // what decode_step_blocks said
    uint32_t sides;             // of to_sides, for the matrices of all layers and the head; 0: they are plain units
    uint8_t block_of[PEREGRINE_STEP_SMS];  // if `sides`, the number of the block on each multiprocessor, by %smid: even ones are at side 0
    uint32_t patience;          // polls before a block gives up
    float epsilon;
} DecodeStepParams;
int32_t decode_step(const DecodeStepParams* p, const Launch* l);
// Blocks decode_step is launched with on the current device, one a multiprocessor, all resident at once; 0 where it cannot run.
int32_t decode_step_blocks(uint32_t has_zeros, uint32_t* blocks);

// One sampled token, as the sampler tells the host.
typedef struct SampledToken {
    uint32_t id;
    float logprob;    // under the unprocessed logits
    uint32_t fault;   // 0, or 1 + the lowest id whose logit was NaN or +infinity
    uint32_t emitted; // tokens of its step that were kept: 1 + the drafts that were right
    uint32_t drafts;  // of its step
    uint32_t step;    // 1 for the first token of a generation
} SampledToken;

// A sequence being generated. Device memory, one a slot.
typedef struct DecodeState {
    uint32_t position;  // of the slot's first token in the next step = tokens in its cache
    uint32_t step;      // tokens sampled in this generation
    uint32_t length;    // tokens in `history`
    uint32_t done;      // 1: a stop id was sampled or the room is used up
    uint32_t draft_wait, draft_backoff;  // steps without drafts still to go, and how many follow the next failure
} DecodeState;

// sample: a token from each row of logits, by the formulas of src/sampler.rs; keeps those that follow from one another (speculation:
// src/speculate.rs), tells the host, and sets up the next step. Row m belongs to step->token[m].
// slots = 1: the rows are one sequence, and each supposes the tokens of the step in front of it to be right. Afterwards step->tokens is
// 0 (done: nothing else changes) or 1 + drafts, and the rows behind repeat the first token, each as a sequence of its own (`first` is
// itself): computing them too does no harm.
// slots = rows: row m is slot m. A slot that is done keeps its token in the step, and gives none.
typedef struct SampleParams {
    const float* logits;     // [rows, vocab]
    float* scratch;          // [rows, vocab]
    float* surveys;          // [rows, SAMPLE_BLOCKS * SAMPLE_WARPS, SURVEY_FLOATS]: what each warp found
    uint32_t* arrivals;      // [rows + slots], zero before and after
    uint32_t* history;       // [slots, history_capacity] every token so far; new ones are appended
    uint32_t* seen;          // [slots, ceil(vocab / 32)] bit set of the history
    DecodeState* state;      // [slots]
    Step* step;
    SampledToken* out;       // pinned host memory, [slots, out_capacity]: token of step s is at (s - 1) % out_capacity
    uint32_t rows;           // most rows there may be; rows beyond step->tokens do nothing
    uint32_t slots;          // 1 (then rows <= DRAFT_ROWS), or as many as rows
    uint32_t vocab, history_capacity, out_capacity, max_context;
    uint32_t max_new_tokens; // tokens of a generation at most
    uint32_t stop_ids[PEREGRINE_STOP_IDS], stop_count;
    uint32_t drafts;         // most drafts of the next step, < rows; 0: no speculation
    uint32_t top_k, no_repeat_ngram_size;
    uint32_t seed_low, seed_high;
    float temperature, top_p, min_p, repetition_penalty;
} SampleParams;
int32_t sample(const SampleParams* p, const Launch* l);

// start: fills `seen` from a slot's history, empties its ring of tokens, and sets its state, and its token of the step, for a
// generation that follows a prefill.
typedef struct StartParams {
    const uint32_t* history;  // [length] of this slot, length > 0
    uint32_t* seen;           // [ceil(vocab / 32)] of this slot
    DecodeState* state;       // of this slot
    Step* step;
    SampledToken* out;        // pinned host memory, [out_capacity] of this slot
    uint32_t length, position, vocab, slot, slots, out_capacity;
} StartParams;
int32_t start(const StartParams* p, const Launch* l);

// The text of a launcher's positive code.
const char* launch_error_name(int32_t code);

#ifdef __cplusplus
}
#endif
#endif
