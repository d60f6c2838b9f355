// gptq_batch_wgmma — gptq_batch on sm_90a: y[m, row] = sum_k x[m, k] * W[row, k], 4-bit W in units.   Reference: reference.rs::gptq_matmul
// Shapes   as gptq_batch; for f16 outputs out_stride and gelu_stride multiples of 8.
// Reads    W once, x once an SM, through L2.   Writes see GptqOutput.
// Code     batch_wgmma.cuh, one function a role.
// Mapping  one block an SM keeps to one K slice and to two or three groups of four row tiles (batch_share.cuh), one tile a warp; each warp
//          gives wgmma its own 16 rows as A, from registers, four warps share the activations as B. One warp fetches weights (a bulk copy a
//          row tile and stage), one activations (a box of a tensor map); each has a ring of its own, so that weights are asked for before
//          the predecessor ends. The former makes the barriers, and waits for none of the others: what it is late by, all are.
// Numbers  a weight is f16(scale * (code - zero)), AutoGPTQ's own definition of it, times a power of two of its row (row_factors.cu), which
//          is taken off the sums. No finer than 2^-24, where the row's largest scale has 2^-11 to 2^-9 or, in rows of tiny ones, less. A
//          slice of a row is one chain of the tensor core, whose f32 adds truncate: relative error 4.8e-6 over 4544 inputs.
// Columns  8, 16, 24, 32, 40, 48, 64 or 72 tokens.
// Overlap  a block takes 39,000 to 43,000 of an SM's registers and 200 to 218 of its 227 KB, so that norm and attention lie beside it and
//          the next product's blocks begin, and fill their rings, as soon as this one's end. Of weights only IN_FLIGHT stages are asked for
//          at a time: all at once, they stand in front of attention's and the norm's loads, and of the first activations. Before the inputs
//          are there it is one, of which there are EARLY or EARLY_SLICED; in [down | dense] two, to 16 tokens. The first stages of the next
//          product come into L2 as this one's block ends (batch_share.cuh): 1.3 us pass from a block's begin to its first weights from
//          memory, and inputs were there 2 us after it began, when [down | dense] still waited for a word from attention.
// Planes   in steps of 9 to 16 texts activations are bytes (batch_planes.cuh), unless weights have zero points, scales of 32 inputs, or an
//          order of their own.
// Near     where there is a copy by the sides of L2 (near.cuh), blocks read that; which share one has it learns from an atomic.
// Start    what a block does before it asks for its first weights, 64 times a step, is code that, it seems, has left its multiprocessor's
//          cache: 200 instructions more there took 0.3 us more a product of 16 tokens, 0.9 of 32. (Steps of 16, 32 texts 1.211, 1.408 for
//          1.188, 1.355: one kernel for both kinds of weights, which read plain ones; by the copy 1.197, 1.372. Where the constants lie, how
//          copies are issued, counts of arrivals, a share from shared memory instead of the block's number: each alone nothing.)
// In front of attention, row tiles of `qkv` are counted as they are stored, so that attention need not wait for the others (ready.cuh);
//          blocks that have one group less, and end sooner, have them.
// Behind   attention, if that says how far it is (ready.cuh), [down | dense] does not wait for it: in a captured step its predecessor is
//          [qkv ; up]. Each slice begins with inputs of `down`, which need that alone, and ends with its share of those of `dense`, after
//          three quarters of its stages. Attention has then long ended, if its blocks were there while [qkv ; up] was under way: beside a
//          block of that there is room for one of 128 threads with 128 registers, where a thread here has 96: a quarter of a multiprocessor
//          has 16384, and one has four of 14 warps. There is none if the driver gives shared memory 196 KB, as it did for a block of 194.
// Floor    [qkv ; up] 55.2 MB, [down | dense] 54.9 MB: 11.7 us each at 4.70 TB/s; at 64 tokens 13.8 us of the tensor cores, and 77 MB of
//          activations from L2.
//          By power (see From 16 tokens on): the stream, f16 products and an idle card alone are a step of 1.08, 1.45, 2.17 ms of 16, 32,
//          64 texts at 700 W by weights that lie near, 1.20, 1.56, 2.28 by others, where one text's takes 0.92 to 0.99.
// Measured a pair of [qkv ; up] and [down | dense], launches in a row in a graph, cold L2, H200, by turns with stages of four units for
//          all and without 24 and 40 columns, in brackets; 48 and 64 with six units and two stages of activations, 72 with four and three:
//              tokens       1             8             16            24            32            40            48            64
//              pair, us     31.9 (33.5)   32.4 (33.9)   34.1 (36.6)   35.8 (39.6)   38.6 (40.4)   42.0 (45.6)   44.5 (46.0)   50.8 (52.8)
//          72 tokens: 56.3 with stages of four. Compare only within a run. The clock is 1.75 GHz, 1.6 at 64 tokens, 1.98 where nothing runs.
//          A layer of 16 texts at 128 by stamps that cost 5 %, us from the inputs of [qkv ; up], median of the blocks (and the last), before
//          weights for L2 and what else the log says: inputs in shared memory 0.6 (1.0), multiplied 13.3 (14.3; with two groups 10.9), stored
//          13.8 (14.8); seen by attention's announcing block 16.1; [down | dense]: begun 14.7 (15.6), inputs 17.1, in shared memory 17.9,
//          multiplied 30.6 (31.8), stored 31.3 (32.7); norm: inputs 33.9, read 34.8, done 36.4; the next inputs 37.4. So 25.4 of 37.4 are
//          products, at 320 cycles a unit of three warps, 250 of two, in which a warp hardly waits for weights. One block in ten of [down |
//          dense] does, for 1.2 us: they begin last, and have fetched least when the inputs come.
// Clock    Fewer instructions are no less time at 16 tokens: with 58.9 a unit for 60.1 it took 1 to 2 % fewer cycles, at 1.716 GHz for
//          1.737, 13.1 us either way; and after 31, 38 ms of steps of 32, 64 texts the power limit adds 6, 8 % from one step to the next.
// Log      steps of 16, 32, 64 texts at 128, ms, by turns, medians, of 64 fastest tenths; the first three each alone, the others on top
//          no division behind the products        1.266 for 1.270    1.436 for 1.436    2.005 for 2.010
//          two stages at once in [down | dense]   1.258 for 1.270    1.506 for 1.436    2.018 for 2.010 (to 16 tokens, therefore)
//          one, two stages of the next for L2     1.264, 1.259 for 1.270; 1.444, 1.433 for 1.436
//          the norm in one pass, and by st.async  1.239, 1.230 for 1.245 (layernorm.cu)
//          partial sums stored as they are        1.226 for 1.239                       1.907 for 1.951
//          all of it, and attention ahead         1.208 for 1.269    1.384 for 1.458    1.925 for 1.999
//          [down | dense] overtakes attention     1.188 for 1.205    1.342 for 1.361 (fastest tenths)
//          weights near                           1.141 for 1.187    1.319 for 1.354 (fastest tenths)
//          ... medians of 110 steps               1.227 for 1.263    1.504 for 1.588    2.168 for 2.236
//          attention aside of 64 too              the same           the same           1.747 for 1.863 (fastest tenths)
//          ... medians of 110 steps                                                     2.025 for 2.110
//          both rings turn as one (of 16 with four stages of activations; of 40 bursts 1.403 for 1.424): loops of 55.3, 54.5 instructions a
//          unit for 57.3, 56.8                    1.137 for 1.140    1.303 for 1.320 (fastest tenths)
//          ... medians of 120 steps               1.194 for 1.212    1.445 for 1.463
// Short    not at the speed of memory, but of what warps issue, at a clock that gives way to it. A loop of nothing but products keeps a
//          quarter of a multiprocessor 13, 13, 16, 32 cycles a product of 8, 16, 32, 64 tokens, as reading A from registers takes 13 in
//          which nothing else issues, and what else a warp does comes on top: 89, 107, 138 cycles a unit of 16, 32, 64 tokens where three
//          warps take turns, with 56 instructions, of which 36 unpack; here 55 to 57. By mma.sync, with one to six row tiles that share B, 106 to
//          94 and 162 to 142 (16, 32 tokens), sums of bytes in two planes 73 and 116, without zero points or scaling 82 and 102. What-ifs,
//          steps of 16, 32, 64 texts, ms, where it took 1.316, 1.49, 2.00: a third group of warps that multiplies nothing 1.228, 1.361,
//          1.73; no unpacking 1.215, 1.376, 2.03; one of four products 1.199, 1.323, 1.653; neither 1.180, 1.304, 1.610; all of these 1.168,
//          1.289, 1.586.
// Tried    Steps of 16 texts, ms, by turns from rest (power makes those of 32, 64 differ by 5 to 10 % within a run). Weights asked for
//          before the inputs are there, one stage after the other: one in [qkv ; up] and two in [down | dense] 1.284, two and two 1.278, two
//          and three (EARLY, EARLY_SLICED) 1.257, three and three 1.289; with 32 texts one and two 1.407, two and three 1.400, with 64 1.993
//          and 1.975 (fastest tenths). Four divisions a thread where a block begins: 0.04 more. Barriers of weights for each group of warps,
//          which then drift apart: 1.42 to 1.45. Groups of row tiles that are left over, cut into equal parts for all blocks, whose sums
//          come into the owner's ring: 1.36, with 32 texts 1.52 for 1.47; of that 0.03 for a second copy of the loop over units (18 KB each:
//          too much code at once, it seems), 0.04 for the sums' way. Blocks that have none as helpers, one loop: 1.42, 1.59; without the
//          sums' way 1.32, 1.49, where 1.30, 1.49. Three groups a block, on as many as that takes: 1.35 for 1.29. No test a unit for more:
//          1.50 (C7512).
//          How weights lie in memory, 16, 32, 64 texts, fastest tenths of steps, two and three stages before the inputs. Where row tiles, a
//          copy of 3.3 KB each, took 1.254, 1.422, 2.001: a group's tiles side by side, a copy of 13 KB, 1.242, 1.405, 1.983; a box of a
//          tensor map for a group, rows of a unit, 1.321, 1.462, 2.007, of three units 1.289, 1.444, 2.008. Where row tiles, but one and two
//          stages, took 1.279, 1.436, 2.028: all that a block reads in one piece, copies of 13 KB, 1.257, 1.400, 1.988, of 39 KB 1.275,
//          1.410, 1.993; in pieces of 4 KB on its side of L2, 1.249, 1.379, 2.000 (near.cuh has what came of that).
//          [down | dense] cut more evenly: 65 units a block instead of 71, of which two bands of three groups leave one run each to an
//          eleventh block: its products took 12.3 us for 12.5, the norm 0.2 more for a sixth slice, the step 1.293 for 1.257. Blocks with
//          two groups first, so that they have the rows of `qkv`: 1.287 for 1.256, 64 texts 2.013 for 1.977 (fastest tenths): those with
//          three then begin last. [down | dense] by the count of all row tiles of [qkv ; up]: 1.274 for 1.255.
//          Since then, of 16 (and 32): not unrolled, a loop of 6 KB for 17, 1.296 for 1.264 (1.529 for 1.452); two stages of activations
//          1.335 for 1.275; a stage more in flight from the fifth on 1.306 for 1.273; four before the inputs of [down | dense] 1.258 for
//          1.239; three, four stages for L2 1.250, 1.259 for 1.245, those of [qkv ; up] too 1.247; the first activations asked for before
//          overlap_next() 1.232 for 1.216 (1.386 for 1.398); blocks of [qkv ; up] counted at their ends 1.289 for 1.266; the norm polling
//          for the sums themselves 1.287 for 1.266; words polled without acquire 1.194, 1.201 for 1.205, 1.204 (1.338, 1.374 for 1.351,
//          1.382). Since that overtakes, fastest tenths where it took 1.183: two or four stages before its inputs 1.199, 1.188; one for L2
//          1.187. What was tried at 16 tokens before, and had 80 registers or fewer, may have lost for that alone (attn_decode.cu).
//          Since weights lie near, by turns, 16, 32 texts in bursts and 64, medians, where it took 1.149, 1.320, 2.205 and 1.141, 1.315,
//          2.150: pairs of blocks that fetch half of the activations each for both (clusters, multicast; the second is told by the first
//          which share to take) 1.184, 1.368, 2.252; in [qkv ; up] alone, where each may take any share, 1.159, 1.358, 2.153. Clusters
//          without that cost nothing. It was to save power: with 3/8 of the activations left out steps of 64 took 2.167 for 2.218, of 16 and
//          32 the same, so a bit of these, from L2, is some 2 pJ. Two products of 32 columns for one of 64: 2.495. The first activations
//          asked for 21 instructions after the end of the wait, where it is 75: the same. A stage more before the inputs are
//          there, with 16 texts: in bursts 1.136 for 1.143 ([qkv ; up] alone), 1.135 (both), but the power limit comes sooner: medians of 120
//          1.234, 1.201 for 1.184, slowest tenths 1.258, 1.258 for 1.265; with 32 bursts 1.315 for 1.305. Three stages for L2: the same.
//          Later, fastest tenths of 16, 32, 64, each by turns with what was there: three stages of weights with 16 tokens, to turn with three
//          of activations, 1.161 for 1.141. Scales that the copy holds multiplied by the row's factor, two instructions less a unit, 1.198
//          for 1.145, 1.325 for 1.320, 1.767 for 1.783; with 16 that takes 80 registers, so that a block of the norm fits beside one at
//          once, which may be why (layernorm.cu). Each warp asks for its own weights, by a predicate and without barriers for empty
//          stages, 1.177 for 1.132, 1.347 for 1.292, 1.851 for 1.728. The warp of activations goes to the stores before the others, with
//          no tokens, so that their code is at hand: 1.146 for 1.143, 1.319 for 1.305, 1.793 for 1.784.
//          Codes as they are, subnormal, a chain a unit that begins with -8 times the sum of its inputs, scaled in f32: 48 instructions a
//          unit, bursts of 16 texts 1.130 for 1.124, medians 1.141 for 1.146, with offsets of zero; 1.303 where warps make them, by mma.sync, a
//          stage ahead. A chain's end is waited for: with two under way ptxas serialises (C7511, C7514, C7520), unless nothing leaves the
//          loop.
//          No kernel for the norm: the warp with a row tile's last slice adds the others and the residual, and writes what [qkv ; up] reads,
//          scaled as in layernorm.cu's what-if, with moments in fixed point: 1.162 for 1.143, 1.461 for 1.313, 2.185 for 1.770 (1.252 for
//          1.134 with moments at one address). Few blocks then read what all do in the norm, and those of [qkv ; up] begin later, with
//          rings that are empty when their inputs are there.
//          Loops of 32 tokens that issue less take longer. [down | dense] behind itself, plain weights, 17.2 us in bursts and 20.2 busy (to
//          0.3 %) with 54.7 instructions a unit; by how many per cent more: tests for the end of two units at a time, 52.7, 2.2 and 2.4;
//          before units 1, 3 and 5 alone, 53.1, 0; scales multiplied beforehand, 52.1, 1.8 and 1.4; that and two units, 50.5, 3.2 and 2.5;
//          codes loaded a unit earlier, 54.1, 2.1 and 1.6; a wait behind two k16 steps, 57.2, 1.4 and 1.1, behind each, 62.5, 3.2 in bursts;
//          groups of warps that take turns by barriers, 56.8, 3.2 and 2, or begin 50 to 200 cycles apart, 0.5 and 0. What the better ones
//          share is masks of the next unit between the first product and the second. By ncu's samples a fifth of the loop is waits for
//          weights (plain ones, a launch alone), and schedulers issue in less than half of a launch's cycles. Sums of bytes with one product
//          of 64 columns: 72.4, 5.7 and 0.5; with steps 93.7, 29 and 20, as product, wait and scaling are one chain. (All of it
//          there alone: what gained there with 16 tokens lost in steps, see batch_planes.cuh.)
//          Pairs, us. At 8, 16, 32 tokens, where stages of six took 31.7, 33.4, 37.4: of eight units 32.0, 33.5 (8 and 16 tokens); two
//          stages of activations and one of weights in flight 38.1, 40.8, 42.1; barriers of the next stage asked a unit or two before 31.9,
//          33.5, 37.9, and with that: three in flight 33.4, 34.2, 37.9; a word that each block counts up behind its stores and the next
//          product polls, instead of the wait for its grid, 32.8, 34.3, 39.0. Four stages of activations (8, 16 tokens): the
//          same, before both rings turned as one.
//          The block's sums side by side in shared memory, stored by bulk copies of a token's rows: 33.5, 35.3, 39.6, 52.6 where it was
//          32.4, 34.1, 38.6, 52.8 (of f32 sums alone 0.7 less at 64 and 72, 0.1 to 0.3 more at 8 to 32).
//          mma.sync, each warp one of four units of a stage, the warps' sums joined at the end (error 1.4e-6): 34.8 to 39.3 at 16 tokens
//          with 2 to 6 groups of row tiles, stages of four; of eight 31.7, 34.4, 40.5, 48 at 8, 16, 24, 32, no better than this kernel.
//          Pairs of blocks (clusters) that share activations by multicast: [qkv ; up] 20.6, 23.6, 29.1 at 16, 32, 64 tokens where it was
//          19.0, 21.1, 26.0, and blocks that begin up to 9 us later in a step; an arrival at the other block's barrier with
//          .release.cluster is a fence that doubles the time.
//          Codes as subnormals straight from masks (20 instructions), a chain a unit, scaled by f32 multiply-adds, zero points taken off
//          by products of scales and sums of inputs: 19.5, 26.0, 48.8 where it was 19.0, 21.7, 27.0 (17.2 for 19.1 with 8 columns); the
//          sums from a row tile of ones: pairs of 35.4, 38.6, 48.1, 68.9 at 8, 16, 32, 64, where it took 34.0, 36.9, 40.9, 54.1. Codes
//          one unit ahead, not two: pairs of 36.8, 41.8, 51.5. Two ahead without unrolling: 39.1, 48.8, 62.9 where it was 38.5, 43.7, 58.1.
//          Unpacking between products, into a third set of registers: ptxas then waits for each product (C7520). Two units a batch: 136
//          registers, else likewise (C7512). All layers in one launch, rings never empty, norm and attention by four more warps, and words
//          for joins (its logits up to 0.043 off, not looked into): steps of 16, 32, 64 texts in 1.61, 1.75, 3.06 ms for 1.32, 1.62, 2.33.
//          Without waits for norms 1.35, 1.63, 2.81, without any 1.21, 1.55, 2.65, and without norms and attention 1.16, 1.35, 1.99:
//          products alone take 32 us a layer of 16, launches that overlap 37. 48 and 64 texts that do not wait for attention: layers of 51.3,
//          57.8 us where 50.6, 57.1. Two blocks of 112 KB and 72 registers a multiprocessor, so that the next product's rings fill early:
//          pairs of 42.7 where 35.7 (16 tokens): some multiprocessors get two of one product.
//          From 16 tokens on the GPU runs against its 700 W, and so it does with one: what saves time and no energy saves little then. A
//          layer took 19 mJ with 1 token, 28, 35, 48 with 16, 32, 64. A multiply-add of wgmma 1.9 pJ in f16 (0.34 of zeros; 1.6 if weights
//          are small integers), 0.6 of bytes; in a loop of nothing else 2.0, 1.9, 2.1, 1.8 with 16, 32, 64, 128 columns, 1.85 with 256 and
//          both operands in shared memory, 1.4 at the clock that all multiprocessors then have; a bit read 15.2, near 13.1 (decode_step.cu);
//          an idle card 122 W. With scales that are powers of two a
//          step of 64 texts takes 2.34 ms sustained for 2.53, of 32 1.72 for 1.74, of 16 the same. What-ifs of a layer at 16, 32, 64, in
//          bursts and busy, where it took 37.3, 43.5, 59.5 and 40.5, 48.1, 68.7: codes and two planes of bytes, sums of a unit scaled in
//          f32: 38.8, 49.8, 79.0 and 39.8, 50.3, 78.5, planes in sums of their own 36.7, 47.2 and 38.5, 48.3; inputs would have to be
//          bytes, with a step for a unit of a token. Codes less 8 in f16, a chain a unit: 38.5, 52.5, 170 (spills), 41.2, 54.4, 170.
// Spills   4 to 36 bytes: 64 and 72 tokens with two scales a unit, zero points or both.
#include "batch_planes.cuh"

namespace {

template <class Shape, bool NEAR>
__global__ void __maxnreg__(REGISTERS) gptq_batch_wgmma_kernel(const __grid_constant__ BatchParams g) {
#if PEREGRINE_WGMMA
    extern __shared__ __align__(1024) uint8_t smem[];
    Barriers<Shape>& b = *reinterpret_cast<Barriers<Shape>*>(smem + Shape::BARRIERS_AT);
    const uint32_t warp = threadIdx.x / 32;
    // The warp that fetches weights makes the barriers, and does not wait for anybody: it arrives at barrier 1, where the others wait.
    if (NEAR && warp == WARPS) return claim_and_fetch<Shape>(g, smem + Shape::W_AT, b);
    if (NEAR) asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
    const Span<Shape> s(NEAR ? Dealt(uniform(b.dealt.x), uniform(b.dealt.y)) : Dealt(blockIdx.x, g.slices, g.deal), g.slices, g.deal);
    if (!NEAR) {
        if (threadIdx.x == WARPS * 32) make_barriers<Shape>(b, s.warps());
        if (warp == WARPS) {
            __syncwarp();
            asm volatile("bar.arrive 1, %0;" ::"n"(THREADS) : "memory");
        } else {
            asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
        }
    }
    if (!NEAR && warp == WARPS) {
        fetch_weights<Shape, false>(g.p, s, smem + Shape::W_AT, b);
        bring_next<Shape, false>(g, s, b);
    } else if (warp > WARPS) {
        if (one_lane()) {
            if (!Shape::PLANES) prefetch_map(g.x);
            ready_wait(g.p.ready, g.p.overtakes);
            overlap_next();  // not before: see ready.cuh
            barrier_arrive(&b.inputs);
            fetch_activations<Shape>(g, s, smem, b);
            ready_leave(g.p.ready);
            if (NEAR) claims_leave(g.p.claims);
        }
    } else if (warp < s.warps()) {
        // What was written before this kernel comes through the activations' ring alone, and what is written here comes after that.
        typename Shape::Sums acc = {};
        const uint32_t lane = threadIdx.x % 32, tile = s.group * GROUP_TILES + warp, row = tile * UNIT_ROWS;
        // A warp without a row tile multiplies zeros.
        const __half2 factor = as_half2(row < g.p.w.n ? g.p.w.row_factors[tile * 8 + lane / 4] : 0);
        if constexpr (Shape::PLANES) multiply_planes<Shape, NEAR>(acc, s, smem, b);
        else multiply<Shape, NEAR>(acc, s, factor, smem, b);
        if (row >= g.p.w.n) return;
        scale_sums<Shape>(acc, Shape::PLANES ? make_float2(1.f / 16.f, 1.f / 16.f) : undo_factor(factor));
        uint8_t* transpose = smem + Shape::TRANSPOSE_AT + warp * TRANSPOSE_BYTES;
        const float* b = g.p.y.bias ? g.p.y.bias + row + lane / 4 : nullptr;
        const float2 bias = b ? make_float2(b[0], b[8]) : make_float2(0.f, 0.f);
        if (g.p.y.partials || g.p.y.residual) store_floats<Shape::TOKENS>(g.p, s.slice, row, 0, acc, transpose);
        else if constexpr (!Shape::PLANES) store_halves<Shape::TOKENS>(g.p, row, bias, 0, acc, transpose);
        else if (row < g.p.y.split_row) store_halves<Shape::TOKENS, false>(g.p, g.p.y.out + row, g.p.y.out_stride, bias, 0, acc, transpose);
        else store_planes(g.p, row, bias, acc, smem + Shape::TRANSPOSE_AT + warp / GROUP_TILES * GROUP_TILES * TRANSPOSE_BYTES,
                          reinterpret_cast<float*>(smem + Shape::MOST_AT) + warp / GROUP_TILES * GROUP_TILES * PLANE_TOKENS,
                          warp / GROUP_TILES);
        if (g.p.announce && row < g.p.y.split_row) {
            __syncwarp();
            if (lane == 0) ready_count(g.p.announce, 1);
        }
    }
#endif
}

template <class Shape>
int32_t run(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    const bool halves = !p->y.partials && !p->y.residual;
    if (halves && (p->y.out_stride % 8 || p->y.gelu_stride % 8)) return PEREGRINE_BAD_SHAPE;  // 16-byte stores
    const cuuint64_t k_units = p->w.k / UNIT_INPUTS;
    const cuuint64_t token_bytes = (cuuint64_t)p->x_stride * 2;
    const TensorShape<3> x = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, {UNIT_INPUTS, p->tokens, k_units}, {token_bytes, TOKEN_BYTES},
                              {UNIT_INPUTS, Shape::TOKENS, Shape::UNITS}, CU_TENSOR_MAP_SWIZZLE_128B};
    const bool brings = p->next.w.units;
    if (brings && p->next.slices == 0) return PEREGRINE_BAD_SHAPE;
    const Slices slices(p->w, p->slices, Shape::UNITS);
    const Deal deal(p->w, p->slices, multiprocessors);
    const GptqNext next = brings ? p->next : GptqNext{p->w, p->slices};
    BatchParams g = {{}, *p, slices, deal, Next(next, multiprocessors, Shape::UNITS), Near(p->w, slices, deal), {}};
    g.next_near = Near(next.w, g.next.slices, g.next.deal);
    if (!brings) g.next.units = g.next_near.base = nullptr;
    const cudaError_t e = Shape::PLANES ? cudaSuccess : make_tensor_map(&g.x, p->x, x);
    if (e != cudaSuccess) return (int32_t)e;
    const dim3 grid(deal.parts * p->slices);
    if (Shape::NEAR && g.near.base && !p->claims.words) return PEREGRINE_BAD_SHAPE;
    if constexpr (Shape::NEAR)
        if (g.near.base) return launch(gptq_batch_wgmma_kernel<Shape, true>, grid, THREADS, Shape::ASKED_BYTES, l, g);
    return launch(gptq_batch_wgmma_kernel<Shape, false>, grid, THREADS, Shape::ASKED_BYTES, l, g);
}

// Rows that go through GELU come in whole units of the next product's inputs, and its inputs are what it reads of a row.
int32_t run_planes(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    const GptqOutput& y = p->y;
    const bool halves = !y.partials && !y.residual;
    if (p->tokens > PLANE_TOKENS || p->tokens <= PEREGRINE_GEMV_TOKENS || p->x_stride < p->w.k || p->x_stride % UNIT_INPUTS)
        return PEREGRINE_BAD_SHAPE;
    if (halves && (!y.planes || p->w.n % UNIT_INPUTS || y.split_row % UNIT_INPUTS || y.gelu_stride % UNIT_INPUTS ||
                   p->w.n > y.split_row + y.gelu_stride))
        return PEREGRINE_BAD_SHAPE;
    return run<BatchShape<1, false, PLANE_TOKENS, true>>(p, l, multiprocessors);
}

template <int SCALES, bool ZEROS>
int32_t run_tokens(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    if (p->tokens <= 8) return run<BatchShape<SCALES, ZEROS, 8>>(p, l, multiprocessors);
    if (p->tokens <= 16) return run<BatchShape<SCALES, ZEROS, 16>>(p, l, multiprocessors);
    if (p->tokens <= 24) return run<BatchShape<SCALES, ZEROS, 24>>(p, l, multiprocessors);
    if (p->tokens <= 32) return run<BatchShape<SCALES, ZEROS, 32>>(p, l, multiprocessors);
    if (p->tokens <= 40) return run<BatchShape<SCALES, ZEROS, 40>>(p, l, multiprocessors);
    if (p->tokens <= 48) return run<BatchShape<SCALES, ZEROS, 48>>(p, l, multiprocessors);
    if (p->tokens <= 64) return run<BatchShape<SCALES, ZEROS, 64>>(p, l, multiprocessors);
    static_assert(PEREGRINE_BATCH_TOKENS == 72, "the widest");
    return run<BatchShape<SCALES, ZEROS, 72>>(p, l, multiprocessors);
}

}  // namespace

uint32_t gptq_batch_wgmma_multiprocessors() { return hopper_multiprocessors<gptq_batch_wgmma_kernel<BatchShape<1, false, 16>, false>>(); }

extern "C" uint32_t gptq_batch_planes(const GptqMatrix* w) {
    return w->scales_per_row == 1 && !w->has_zeros && gptq_batch_wgmma_multiprocessors() > 0;
}

int32_t gptq_batch_wgmma(const GptqMatmulParams* p, const Launch* l, uint32_t multiprocessors) {
    if (p->planes != 0) return gptq_batch_planes(&p->w) ? run_planes(p, l, multiprocessors) : PEREGRINE_BAD_SHAPE;
    if (p->y.planes) return PEREGRINE_BAD_SHAPE;
    switch (p->w.scales_per_row * 2 + p->w.has_zeros) {
        case 2: return run_tokens<1, false>(p, l, multiprocessors);
        case 3: return run_tokens<1, true>(p, l, multiprocessors);
        case 4: return run_tokens<2, false>(p, l, multiprocessors);
        case 5: return run_tokens<2, true>(p, l, multiprocessors);
        default: return PEREGRINE_BAD_SHAPE;
    }
}
