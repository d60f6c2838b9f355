// row_factors — of each row of a matrix in units, the power of two by which gptq_batch and gptq_gemm bring its scales near the top of f16, so
// that a code that is an f16 subnormal times the scale is a normal number.   Reference: src/repack.rs::row_factors
// Shapes   n % 16 == 0, k % 64 == 0.   Reads the scales of all units: 17 sectors apart.   Writes [n / 16][8] half2, rows g and g + 8.
// Numbers  the square root is stored, for f16 does not reach 2^23: the largest scale times the factor twice lies in [2^13, 2^15). A row of
//          zeros has factor 1; of scales below 2^-17 the factor is 2^15, the largest.
// Mapping  one block a row tile, 8 lanes a unit. Runs once a matrix at load, when all parts of the matrix are there.
// Cost     3.2 MB of a matrix's 55, a sector of each unit; not measured apart.
#include "launch.cuh"
#include "units.cuh"

namespace {

constexpr int THREADS = 256, PLACES = THREADS / 8;  // units side by side
constexpr int TOP = 14, MOST = 15, HALF_BIAS = 15;  // exponents: of a scale at the top; of a factor; f16's bias

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return as_u32(__hmax2(as_half2(a), as_half2(b))); }

// Of the largest scale, as f16 bits.
__device__ __forceinline__ uint32_t factor_of(uint32_t largest) {
    if (largest == 0) return HALF_BIAS << 10;
    const int exponent = ilogbf(__half2float(__ushort_as_half((uint16_t)largest)));
    // Rounded down, also below zero.
    return (min((TOP - min(exponent, HALF_BIAS + 1)) >> 1, MOST) + HALF_BIAS) << 10;
}

__global__ void __launch_bounds__(THREADS) row_factors_kernel(const __grid_constant__ RowFactorsParams p) {
    wait_previous();
    __shared__ uint32_t part[PLACES][8];
    const uint32_t g = threadIdx.x % 8, place = threadIdx.x / 8, k_units = p.w.k / UNIT_INPUTS;
    const uint32_t bytes = UNIT_CODE_BYTES + UNIT_SCALE_BYTES * p.w.scales_per_row * (1 + p.w.has_zeros);
    const uint8_t* tile = p.w.units + (size_t)blockIdx.x * k_units * bytes + UNIT_CODE_BYTES + g * 4;
    uint32_t largest = 0;
    for (uint32_t i = place; i < k_units * p.w.scales_per_row; i += PLACES) {
        const uint32_t unit = i / p.w.scales_per_row, half = i % p.w.scales_per_row;
        largest = larger(largest, *reinterpret_cast<const uint32_t*>(tile + (size_t)unit * bytes + half * UNIT_SCALE_BYTES) & 0x7fff7fffu);
    }
    part[place][g] = largest;
    __syncthreads();
    if (threadIdx.x >= 8) return;
    for (int i = 1; i < PLACES; i++) largest = larger(largest, part[i][g]);
    p.factors[blockIdx.x * 8 + g] = factor_of(largest & 0xffff) | factor_of(largest >> 16) << 16;
}

}  // namespace

extern "C" int32_t row_factors(const RowFactorsParams* p, const Launch* l) {
    const GptqMatrix& w = p->w;
    if (w.n == 0 || w.n % UNIT_ROWS || w.k == 0 || w.k % UNIT_INPUTS) return PEREGRINE_BAD_SHAPE;
    if (w.scales_per_row != 1 && w.scales_per_row != 2) return PEREGRINE_BAD_SHAPE;
    return launch(row_factors_kernel, dim3(w.n / UNIT_ROWS), THREADS, 0, l, *p);
}
