// mma_peak — the dense f16 product rate this GPU reaches, f32 sums: the ceiling every TFLOP/s is measured against.
// sm_90a   one block of 4 warpgroups an SM; each issues wgmma m64n128k16 on operands that stay in shared memory: no loads, no stores, no
//          epilogue. Other GPUs: 8 warps of mma.sync m16n8k16 with operands in registers, 8 chains each.
// Operands are random values of both signs: on zeros the chip draws less power and runs faster than any model could.
// Measured 903 to 906 TFLOP/s on an H200, 4000 rounds in 132 blocks.
// Cost     262144 FLOP an instruction, 64 cycles of a multiprocessor; 2000 rounds are some 2 ms on an H200.
#include "launch.cuh"
#include "probes.h"

namespace {

constexpr int ROUND = 8;  // instructions a warpgroup (or chains a warp) issues in a round

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PEREGRINE_WGMMA 1
#endif

__device__ __forceinline__ uint32_t mixed(uint32_t i) {
    i = (i ^ 61) ^ (i >> 16), i *= 9, i ^= i >> 4, i *= 0x27d4eb2d;
    return i ^ (i >> 15);
}

// Two f16 of magnitude 0.5 to 2, either sign.
__device__ __forceinline__ uint32_t halves(uint32_t i) { return (mixed(i) & 0x87ff87ffu) | 0x38003800u; }

constexpr int GROUPS = 4;  // warpgroups a block

#ifdef PEREGRINE_WGMMA
constexpr int A_BYTES = 64 * 16 * 2, B_BYTES = 128 * 16 * 2;

// Operand without swizzle, 8 x 8 cores of 128 bytes: neighbours along k are `lead` bytes apart, along the rows `stride`.
__device__ __forceinline__ uint64_t descriptor(const void* p, uint32_t lead, uint32_t stride) {
    const uint64_t at = (uint64_t)__cvta_generic_to_shared(p);
    return ((at & 0x3ffff) >> 4) | ((uint64_t)(lead >> 4) << 16) | ((uint64_t)(stride >> 4) << 32);
}
#endif

__global__ void __launch_bounds__(GROUPS * 128, 1) mma_peak_kernel(const __grid_constant__ MmaPeakParams p) {
    wait_previous();
    float sum = 0.f;
#ifdef PEREGRINE_WGMMA
    __shared__ __align__(1024) uint32_t a[GROUPS][A_BYTES / 4];
    __shared__ __align__(1024) uint32_t b[B_BYTES / 4];
    const int group = threadIdx.x / 128;
    for (int i = threadIdx.x; i < GROUPS * A_BYTES / 4; i += blockDim.x) a[0][i] = halves(i);
    for (int i = threadIdx.x; i < B_BYTES / 4; i += blockDim.x) b[i] = halves(i + 77777);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const uint64_t da = descriptor(a[group], 128, 256), db = descriptor(b, 128, 256);
    float d[64] = {};
    for (uint32_t round = 0; round < p.rounds; round++) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < ROUND; i++) {
            asm volatile(
                "{ wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
                "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,"
                "%62,%63}, %64, %65, 1, 1, 1, 0, 0; }"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
                  "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),
                  "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
                  "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),
                  "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]),
                  "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),
                  "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                : "l"(da), "l"(db));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
#pragma unroll
    for (int i = 0; i < 64; i++) sum += d[i];
#else
    float c[ROUND][4] = {};
    const uint32_t a0 = halves(threadIdx.x), a1 = halves(threadIdx.x + 1000);
    const uint32_t a2 = halves(threadIdx.x + 2000), a3 = halves(threadIdx.x + 3000);
    const uint32_t b0 = halves(threadIdx.x + 4000), b1 = halves(threadIdx.x + 5000);
    for (uint32_t round = 0; round < p.rounds; round++)
#pragma unroll
        for (int i = 0; i < ROUND; i++)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                         : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
                         : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#pragma unroll
    for (int i = 0; i < ROUND; i++) sum += (c[i][0] + c[i][1]) + (c[i][2] + c[i][3]);
#endif
    if (sum == 1.2345f) *p.sum = sum;  // keeps the products; never true for the sums there are
}

// FLOP of a round of one block, as the machine code that runs has it.
__global__ void mma_peak_flop_kernel(const __grid_constant__ MmaPeakParams p) {
    wait_previous();
#ifdef PEREGRINE_WGMMA
    *p.flop = 2.f * 64 * 128 * 16 * ROUND * GROUPS;
#else
    *p.flop = 2.f * 16 * 8 * 16 * ROUND * GROUPS * 4;
#endif
}

}  // namespace

extern "C" int32_t mma_peak(const MmaPeakParams* p, const Launch* l) {
    if (p->blocks == 0 || p->rounds == 0) return PEREGRINE_BAD_SHAPE;
    if (p->flop) return launch(mma_peak_flop_kernel, dim3(1), 1, 0, l, *p);
    return launch(mma_peak_kernel, dim3(p->blocks), GROUPS * 128, 0, l, *p);
}
