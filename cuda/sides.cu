// sides — how far each 4 KB piece of memory is from a multiprocessor: the two halves of L2, see src/gpu/sides.rs.
// Shapes   data: pieces of PEREGRINE_PIECE_BYTES, whose bytes stay as they are; pieces [count] -> cycles [blocks, count], smid [blocks].
// Mapping  one block a multiprocessor, as each asks for more than half of the shared memory; one thread each, one block after the other,
//          so that no two are measured at once. They wait for their turns: a cooperative launch.
// A time is that of ATOMICS atomics on the piece's first word, none of which waits for another: the best of ROUNDS, after one that brings
// the line to L2 and the page's address to the TLB. Atomics are done in L2 itself, so no L1 hides where that is.
// Measured 293 to 352 cycles near, 464 to 555 far, of 423 pieces on an H200 by one multiprocessor: none between.
#include "launch.cuh"
#include "probes.h"

namespace {

constexpr int ATOMICS = 8;
constexpr int ROUNDS = 3;
constexpr size_t MOST_OF_SMEM = 150000;

__device__ uint32_t cycles_of(uint32_t* word, uint32_t* sink) {
    atomicAdd(word, 0u);
    uint32_t best = 0xffffffff;
    for (int round = 0; round < ROUNDS; round++) {
        const long long start = clock64();
        uint32_t sum = 0;
#pragma unroll
        for (int i = 0; i < ATOMICS; i++) sum += atomicAdd(word, 0u);
        // A store of what came back: the clock behind it is read after the last one has.
        *(volatile uint32_t*)sink = sum;
        best = min(best, (uint32_t)(clock64() - start));
    }
    return best;
}

__global__ void sides_kernel(const __grid_constant__ SidesParams p) {
    wait_previous();
    extern __shared__ uint32_t sink[];
    if (threadIdx.x) return;
    volatile uint32_t* turn = p.turn;
    while (*turn != blockIdx.x) __nanosleep(200);
    __threadfence();
    for (uint32_t i = 0; i < p.count; i++) {
        uint32_t* word = p.data + (size_t)p.pieces[i] * (PEREGRINE_PIECE_BYTES / sizeof(uint32_t));
        p.cycles[(size_t)blockIdx.x * p.count + i] = cycles_of(word, sink);
    }
    uint32_t smid;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(smid));
    p.smid[blockIdx.x] = smid;
    __threadfence();
    *turn = blockIdx.x + 1;
}

}  // namespace

extern "C" int32_t sides(const SidesParams* p, const Launch* l) {
    if (p->blocks == 0 || p->count == 0) return PEREGRINE_BAD_SHAPE;
    return launch<true>(sides_kernel, dim3(p->blocks), 32, MOST_OF_SMEM, l, *p);
}
