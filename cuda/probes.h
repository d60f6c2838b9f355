// Kernels that no model runs: what the GPU's tensor cores keep, how fast it reads and multiplies, which memory is near. kernels.h has the
// conventions.
#ifndef PEREGRINE_PROBES_H
#define PEREGRINE_PROBES_H
#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// unpack_check: counts the products of a code as a subnormal f16 and a finite f16, and the sums of a unit's, that mma.sync gives exactly.
// All there are: 2 places x 16 codes x finite f16; 8192 units x 16 rows x 8 columns.
#define PEREGRINE_UNPACK_PRODUCTS (2 * 16 * 63488)
#define PEREGRINE_UNPACK_SUMS (8192 * 16 * 8)
typedef struct UnpackCheckParams {
    uint32_t* exact;  // two values, zero before: products, sums
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

// mma_peak: dense f16 products whose operands never move. For measuring.
typedef struct MmaPeakParams {
    float* sum;       // one value, never written: keeps the products
    float* flop;      // one value, or NULL: then nothing is multiplied, and the FLOP of a round of one block are written here
    uint32_t rounds;
    uint32_t blocks;
} MmaPeakParams;
int32_t mma_peak(const MmaPeakParams* p, const Launch* l);

// sides: how many cycles atomics on each of some pieces of memory take each multiprocessor, measured one after the other.
typedef struct SidesParams {
    uint32_t* data;          // pieces of PEREGRINE_PIECE_BYTES; written, but not changed
    const uint32_t* pieces;  // [count] numbers of pieces of data, not clamped
    uint32_t* cycles;        // [blocks, count]
    uint32_t* smid;          // [blocks] multiprocessor of each block, no two of the same
    uint32_t* turn;          // one value, zero before
    uint32_t count, blocks;  // blocks <= multiprocessors
} SidesParams;
int32_t sides(const SidesParams* p, const Launch* l);

#ifdef __cplusplus
}
#endif
#endif
