// decode_step — one token of up to 8 sequences (or up to 8 tokens of one), from ids to logits, in one launch.
// Reference src/reference.rs, op by op; tests/gpu_decode compares the logits with Hugging Face's and with the kernels of one op each,
//           tests/gpu_packed.rs those of a packed head with those of the same one in f16.
// Shapes    hidden % 64 == 0 and <= 4608, ffn a multiple of hidden, head dim 64, at most 48 layers; 4 bit, one scale a row of a unit.
// Reads     all weights and the head once: 3963 MB for Falcon-7B with a packed head, 4111 with one of f16; the keys and values of each
//           token's context.
// Writes    logits [tokens, vocab] f32; keys and values of the new tokens.
// Needs     sm_90a, one block a multiprocessor, all resident at once (cooperative launch). On sm_80 this file is empty.
//
// Idea      The weights are one stream that never pauses. Between the ops of a layer there is no barrier of the grid: each block goes on
//           with its own strips and polls for the values it is about to need (decode_words.cuh), while its ring (decode_plan.cuh) is full
//           of the weights that come next.
//
//           residual --norm--> x --[qkv ; up]--> q k v --attention--> last slice of [down | dense] --+
//              ^                        `------> gelu ----------> slices 0..3 of [down | dense] -----+--> contributions, added
//              +-------------------------------------------------------------------------------------+    to the residual by atomics
//
//           The residual is an integer of 2^-24 steps with a count, so its sums need no order and tell when they are complete.
//           One token: every block computes the norm for itself. More: one block a token does, and publishes it (decode_norm.cuh).
// Memory    Weights lie on the side of L2 that reads them (sides.cuh), so a block is the one for its multiprocessor's side, and the link
//           between the sides is free for the words that blocks write for each other.
// Buffers   qkv, wide (MLP and attention output) and norms have three turns: layer l writes one, the storers clear that of l - 1, and
//           that of l + 1 has been clear since before anyone could get there. The residual has two halves, for even and odd steps.
// Watchdog  A block that has polled `patience` times writes what it waited for to *fault and traps: an error, not a hang.
//
// Floor     0.843 ms a token: 3963 MB at the 4.70 TB/s an H200 reads at best; 0.875 with a head of f16.
// Now       ms, H200, between two events, with a packed head: 1 token at 128, 1024, 2047 0.905, 0.907, 0.919, on a card that is slow with
//           one token 0.934, 0.930, 0.930; 8 texts at 128, 1024 0.968, 1.033; 8 tokens of one text 0.971, 1.003.
//           ncu, of a step of one token in a text: 3.96 GB from DRAM in 907 us, 4.37 TB/s, 90.8 % of its peak (dram__throughput, elapsed);
//           4.28 GB from L2; multiprocessors at 1.78 GHz.
// Bound     A layer of one token is 25.5 us: 21.6 strips of 1.09 at the ceiling, and what is left of the chain from the arrival of the last
//           strip of the slowest block to the first strip of the next layer, once the ring's 5 strips have arrived beside it. That chain
//           was 9.3 us before the producer's change: multiply 0.5, add and send 0.3, atomics and poll 2.7, norm 1.7 to 2.9.
//           To wait for slices costs one token 0.6 %.
//           8 tokens: what their consumers issue (decode_planes.cuh), and since then the joins. Within a run they never wait for weights:
//           with inputs as f16 a strip took 1440 cycles, 1080 of them products, 360 barriers, addresses and sums, with three warps a
//           scheduler. Where they are hardly faster than memory, a ring that has filled during a wait is still full at the next one. So
//           instructions saved in a strip saved time, 17 of 271 5 %; the next 23, by bytes, which norms are now, saved power more than
//           time. What-ifs (wrong), ms where it took 1.035: no copies 0.937; no waits for inputs 1.00; neither 0.826, then no unpacking
//           0.70, then no product 0.60; no unpacking alone 0.985, no conversion of inputs alone the same.
// Phases    of a layer, us, a warp of consumers, average of the blocks, before weights lay near and 8 tokens' inputs were f16 (a layer was
//           28.4 us with 1 token, 33.9 with 8):
//                        norm   inputs: norm   slice   dense   to bytes   strips: [qkv ; up]   slices   dense
//           1 token      5.1    -              1.5     1.1     1.4        8.7                  9.2      1.5
//           8 tokens     1.0    4.9            2.7     1.8     3.9        9.4                  7.8      1.3
//           The storer works 6.0 (11.9), clears 3.2 (4.3) and waits for the rest; the ring is full for 3.4 (6.9).
//           Attention, 8 texts at 1024, an item of 128 keys: 4.8 for its rounds, 3.8 to join; a warp had one or two.
//           Before queries were awaited by one word, cycles of a layer, with stamps that cost 5 %:
//                            strips (each: wait, work)   norm    inputs: norm   slices   dense   of them to scale and add up
//           1 token          25500  (733, 447)           8500
//           4 tokens         26300  (730, 490)           2100    8300           3700     2500    3000
//           8 tokens         25800  (209, 985)           2700    7600           5200     2700    2800      head 174000 in all
//           8 texts at 1900  26400  (199, 1026)          2800    7100           5600     28300   2900
// Clock     A GPC whose tensor cores work has 1.80 GHz instead of 1.98: within 2 us of the first product until 2 us after the last, however
//           few there are and whatever their operands; with one in 4 us it is 1.67 to 1.80. NVML goes on saying 1980 MHz. Of a step of one
//           token, by clock64 and globaltimer, it is 1.85, of 8 tokens 1.80, sustained 1.52 to 1.65 (NVML: 1.77 to 1.83).
//           Without any product on tensor cores (wrong), and without unpacking, which ptxas then leaves out too, 1 and 8 tokens at 128 take
//           0.896 and 0.916 for 0.926 and 1.031.
// Power     is the other thing 8 tokens wait for. 616 to 634 mJ a step with 1 token, 750 to 767 with 8, before sums lay in slots of the
//           ring; without products of strips, and what is dead without them, 558, 643. A multiply-add by mma.sync is 1.9 pJ in f16 (0.5 of
//           zeros), 0.66 (0.22) of bytes. A stream from the near side is 13.1 pJ a bit above the 122 W of an idle card, 8.3 of zeros, 15.2
//           wherever it lies; in which order and pieces of what size makes no difference. Reading inputs: 0.6.
//           What-ifs, 8 tokens, 500 launches, two planes of bytes: all inputs zero 1.014 for 1.130; the low one zero 1.072, of 4
//           bits 1.112, half of the products 1.089; no inputs of slices 1.059. An eighth of the inputs read, columns made to differ, 1.010
//           for 1.038 (all alike 0.983; all read, then made alike 1.034), in bursts 0.967 for 0.984: 29 MB a layer by L2.
// Pitfalls  An mbarrier arrival may overtake shared loads whose values nobody has used yet: stages go back after the sums are out.
//           In the head a stage must always be the same warp's: the parity of a barrier is good for one phase behind only.
//           ptxas takes registers that are loaded under a predicate for occupied all around a loop, and spills others: `fetch` loads
//           always. threadIdx and the address of shared memory are read anew in every strip, 50 cycles each, unless hidden from it.
//           Registers spilled go to L2 and back: the ring leaves L1 too little room. What loops of a layer need lies in shared memory.
//
// Log       of what was done, ms before and after, a card a line  1 at 128        at 1900, 2047 *  8 at 128         8 at 1024
//           whole sectors a read of inputs                          1.066  1.060    1.094  1.096 *   1.405  1.413    1.86   1.87
//           all inputs of 8 tokens in one trip                             1.072           1.095 *          1.305           1.81
//           no glance between tries, fewer spills                          1.072           1.082 *          1.317           1.81
//           producer: nothing between a copy's arrival and the
//           next, 17 instructions for 39                            1.060  1.012    1.089  1.027 *   1.290  1.283
//           the storer for 8 tokens                                 1.031  1.032    1.041  1.046     1.305  1.228    1.60   1.53
//           sums joined as integers                                        1.026           1.042            1.187
//           inputs to bytes in f16                                         1.024           1.039            1.178           1.51
//           keys and values into L2                                 1.023  1.027    1.046  1.044     1.196  1.208    1.526  1.501
//           items of attention of 256 keys from 1024 on             1.023  1.024    1.043  1.035     1.197  1.187    1.507  1.282
//               4 and 8 texts at 1900                               1.36   1.149    1.826  1.606
//           a packed head                                           1.022  0.995                     1.161  1.141
//           weights on the near side of L2                          0.992  0.919    1.006  0.943     1.137  1.095    1.254  1.131
//           blocks that give way (decode_producer.cuh)              0.934  0.925    0.964  0.944     1.112  1.124
//           8 tokens' inputs as f16, not two planes of bytes                                         1.096  1.055    1.137  1.11
//           two copies in flight throughout, 8 tokens                                                       1.030           1.085
//           items of 256 keys from 512 on: 8 tokens at 900          1.27 to 1.11; at 700 1.10 to 1.08; 1 token there the same
//           a product for both halves of sums of inputs, not two    0.915  0.910                     1.034  1.034
//           sums in as many slots as the ring has strips, as lanes
//           have them; 17 instructions a strip less                 0.910  0.911                     1.034  0.984    1.086  1.085
//               sustained, 600 launches                             0.925  0.925                     1.119  1.073
//           queries awaited by one word, not by all                 0.939  0.940    0.955  0.954     0.996  0.991    1.104  1.092
//               8 texts at 1900                                     1.487 to 1.456
//               sustained, 400 launches                             0.957  0.955    0.952  0.951     1.046  1.039    1.122  1.102
//               and a pause of 100 ns after each glance: the same, or up to 0.7 % more
//           norms published as bytes; 8 tokens' slices too, at first  2 and 4 tokens: 0.967 to 0.954, 0.994 to 0.981
//               some cards                                                                          0.992 to 0.990  1.091 to 1.116
//                                                                                                   0.977 to 0.975  1.079 to 1.098
//               8 tokens of one text                                                                1.070 to 1.009
//               sustained, 300 to 500 launches                      2 and 4: 0.992, 0.998 to 0.971, 0.992
//                                                                                                   1.006 to 0.990
//                                                                                                   1.040 to 1.020  1.224 to 1.200
//           from here on steps with their sampling, by turns of 60 after a rest
//           operands where they stay, slices of 8 tokens f16        0.914  0.914                     0.985  0.982    1.101  1.057
//               8 at 512 1.045 to 1.013; sustained                                                   1.044  1.031    1.155  1.125
//           marks of norms by 16 bytes, and none with one token     0.925  0.920                     0.993  0.982    1.088  1.090
//           and of what was not kept, by parts: ms for ms without it, 1 token at 128 where nothing else is said
// Stream    4, 5 copies in flight a block, or 2 a lane: 1.157, 1.178, 1.151 for 1.113; later one lane with two 1.102. Without evict-first
//           1.236 for 1.113. One thread as producer of all groups 1.12 for 1.113. One loop that asks barriers of all producer lanes in turn
//           and sleeps at none 1.109 for 1.085: its polling takes issue slots of the consumers and attention; groups of two warps, six
//           lanes 1.168. Two copies in flight in parts of a layer that no join follows at once 1.075 to 1.13 for 1.065 (weights on either
//           side). A stage in two copies with a barrier each, two halves in turn 1.030 for 1.028. test_wait instead of try_wait: the same.
//           One copy in flight a lane in the head +0.01; three: the same.
//           Weights to come into L2 while the ring is full: 3 strips 1.135, ahead all the time 1.27; near, the next stage alone 0.976 for
//           0.945, 8 tokens 1.048 for 1.026, two stages 1.069: the joins' words queue behind.
//           Slices of [down | dense] side by side in memory instead of a row tile's 0.978 to 0.985 for 0.982 to 0.985.
//           A stage given back by the storer, so that a full one says that the slot of its sums is free: 0.933 for 0.910, 8 tokens at 1024
//           1.18 for 1.085, since the storer clears meanwhile. 8 tokens: blocks that do not give way 1.007 for 0.993, at 1024 1.15 for 1.09.
// Shares    Runs of [down | dense] cut between groups, so that shares are even to a third of a strip 1.095 for 1.072; even in whole strips,
//           21 or 22 instead of 20 to 22, 1.087; most of it was a longer way of the producer, which has become short since.
//           Blocks of attention's slice alone, so that the others take no inputs of it: 0.977 for 0.983, but 8 tokens 1.192 for 1.133, at
//           1900 1.15 for 1.00. Fewer strips for the slice that is complete last 0.976 to 1.005, 8 tokens 1.18 to 1.22. Blocks with a run
//           of that slice take attention's first: 0.986, but at 1900 1.145 for 1.011, 8 tokens 1.184.
// Joins     Three runs of [down | dense] with inputs asked for ahead by cp.async: 1.176 for 1.113, more joins than it saved. All blocks
//           compute all norms of 8 tokens: 2.3 for 1.5. Norms of 8 tokens published as bytes, for which their readers have nothing to do
//           but to read: 1.21 for 1.19 to 1.21; with the steps of all warps in one line, for which all poll, 1.25, and 2 tokens 1.13 for
//           1.04 (that was with more to do elsewhere: see decode_norm.cuh). Inputs asked for without a glance first: 8 tokens 1.36 for
//           1.325, later 1.070 for 1.057; at slices alone 1.28 for 1.25; at the norm's alone, or for its owners: the same, and with 1
//           token all of it. A glance at a word of each row tile, so that inputs of slices are asked for 1.00 times, not 1.16 to 1.42: 8
//           tokens 0.978 for 0.977, at 1024 1.064 for 1.071. A pause of 100 ns after each glance: the same. A glance at the next run's
//           inputs before the last strip 1.072 for 1.057. The next strip's words in registers ahead of its inputs 1.026 for 1.028, at 2047
//           1.057 for 1.046. Words not there found as not a number, 59 instructions less: 8 tokens 1.138 for 1.142, kept. Words on both
//           sides of L2, each block reading the near copy, 170 cycles nearer: of the residual 0.919 for 0.914, 8 tokens 1.029 for 1.028;
//           of norms 8 tokens 1.070; of inputs of slices as well 0.924, 1.082. Two glances under way, 150 to 450 cycles apart, so that
//           what is there is found sooner: 8 tokens 0.996 to 1.001 for 0.992, at 1024 1.147 for 1.115, one 0.927 for 0.923. No barrier
//           behind the norms of several tokens: 0.999 for 0.992. Their owners among blocks with few strips: the same. All marks by 16
//           bytes, side by side: 1 token 0.932 for 0.927, 4 0.981 for 0.963, 8 at 1024 1.102 for 1.087, as attention then spills more. A
//           join of the MLP inside blocks, each multiplying its own rows of `up` by its columns of `down`, would give 1 % at most.
// Products  Codes as f16 for any number of tokens, no fixed point: at first 1.113 to 1.135; later 0.948 for 0.923 (sustained 0.959 for
//           0.922), 4 tokens 1.043 for 0.997, 8 sustained 1.120 for 1.155. By 8 warps of 9 units and 184 registers, all loads of a strip
//           ahead of its products 1.177; bytes by 8 warps of 9 units 1.108. Unpacking by mul.hi on the FMA pipe instead of shifts 1.201 for
//           1.113.
//           Rows g + 8 from bytes without a mask, what rows g gave taken off as an integer, 12 to 18 instructions of 180 less: 0.985 to
//           0.989 for 0.983, 8 tokens 1.17 to 1.21 for 1.19 to 1.21, later 1.133 to 1.146 for 1.133. Lane and thread kept in registers: the
//           same.
//           8 tokens, two planes of bytes: tiles of high and low bytes, for which a lane converts all it needs and gives nothing away, a
//           third fewer instructions for inputs: 1.226 for 1.140, since a read of them is 8 halves of a line instead of 4 lines, and L2
//           counts requests; in the order in which f16 are read, 288 instructions for 408: 1.109 for 1.115.
//           8 tokens as f16: six chains of products side by side 1.05 for 1.035; three, all codes of a strip loaded first: the same.
//           Of 8 tokens' slices see decode_halves.cuh.
//           Sums of inputs by mma.sp, 12 products for 24: the same in bursts, sustained 1.14 for 1.09, not understood. Products in the time
//           of waits, so that the clock stays: the same.
//           With fewer instructions a strip, 8 tokens where it took 0.984 or, on a slower card, 0.993: addresses of all a warp reads kept in
//           registers, 8 instructions less 0.990; both barriers in one branch 0.989; the slot asked for behind the product 0.998; upper
//           bytes by PRMT and rows g + 8 of them by HADD2, 24 of the ALU less 0.997; two chains of products 0.998, four for the sums of
//           inputs 1.003; all codes of a strip loaded first 0.999.
//           One token by dp4a, no tensor core but for attention and the head, bits as with more tokens: products begin with inputs times -
//           zero point, so that sums of units are all there is. 0.896 for 0.915 (sustained the same), but at 700, 900, 1900 0.944, 0.963,
//           0.969 for 0.915, 0.918, 0.946, where attention wakes tensor cores now and then; and 2, 4, 8 tokens 0.964, 0.970, 1.046 for
//           0.951, 0.958, 1.028, since what products begin with is read from shared memory in each strip.
// Attention In chunks of 64 keys: the same; 8 tokens at 2040 2.99 for 2.42. At most 6 items of a token, 192 to 352 keys: 8 texts at 1900
//           1.415 for 1.606, but 1 text there 1.087 for 1.035, 4 texts 1.21 for 1.149. 192 keys from 1024 on: 8 texts at 1500 1.56 to 1.60
//           for 1.34, the others within 2 %. All merging in one run: 8 texts at 1900 1.68 for 1.61, where the compiler reloads a spilled
//           register in every round. A round's keys and values in one trip, queries in shared memory: 8 texts at 1024 1.50 for 1.475, at
//           1900 1.88 for 1.835; with 480 bytes spilled 1.75, 2.34. Items first to blocks with few strips: 8 texts 0.999 for 0.994, both
//           warps of such a block 1.003, at 1024 1.137 for 1.116; to those with many 1.002, 1.110. A change elsewhere that makes ptxas
//           spill more here costs a percent: look first.
// Others    A storer that reads sums by 16 bytes and converts in 32 bits: the same. Launch without `cooperative`, or without overlap of the
//           next kernel: the same.
// Wide      9 to 16 tokens here, which take gptq_batch and a kernel each for the rest, were tried: two tiles of f16 columns, 8 warps of 9
//           units, 192 registers each and 120 for the others (setmaxnreg), sums of inputs in shared memory. Right, and 1.46 ms for 1.32.
//           With 4 slots for sums and a ring of 4 some 0.08 less than with 3 and 5; chains of half a unit, so 72 additions a strip more,
//           0.07 more; from 1.51 (those, 3 slots) without the second tile's products 1.28, without its part of the storer 1.46, its inputs
//           1.505, attention for 8 tokens 1.49, all of these 1.17. So it is instructions: of a strip of 421 76 are products, 20 a unit
//           unpack.
// Next      Moments applied to sums, so that products begin before the norm is complete: half a microsecond a layer by reckoning. For 8
//           texts of more than 1600 tokens attention by more than two warps a block: there they have two items again, and the consumers
//           wait.
// Spills    44 bytes, 116 with a packed head: in attention, in the head's loop, and once a layer or less; none in loops over strips.
#include "decode_consumer.cuh"
#include "decode_plan.cuh"
#include "decode_producer.cuh"
#include "decode_storer.cuh"
#include "launch.cuh"

// The headers are templates and inline functions of sm_90 instructions: this file uses them there alone.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace {

// Reads of queries, keys and values, once they are there.
struct FetchReady {
    const Args& p;
    uint32_t layer;
    // The queries are awaited for most of a layer: by one word, since to poll for all of 2 KB would be traffic.
    __device__ __forceinline__ void await(const uint16_t* at) const {
        const auto glance = [&] { return threadIdx.x % 32 != 0 || load_relaxed(reinterpret_cast<const uint32_t*>(at)) != NOT_READY; };
        poll(p, Awaited::QKV, layer, glance, [] { return true; });
    }
    template <int N>
    __device__ __forceinline__ void operator()(uint4 (&w)[N], const uint16_t* const (&at)[N]) const {
        poll(p, Awaited::QKV, layer, [] { return true; }, [&] {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < N; i++) w[i] = load_relaxed(reinterpret_cast<const uint4*>(at[i]));
#pragma unroll
            for (int i = 0; i < N; i++) complete &= ready(w[i]);
            return complete;
        });
    }
};

// Sixteen dims of a head, which is one unit: words in the order that `fetch` describes.
struct StoreWide {
    const Args& p;
    uint32_t layer, tokens;
    __device__ __forceinline__ void operator()(uint32_t m, uint32_t head, uint32_t q, const uint32_t words[8]) const {
        const uint32_t e = p.ffn + head * PEREGRINE_HEAD_DIM + q / 2 * HALF_UNIT + q % 2 * 4;
        const uint32_t at = tokens > COLUMN_TOKENS ? value_at<true>(m, e, p.wide_size) : value_at<false>(m, e, p.wide_size);
        uint16_t* to = p.wide + layer % TURNS * p.wide_turn + at;
#pragma unroll
        for (int i = 0; i < 4; i++) store_relaxed(to + i * 8, words[i], words[i + 4]);
    }
};

// The items of all tokens, one after the other, are dealt out over the attention warps of all blocks; the same ones in every layer. Little
// stays in registers from item to item: attn_decode_item needs them all.
template <bool ZEROS, typename Take>
__device__ __forceinline__ void for_each_item(const Args& p, const Shared<ZEROS>& shared, uint32_t tokens, Take take) {
    const uint32_t tiles = attn_head_tiles(p.heads);
#pragma unroll 1
    for (uint32_t item = (threadIdx.x / 32 - ATTENTION) * gridDim.x + blockIdx.x;; item += (WARPS - ATTENTION) * gridDim.x) {
        uint32_t m = 0, i = item;
        for (; m < tokens; m++) {
            const uint32_t items = tiles * attn_chunks(min(shared.token[m].position, p.max_context - 1));
            if (i < items) break;
            i -= items;
        }
        if (m == tokens) break;
        take(AttnItem{m, i % tiles, i / tiles});
    }
}

// Asks for an item's cached keys and values to come into L2.
__device__ __forceinline__ void prefetch(const AttnDecodeParams& p, const AttnItem& item, const AttnToken& t) {
    const uint32_t keys = attn_keys(t.position), key0 = item.chunk * keys, end = min(key0 + keys, t.first_new);
    if (threadIdx.x % 32 != 0 || key0 >= end) return;
    const size_t first = ((size_t)t.slot * p.max_context + key0) * PEREGRINE_HEAD_DIM;
    const uint32_t bytes = (end - key0) * PEREGRINE_HEAD_DIM * 2;
    prefetch_bulk(p.k_cache + first, bytes), prefetch_bulk(p.v_cache + first, bytes);
}

// While its queries are computed, the keys and values that an item needs come into L2: from memory they would come as slowly as weights.
template <bool ZEROS>
__device__ __forceinline__ void attention(const Args& p, Shared<ZEROS>& shared, uint32_t tokens) {
    if (threadIdx.x % 32 < tokens) shared.token[threadIdx.x % 32] = p.step->token[threadIdx.x % 32];  // each warp for itself
    __syncwarp();
#pragma unroll 1
    for (uint32_t l = 0; l < p.layers; l++) {
        for_each_item(p, shared, tokens, [&](const AttnItem& item) {
            if (item.head_tile == 0) prefetch(p.attn[l], item, attn_token(p.attn[l], item.token, shared.token[item.token]));
        });
        for_each_item(p, shared, tokens, [&](const AttnItem& item) {
            attn_decode_item(p.attn[l], item, attn_token(p.attn[l], item.token, shared.token[item.token]), FetchReady{p, l},
                             StoreWide{p, l, tokens});
        });
    }
}

// A warp multiplies WARP_UNITS units of every strip, without a branch; those the strip does not have are zeros that no copy touches.
// (The head's stages reach over them, after the last strip of the layers.) Sums of warps without units are zeros too.
template <bool ZEROS>
__device__ __forceinline__ void pad(const Args& p, Shared<ZEROS>& shared) {
    constexpr uint32_t BYTES = Shared<ZEROS>::BYTES;
    static_assert(sizeof(shared.few) <= sizeof(shared.many) && sizeof(shared.many) % 16 == 0, "both are zeroed");
    for (uint32_t i = threadIdx.x; i < sizeof(shared.many) / 16; i += THREADS)
        reinterpret_cast<uint4*>(shared.many)[i] = make_uint4(0, 0, 0, 0);
    const uint32_t units = p.units - (p.groups - 1) * GROUP_UNITS, missing = (WARP_UNITS - units % WARP_UNITS) % WARP_UNITS;
    for (uint32_t s = p.groups - 1; s < Shared<ZEROS>::DEPTH * p.groups; s += p.groups)
        for (uint32_t i = threadIdx.x; i < missing * BYTES / 16; i += THREADS)
            reinterpret_cast<uint4*>(shared.ring[s] + units * BYTES)[i] = make_uint4(0, 0, 0, 0);
}

template <bool ZEROS, bool PACKED>
__global__ void __launch_bounds__(THREADS, 1) decode_step_kernel(const __grid_constant__ Args p) {
    overlap_next();
    extern __shared__ __align__(128) uint8_t smem[];
    Shared<ZEROS>& shared = *reinterpret_cast<Shared<ZEROS>*>(smem);
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (uint32_t s = 0; s < Shared<ZEROS>::DEPTH * p.groups; s++)
            barrier_init(&shared.full[s], 1), barrier_init(&shared.empty[s], readers(p, s));
        for (uint32_t s = 0; s < Shared<ZEROS>::DEPTH; s++)
            barrier_init(&shared.sums_full[s], p.owners), barrier_init(&shared.sums_empty[s], 1);
        barrier_init_done();
    }
    // Beside the thread that makes the barriers.
    if (threadIdx.x == 32) shared.block = block_number(p), plan_runs(p, shared.block, shared.runs);
    pad(p, shared);
    __syncthreads();
    if (warp == PRODUCER) {
        if (Producer<ZEROS, PACKED>::group() < p.groups) {
            Producer<ZEROS, PACKED> producer{p, shared};
            producer.run();
        }
        __syncwarp();
    } else {
        wait_previous();
        const uint32_t tokens = min(load_relaxed(&p.step->tokens), TOKENS), half = load_relaxed(p.epoch) & 1;
        uint64_t *residual = p.x + half * TOKENS * p.hidden, *next = p.x + (half ^ 1) * TOKENS * p.hidden;
        if (tokens == 0) {
        } else if (warp < CONSUMERS) {
            if (tokens == 1) Consumer<ZEROS, PACKED, false>(p, shared, tokens).template run<true>(residual, next);
            else if (tokens <= COLUMN_TOKENS) Consumer<ZEROS, PACKED, false>(p, shared, tokens).template run<false>(residual, next);
            else Consumer<ZEROS, PACKED, true>(p, shared, tokens).template run<false>(residual, next);
        } else if (warp == STORER) {
            if (tokens <= Storer<ZEROS, 1>::MOST_TOKENS) Storer<ZEROS, 1>{p, shared, tokens}.run(residual);
            else if (tokens <= Storer<ZEROS, 2>::MOST_TOKENS) Storer<ZEROS, 2>{p, shared, tokens}.run(residual);
            else Storer<ZEROS, 4>{p, shared, tokens}.run(residual);
        } else {
            attention(p, shared, tokens);
        }
    }
    __syncthreads();
    // The last block to finish turns the residual's halves round for the next step.
    if (threadIdx.x == 0 && load_relaxed(&p.step->tokens) != 0 && atomicAdd(&p.epoch[1], 1) == gridDim.x - 1)
        p.epoch[1] = 0, p.epoch[0] ^= 1;
}

template <bool ZEROS>
int32_t blocks(uint32_t* count) {
    int device = 0, multiprocessors = 0, capability = 0, cooperative = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
    *count = 0;
    if (e != cudaSuccess || capability != 9 || !cooperative) return (int32_t)e;
    // A program built without sm_90a has no such kernel: that is no error, there is another way.
    bool resident = true;
    for (const auto kernel : {decode_step_kernel<ZEROS, false>, decode_step_kernel<ZEROS, true>}) {
        int each = 0;
        e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<ZEROS>));
        if (e == cudaSuccess) e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, THREADS, sizeof(Shared<ZEROS>));
        resident &= e == cudaSuccess && each >= 1;
    }
    if (resident) *count = (uint32_t)multiprocessors;
    cudaGetLastError();
    return 0;
}

}  // namespace

extern "C" int32_t decode_step_blocks(uint32_t has_zeros, uint32_t* count) {
    return has_zeros ? blocks<true>(count) : blocks<false>(count);
}

extern "C" int32_t decode_step(const DecodeStepParams* p, const Launch* l) {
    if (p->hidden == 0 || p->hidden % UNIT_INPUTS || p->hidden / UNIT_INPUTS > CONSUMERS * WARP_UNITS) return PEREGRINE_BAD_SHAPE;
    if (p->ffn == 0 || p->ffn % p->hidden || p->heads * PEREGRINE_HEAD_DIM != p->hidden) return PEREGRINE_BAD_SHAPE;
    // What a residual's count and a list of runs can hold.
    if (p->layers == 0 || p->layers > PEREGRINE_STEP_LAYERS || 1 + p->layers * (p->ffn / p->hidden + 1) > 255) return PEREGRINE_BAD_SHAPE;
    if (p->vocab == 0 || p->vocab % UNIT_ROWS || p->blocks == 0 || p->blocks > p->vocab / UNIT_ROWS) return PEREGRINE_BAD_SHAPE;
    if (p->slots == 0 || p->max_context == 0 || attn_most_chunks(p->max_context) > ATTN_RUNS * 31) return PEREGRINE_BAD_SHAPE;
    Args args(*p);
    const dim3 grid(min(p->blocks, args.wide_tiles));
    args.placed = p->sides != 0 && grid.x == p->blocks;  // else nobody knows which multiprocessors they are on
    if (grid.x < TOKENS) return PEREGRINE_BAD_SHAPE;  // each norm of several tokens is a block's
    const auto kernel = p->has_zeros ? p->head_packed ? decode_step_kernel<true, true> : decode_step_kernel<true, false>
                                     : p->head_packed ? decode_step_kernel<false, true> : decode_step_kernel<false, false>;
    return launch<true>(kernel, grid, THREADS, p->has_zeros ? sizeof(Shared<true>) : sizeof(Shared<false>), l, args);
}
#endif  // sm_90
