// attn_wgmma — multi-query causal attention of many tokens by the tensor cores of sm_90a; attn_prefill.cu launches it there.
//
// Design   All heads share one K and V, so a row of the problem is a query, whatever its head: row r is head r % heads of token
//          r / heads. A tile of 192 rows is three tokens of 71 heads: next to no key of a tile is masked but in its last step, and
//          there is no remainder per head. Three warpgroups of 64 rows share the 96 keys at hand; a fourth brings K, V and queries in
//          by cp.async (which can put zeros behind the last key, where the cache may hold anything), 128-byte swizzled, up to four
//          key tiles and one row tile ahead.
//          One block a multiprocessor stays for the whole call and takes row tiles in turns, the longest context first, to and
//          fro, so that each gets as many long as short ones: the last to finish is one key tile behind at 2048 tokens.
// Step     scores of the next 96 keys and values weighted by the last weights are issued together, in turns with the other
//          warpgroups (ping-pong), so that the tensor cores are busy while the others are at their softmax. Queries and weights are
//          A operands in registers: with queries in shared memory its bandwidth would nearly be used up (107 of 128 bytes a clock).
// Floor    one layer at 2048 tokens: 38 GFLOP, 40 us at 950 TFLOP/s; as many exponentials as the special function units make in 40 us.
// Measured 97 us a layer at 2048 tokens (392 TFLOP/s), 13.9 at 512, 9.2 at 256, 5.4 at 128, 53 for 512 tokens behind 1536; H200, launches
//          back to back, overlapping. The same run: mma.sync 200, 21.6, 9.8, 6.4, 102; PyTorch 2.11 by cuDNN 109 at 2048 tokens, by
//          FlashAttention 2 170. At 128 tokens and less a loop of calls shows the host, 4 to 5 us a call; the narrow kernel: 3.6 at 64.
// Tried    (us at 2048; the same with two waits, for scores and then for values, took 100) 96 keys without taking turns: 105; 128 keys,
//          queries in shared memory: 103; 3 x 64 keys: 109; 4 x 64 keys: 106; 2 x 128 keys: 121. Holding the softmax in front of the
//          wait for the values' product, as FlashAttention 3 does (ptxas moves that wait to the front otherwise): 103.5, and 120 with
//          128 keys. Each sixth exponential as a polynomial: 106.
#pragma once
#include "attn.cuh"
#include "bulk.cuh"
#include "launch.cuh"

// What a call's size decides: warpgroups that compute, keys of a step, stages of K and V; registers of a thread that computes and of
// one that loads, which together must not exceed what the block was launched with, or it waits for ever.
template <int GROUPS_, int KEYS_, int STAGES_, int COMPUTE_, int LOAD_>
struct AttnShape {
    static constexpr int GROUPS = GROUPS_, KEYS = KEYS_, STAGES = STAGES_, COMPUTE = COMPUTE_, LOAD = LOAD_;
    static constexpr int ROWS = GROUPS * 64, THREADS = (GROUPS + 1) * 128;
    static constexpr int Q_BYTES = ROWS * HEAD_DIM * 2, K_BYTES = KEYS * HEAD_DIM * 2;
    static constexpr int ALIGN = 1024;  // of a swizzled tile
    static constexpr int SMEM_BYTES = ALIGN + 2 * Q_BYTES + STAGES * 2 * K_BYTES + (4 + 2 * STAGES) * 8;
    static_assert(KEYS == 64 || KEYS == 96, "the scores there is an instruction for below");
};
using AttnWide = AttnShape<3, 96, 4, 160, 32>;
using AttnNarrow = AttnShape<1, 64, 4, 240, 24>;  // short prompts: more multiprocessors have something to do

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A 128-byte swizzled tile of rows of 64 f16, eight rows every 1024 bytes; adding 2 goes on by 16 columns, 128 by 16 rows.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
    return (uint64_t)(address >> 4) | 1ull << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

#define PEREGRINE_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PEREGRINE_32(d) PEREGRINE_8(d, 0), PEREGRINE_8(d, 8), PEREGRINE_8(d, 16), PEREGRINE_8(d, 24)
#define PEREGRINE_NAMES_32                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// d[64 x 64] (+)= a[64 x 16] * b[16 x 64]; b has a key a row: K, whose rows are columns of b (TRANSPOSED 0), or V (1).
template <int TRANSPOSED>
__device__ __forceinline__ void wgmma_64(float (&d)[32], const uint32_t* a, uint64_t b, bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PEREGRINE_NAMES_32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, %38;\n}"
                 : PEREGRINE_32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(TRANSPOSED));
}
__device__ __forceinline__ void wgmma_scores(float (&d)[32], const uint32_t* a, uint64_t b, bool add) { wgmma_64<0>(d, a, b, add); }
__device__ __forceinline__ void wgmma_scores(float (&d)[48], const uint32_t* a, uint64_t b, bool add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %53, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {" PEREGRINE_NAMES_32
                 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47}, {%48,%49,%50,%51}, %52, add, 1, 1, 0;\n}"
                 : PEREGRINE_32(d), PEREGRINE_8(d, 32), PEREGRINE_8(d, 40)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

// Registers written so far are seen by the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait_all() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Keeps the compiler from using accumulators in front of the wait above.
template <int N>
__device__ __forceinline__ void arrived(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Rows that a block works on at a time, and the keys they see.
struct RowTile {
    uint32_t first;      // row
    uint32_t length;     // keys its last row sees
    uint32_t key_tiles;
};

// The block's row tile of a turn; false when there is none. Tile 0 of the call has the last rows.
template <typename Shape>
__device__ __forceinline__ bool row_tile(RowTile& tile, uint32_t turn, const AttnPrefillParams& p, uint32_t position) {
    const uint32_t rows = p.tokens * p.heads, tiles = (rows + Shape::ROWS - 1) / Shape::ROWS;
    const uint32_t index = turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (index >= tiles) return false;
    tile.first = (tiles - 1 - index) * Shape::ROWS;
    tile.length = position + (min(tile.first + Shape::ROWS, rows) - 1) / p.heads + 1;
    tile.key_tiles = (tile.length + Shape::KEYS - 1) / Shape::KEYS;
    return true;
}

// Shared memory of a block: tiles first, then the barriers. Stages and query tiles are used in turns.
template <typename Shape>
struct AttnMemory {
    uint32_t q, kv;  // addresses
    uint64_t *q_full, *q_empty, *full, *empty;

    __device__ __forceinline__ explicit AttnMemory(uint8_t* raw) {
        uint8_t* base = raw + (Shape::ALIGN - smem_address(raw) % Shape::ALIGN) % Shape::ALIGN;
        q = smem_address(base), kv = q + 2 * Shape::Q_BYTES;
        q_full = reinterpret_cast<uint64_t*>(base + 2 * Shape::Q_BYTES + Shape::STAGES * 2 * Shape::K_BYTES);
        q_empty = q_full + 2, full = q_full + 4, empty = full + Shape::STAGES;
    }
    __device__ __forceinline__ uint32_t k_tile(uint32_t stage) const { return kv + stage * 2 * Shape::K_BYTES; }
    __device__ __forceinline__ uint32_t v_tile(uint32_t stage) const { return k_tile(stage) + Shape::K_BYTES; }
};

// The warpgroup that loads. What it wrote is for the tensor cores to read, so each thread waits for its own copies, fences, and then
// arrives: it does so for a stage when the next one has been asked for.
template <typename Shape>
__device__ __forceinline__ void attn_load(const AttnPrefillParams& p, const AttnMemory<Shape>& at, uint32_t position, size_t slot) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Shape::LOAD));
    const uint32_t thread = threadIdx.x % 128, rows = p.tokens * p.heads;
    const uint16_t *k_cache = p.k_cache + slot, *v_cache = p.v_cache + slot;
    uint64_t *q_due = nullptr, *stage_due = nullptr;
    auto signal = [&] {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        if (q_due) barrier_arrive(q_due);
        if (stage_due) barrier_arrive(stage_due);
    };
    Place<Shape::STAGES> place;
    RowTile tile;
    for (uint32_t turn = 0; row_tile<Shape>(tile, turn, p, position); turn++) {
        const uint32_t half = turn % 2;
        barrier_wait(at.q_empty + half, (turn / 2 & 1) ^ 1);
#pragma unroll 2
        for (uint32_t c = thread; c < Shape::ROWS * 8; c += 128) {
            const uint32_t r = c / 8, j = c % 8, row = tile.first + r;
            const bool valid = row < rows;
            // Behind each token's queries lie its key and value.
            const size_t from = valid ? ((size_t)row + row / p.heads * 2) * HEAD_DIM + j * 8 : 0;
            cp_async(at.q + half * Shape::Q_BYTES + r * 128 + (j ^ (r % 8)) * 16, p.qkv + from, valid);
        }
        for (uint32_t t = 0; t < tile.key_tiles; t++) {
            barrier_wait(at.empty + place.slot, place.parity ^ 1);
#pragma unroll 4
            for (uint32_t c = thread; c < Shape::KEYS * 8; c += 128) {
                const uint32_t r = c / 8, j = c % 8, key = t * Shape::KEYS + r;
                const bool valid = key < tile.length;
                const size_t from = (size_t)(valid ? key : 0) * HEAD_DIM + j * 8;
                const uint32_t to = r * 128 + (j ^ (r % 8)) * 16;
                cp_async(at.k_tile(place.slot) + to, k_cache + from, valid);
                cp_async(at.v_tile(place.slot) + to, v_cache + from, valid);
            }
            cp_async_commit();
            cp_async_wait<1>();
            signal();
            q_due = t == 0 ? at.q_full + half : nullptr, stage_due = at.full + place.slot;
            place.advance();
        }
    }
    cp_async_wait<0>();
    signal();
}

// Softmax of one step, and the sums that go with it. Lane l holds rows l/4 (r = 0) and l/4 + 8 (r = 1): score[4 j + 2 r + c] is key
// key0 + 8 j + 2 (l % 4) + c. Rows see keys up to last[r], all of them up to `sure`.
template <int KEYS>
struct Softmax {
    float sum[2] = {0.f, 0.f}, top[2] = {-INFINITY, -INFINITY};  // `sum` is this lane's share

    // Scores become weights; `shrink` is what earlier values are to be multiplied by.
    __device__ __forceinline__ void step(float (&score)[KEYS / 2], float shrink[2], uint32_t key0, uint32_t sure, const uint32_t last[2]) {
        if (key0 + KEYS - 1 > sure) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++)
                if (key0 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 > last[i / 2 % 2]) score[i] = -INFINITY;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float even = top[r], odd = -INFINITY;
#pragma unroll
            for (int i = 2 * r; i < KEYS / 2; i += 4) even = fmaxf(even, score[i]), odd = fmaxf(odd, score[i + 1]);
            const float now = row_max(fmaxf(even, odd)), low = now * SCORE_SCALE;
            shrink[r] = power2((top[r] - now) * SCORE_SCALE);
            top[r] = now;
            even = odd = 0.f;
#pragma unroll
            for (int i = 2 * r; i < KEYS / 2; i += 4) {
                score[i] = power2(fmaf(score[i], SCORE_SCALE, -low)), score[i + 1] = power2(fmaf(score[i + 1], SCORE_SCALE, -low));
                even += score[i], odd += score[i + 1];
            }
            sum[r] = sum[r] * shrink[r] + (even + odd);
        }
    }
};

// A warpgroup that computes: 64 rows of each tile.
template <typename Shape>
__device__ __forceinline__ void attn_compute(const AttnPrefillParams& p, const AttnMemory<Shape>& at, uint32_t position) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Shape::COMPUTE));
    constexpr int KEYS = Shape::KEYS;
    const uint32_t group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, rows = p.tokens * p.heads;
    // Named barrier 1 + g: group g may issue. Each hands on to the next; the first turn is given here.
    auto await_turn = [&] {
        if (Shape::GROUPS > 1) asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
    };
    auto hand_on = [&](uint32_t to) {
        if (Shape::GROUPS > 1) asm volatile("bar.arrive %0, 256;" ::"r"(1 + to % Shape::GROUPS) : "memory");
    };
    if (group == 0) hand_on(0);
    auto arrive = [&](uint64_t* barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    Place<Shape::STAGES> place;
    RowTile tile;
    for (uint32_t turn = 0; row_tile<Shape>(tile, turn, p, position); turn++) {
        const uint32_t row[2] = {tile.first + group * 64 + warp * 16 + lane / 4, tile.first + group * 64 + warp * 16 + lane / 4 + 8};
        const uint32_t token[2] = {min(row[0], rows - 1) / p.heads, min(row[1], rows - 1) / p.heads};
        const uint32_t last[2] = {position + token[0], position + token[1]}, sure = position + tile.first / p.heads;
        float score[KEYS / 2], out[32], shrink[2];
        uint32_t q[16], weight[KEYS / 4];
        Softmax<KEYS> softmax;
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] = 0.f;
        auto scores = [&] {
#pragma unroll
            for (int s = 0; s < 4; s++) wgmma_scores(score, q + 4 * s, tile_descriptor(at.k_tile(place.slot)) + s * 2, s > 0);
        };
        auto values = [&](uint32_t stage) {
#pragma unroll
            for (int s = 0; s < KEYS / 16; s++) wgmma_64<1>(out, weight + 4 * s, tile_descriptor(at.v_tile(stage)) + s * 128, true);
        };
        // An accumulator of two n8 tiles is the A operand of one k16 step.
        auto to_weights = [&] {
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) weight[i] = pack(score[2 * i], score[2 * i + 1]);
        };

        barrier_wait(at.q_full + turn % 2, turn / 2 & 1);
        const uint32_t q_row = at.q + turn % 2 * Shape::Q_BYTES + (group * 64 + warp * 16 + lane % 16) * 128;
#pragma unroll
        for (int s = 0; s < 4; s++) ldmatrix(q + 4 * s, q_row + ((2 * s + lane / 16) ^ (lane % 8)) * 16);
        arrive(at.q_empty + turn % 2);
        barrier_wait(at.full + place.slot, place.parity);
        await_turn();
        wgmma_fence();
        scores();
        hand_on(group + 1);
        wgmma_wait_all(), arrived(score);
        softmax.step(score, shrink, 0, sure, last);
        to_weights();
        for (uint32_t t = 1; t < tile.key_tiles; t++) {
            const uint32_t before = place.slot;
            place.advance();
            barrier_wait(at.full + place.slot, place.parity);
            await_turn();
            wgmma_fence();
            scores();
            values(before);
            hand_on(group + 1);
            wgmma_wait_all(), arrived(score), arrived(out);
            arrive(at.empty + before);
            softmax.step(score, shrink, t * KEYS, sure, last);
            // Mostly the maximum has been seen before: then there is nothing to scale.
            if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
                for (int i = 0; i < 32; i++) out[i] *= shrink[i / 2 % 2];
            }
            to_weights();
        }
        wgmma_fence();
        values(place.slot);
        wgmma_wait_all(), arrived(out);
        arrive(at.empty + place.slot);
        place.advance();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float scale = 1.f / row_sum(softmax.sum[r]);
            if (row[r] >= rows) continue;
            uint16_t* to = p.out + (size_t)token[r] * p.out_stride + (row[r] - token[r] * p.heads) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < 8; j++)
                *reinterpret_cast<uint32_t*>(to + j * 8) = pack(out[4 * j + 2 * r] * scale, out[4 * j + 2 * r + 1] * scale);
        }
    }
}

#undef PEREGRINE_8
#undef PEREGRINE_32
#undef PEREGRINE_NAMES_32
#endif

template <typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) attn_wgmma_kernel(const __grid_constant__ AttnPrefillParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t raw[];
    overlap_next();
    const AttnMemory<Shape> at(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) barrier_init(at.q_full + i, 128), barrier_init(at.q_empty + i, Shape::GROUPS * 4);
        for (int i = 0; i < Shape::STAGES; i++) barrier_init(at.full + i, 128), barrier_init(at.empty + i, Shape::GROUPS * 4);
        barrier_init_done();
    }
    __syncthreads();
    wait_previous();
    const uint32_t position = min(p.token[0].position, p.max_context - min(p.tokens, p.max_context));
    const size_t slot = (size_t)min(p.token[0].slot, p.slots - 1) * p.max_context * HEAD_DIM;
    if (threadIdx.x / 128 == Shape::GROUPS)
        attn_load(p, at, position, slot);
    else
        attn_compute(p, at, position);
#endif
}
