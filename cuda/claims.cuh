// claims — blocks that each take a share of what lies by the sides of L2 (sides.cuh), of the side that their multiprocessor is at.
//
// Which one that is, a block does not know before it runs: it takes the next share of its side by an atomic, or of the other side when there
// is none left.
//     word 0                shares of side 0 that were taken
//     word 1                blocks that have no more use for the words; the last one clears all: zero before and after
//     word CLAIM_STRIDE     shares of side 1 that were taken, in a piece on side 1
// Launches that may be under way at once need words of their own.
// Tried    a share by %smid instead of an atomic, as decode_step has (one a multiprocessor; wrong if two blocks come to one): the same.
#pragma once
#include "sides.cuh"

constexpr uint32_t CLAIM_STRIDE = PIECE_BYTES / 4;

// What is the same in all lanes, in a uniform register: what comes from shared memory or an atomic, the compiler takes for each lane's own.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_or_sync(~0u, x); }

// The number of a share among those of its side.
struct Claimed {
    uint32_t side, number;
};

// By one warp of a block: asks for a share, and has it some 700 cycles later.
struct Claim {
    const SideClaims& c;
    uint32_t side, number;

    __device__ __forceinline__ Claim(const SideClaims& c) : c(c) {
        uint32_t multiprocessor;
        asm("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
        side = c.side_of[multiprocessor / 32 % (PEREGRINE_STEP_SMS / 32)] >> multiprocessor % 32 & 1;
        number = next(side);
    }
    // Not an addition: the compiler would wait for that at once, as it adds up for the warp.
    __device__ __forceinline__ uint32_t next(uint32_t side) const {
        return threadIdx.x % 32 ? 0 : atomicInc(c.words + side * CLAIM_STRIDE, 1u << 31);
    }
    // Of shares(side) of each side.
    template <class Shares>
    __device__ __forceinline__ Claimed take(const Shares& shares) const {
        uint32_t got = uniform(number), from = side;
        if (got >= shares(side)) {
            from ^= 1, got = uniform(next(from));
            if (got >= shares(from)) __trap();  // another launch has these words
        }
        return {from, got};
    }
};
// By one thread of each block, behind its last use of the words.
__device__ __forceinline__ void claims_leave(const SideClaims& c) {
    if (atomicAdd(c.words + 1, 1) != gridDim.x - 1) return;
    c.words[0] = c.words[1] = c.words[CLAIM_STRIDE] = 0;
}
