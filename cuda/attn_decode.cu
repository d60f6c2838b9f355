// attn_decode — multi-query attention of 1 to 8 tokens on a long cache, split over the context.   Reference: reference.rs::attention
// Shapes   qkv [tokens, heads + 2, 64] f16 (queries rotated), caches [max_context, 64] f16, out [tokens, out_stride] f16.
// Mapping  block (chunk, head tile, token): 16 heads of one token against 256 keys; each of 4 warps has 64 keys. Heads are the M of
//          mma, so the shared K and V are read once for 16 heads. The grid covers max_context (a graph must not depend on the
//          position); blocks beyond the context leave at once. Warps are merged in shared memory; if there is more than one chunk,
//          the last block of a (token, head tile) to arrive merges them, in chunk order: same bits every run.
// Cost     2048 keys: 0.5 MB of K and V a layer from L2; latency, not bandwidth.
// Measured 4.4 us at position 128, 9.1 at 1024, 10.0 at 2047 (1 token), 14.2 at 2040 (8 tokens); H200.
#include "launch.cuh"
#include "attn.cuh"

namespace {

constexpr int WARPS = PEREGRINE_ATTN_CHUNK / TILE_KEYS;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = 16;
constexpr int ROW_FLOATS = HEAD_DIM + 2;  // values, then sum and largest score
constexpr int LANE_VALUES = ROWS * HEAD_DIM / THREADS;

// What a thread holds while rows are merged: LANE_VALUES values of one row.
struct Merged {
    float value[LANE_VALUES];
    float sum, top;
};

// Adds one partial row. `Load` reads a float of it.
template <typename Load>
__device__ __forceinline__ void merge(Merged& m, uint32_t first, Load load) {
    const float top = load(HEAD_DIM + 1);
    if (top == -INFINITY) return;
    const float joint = fmaxf(m.top, top);
    const float mine = exp2f(m.top - joint), other = exp2f(top - joint);
#pragma unroll
    for (int i = 0; i < LANE_VALUES; i++) m.value[i] = m.value[i] * mine + load(first + i) * other;
    m.sum = m.sum * mine + load(HEAD_DIM) * other;
    m.top = joint;
}

__device__ __forceinline__ void store(const AttnDecodeParams& p, const Merged& m, uint32_t token, uint32_t head, uint32_t first) {
    if (head >= p.heads) return;
    uint16_t* out = p.out + (size_t)token * p.out_stride + head * HEAD_DIM + first;
#pragma unroll
    for (int i = 0; i < LANE_VALUES; i++) out[i] = __half_as_ushort(__float2half_rn(m.value[i] / m.sum));
}

// 16 heads of one token against this warp's 64 keys; the result goes to `rows` [16][66] in shared memory, over the keys.
__device__ void attend_warp(const AttnDecodeParams& p, uint8_t* smem, float* rows, uint32_t token, uint32_t head0, uint32_t key0, uint32_t length) {
    const uint32_t lane = threadIdx.x % 32;
    AttnState state;
    clear(state);
    if (key0 < length) {
        request_tile(smem, p.k_cache, key0, length, lane, 32);
        request_tile(smem + TILE_BYTES, p.v_cache, key0, length, lane, 32);
        cp_async_commit();
        uint32_t q[4][4];
        const uint16_t* queries = p.qkv + (size_t)token * (p.heads + 2) * HEAD_DIM;
        const uint32_t a = head0 + lane / 4, b = a + 8;
        load_queries(q, a < p.heads ? queries + a * HEAD_DIM : nullptr, b < p.heads ? queries + b * HEAD_DIM : nullptr);
        cp_async_wait<0>();
        __syncwarp();
        const uint32_t last[2] = {length - 1, length - 1};
        attend(state, q, smem, smem + TILE_BYTES, key0, last);
        __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float* row = rows + (lane / 4 + r * 8) * ROW_FLOATS;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            row[j * 8 + lane % 4 * 2] = state.out[j][r * 2];
            row[j * 8 + lane % 4 * 2 + 1] = state.out[j][r * 2 + 1];
        }
        const float sum = row_sum(state.sum[r]);
        if (lane % 4 == 0) row[HEAD_DIM] = sum, row[HEAD_DIM + 1] = state.top[r];
    }
}

__global__ void __launch_bounds__(THREADS) attn_decode_kernel(const __grid_constant__ AttnDecodeParams p) {
    overlap_next();
    extern __shared__ __align__(128) uint8_t smem[];
    __shared__ uint32_t arrived;
    const uint32_t chunk = blockIdx.x, tile = blockIdx.y, token = blockIdx.z, warp = threadIdx.x / 32;
    wait_previous();
    const uint32_t length = min(p.token->position + token + 1, p.max_context);
    if (chunk * PEREGRINE_ATTN_CHUNK >= length) return;
    const uint32_t chunks = (length + PEREGRINE_ATTN_CHUNK - 1) / PEREGRINE_ATTN_CHUNK;

    uint8_t* mine = smem + warp * 2 * TILE_BYTES;
    attend_warp(p, mine, reinterpret_cast<float*>(mine), token, tile * ROWS, chunk * PEREGRINE_ATTN_CHUNK + warp * TILE_KEYS, length);
    __syncthreads();

    const uint32_t row = threadIdx.x / (HEAD_DIM / LANE_VALUES), first = threadIdx.x % (HEAD_DIM / LANE_VALUES) * LANE_VALUES;
    const uint32_t head = tile * ROWS + row;
    Merged m = {{}, 0.f, -INFINITY};
    for (int w = 0; w < WARPS; w++) {
        const float* r = reinterpret_cast<const float*>(smem + w * 2 * TILE_BYTES) + row * ROW_FLOATS;
        merge(m, first, [r](uint32_t i) { return r[i]; });
    }
    if (chunks == 1) {
        store(p, m, token, head, first);
        return;
    }
    const uint32_t group = token * gridDim.y + tile;
    float* partials = p.partials + (size_t)group * gridDim.x * ROWS * ROW_FLOATS;
    float* r = partials + ((size_t)chunk * ROWS + row) * ROW_FLOATS;
#pragma unroll
    for (int i = 0; i < LANE_VALUES; i++) r[first + i] = m.value[i];
    if (first == 0) r[HEAD_DIM] = m.sum, r[HEAD_DIM + 1] = m.top;
    __threadfence();  // the partial row is visible before the arrival is
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(p.arrivals + group, 1);
    __syncthreads();
    if (arrived != chunks - 1) return;
    __threadfence();  // and the others' rows are read after their arrivals
    Merged all = {{}, 0.f, -INFINITY};
    for (uint32_t c = 0; c < chunks; c++) {
        const float* other = partials + ((size_t)c * ROWS + row) * ROW_FLOATS;
        merge(all, first, [other](uint32_t i) { return __ldcg(other + i); });
    }
    store(p, all, token, head, first);
    if (threadIdx.x == 0) p.arrivals[group] = 0;
}

}  // namespace

extern "C" int32_t attn_decode(const AttnDecodeParams* p, const Launch* l) {
    if (p->tokens == 0 || p->tokens > PEREGRINE_GEMV_TOKENS || p->heads == 0 || p->max_context == 0) return PEREGRINE_BAD_SHAPE;
    const dim3 grid((p->max_context + PEREGRINE_ATTN_CHUNK - 1) / PEREGRINE_ATTN_CHUNK, (p->heads + ROWS - 1) / ROWS, p->tokens);
    return launch(attn_decode_kernel, grid, THREADS, WARPS * 2 * TILE_BYTES, l, *p);
}
