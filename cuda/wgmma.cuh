// wgmma — the four-warp tensor-core instruction of sm_90a, weights as A from registers, activations as B from shared memory.
//
// c[64 rows of the warpgroup x N tokens] += a[64 x 16] * b[16 x N]. Lane l of warp w holds rows 16 w + l / 4 (c[n][0], c[n][1]) and
// + 8 (c[n][2], c[n][3]), tokens 8 n + 2 (l % 4) + e % 2: what mma.m16n8k16 gives, and a[] are mma's A registers.
// The instruction runs on after it was issued: neither c nor a may be touched before wgmma_wait.
#pragma once
#include <stdint.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PEREGRINE_WGMMA 1
#else
#define PEREGRINE_WGMMA 0
#endif

#if PEREGRINE_WGMMA
// B at shared address `x`: [tokens][64 inputs] f16, 128-byte swizzle; inputs 16 step .. 16 step + 15. Start address, distance of the
// 8-token groups (1024 bytes); lengths in 16 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t x, uint32_t step = 0) {
    const uint32_t low = (x / 16 | 1 << 16) + step * 2;
    return (uint64_t)(1024 / 16 | 1 << 30) << 32 | low;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// wgmma(c, a, b, add): c = (add ? c : 0) + a * b. D, A: the operands' numbers in the asm text; B and P: descriptor and `add`.
#define WGMMA_OP(N, D, A, B, P, ...)                                                                                      \
    __device__ __forceinline__ void wgmma(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int add) {            \
        asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0;\n"                                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" D "}, {" A "}, " B ", p, 1, 1, 0;}"       \
                     : __VA_ARGS__                                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                     \
    }
#define WGMMA_4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define WGMMA_8(j) WGMMA_4(j), WGMMA_4(j + 1)
#define WGMMA_16(j) WGMMA_8(j), WGMMA_8(j + 2)
#define WGMMA_32(j) WGMMA_16(j), WGMMA_16(j + 4)
#define WGMMA_64(j) WGMMA_32(j), WGMMA_32(j + 8)
#define WGMMA_D4 "%0,%1,%2,%3"
#define WGMMA_D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define WGMMA_D12 WGMMA_D8 ",%8,%9,%10,%11"
#define WGMMA_D16 WGMMA_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_D20 WGMMA_D16 ",%16,%17,%18,%19"
#define WGMMA_D24 WGMMA_D16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define WGMMA_D32 WGMMA_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_D36 WGMMA_D32 ",%32,%33,%34,%35"
#define WGMMA_D40 WGMMA_D32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define WGMMA_D48 WGMMA_D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define WGMMA_D56 WGMMA_D48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define WGMMA_D64 WGMMA_D48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_D72 WGMMA_D64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define WGMMA_D80 WGMMA_D64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define WGMMA_D96 WGMMA_D80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_D128 \
    WGMMA_D96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116" \
              ",%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

WGMMA_OP(8, WGMMA_D4, "%4,%5,%6,%7", "%8", "%9", WGMMA_4(0))
WGMMA_OP(16, WGMMA_D8, "%8,%9,%10,%11", "%12", "%13", WGMMA_8(0))
WGMMA_OP(24, WGMMA_D12, "%12,%13,%14,%15", "%16", "%17", WGMMA_8(0), WGMMA_4(2))
WGMMA_OP(32, WGMMA_D16, "%16,%17,%18,%19", "%20", "%21", WGMMA_16(0))
WGMMA_OP(40, WGMMA_D20, "%20,%21,%22,%23", "%24", "%25", WGMMA_16(0), WGMMA_4(4))
WGMMA_OP(48, WGMMA_D24, "%24,%25,%26,%27", "%28", "%29", WGMMA_16(0), WGMMA_8(4))
WGMMA_OP(64, WGMMA_D32, "%32,%33,%34,%35", "%36", "%37", WGMMA_32(0))
WGMMA_OP(72, WGMMA_D36, "%36,%37,%38,%39", "%40", "%41", WGMMA_32(0), WGMMA_4(8))
WGMMA_OP(80, WGMMA_D40, "%40,%41,%42,%43", "%44", "%45", WGMMA_32(0), WGMMA_8(8))
WGMMA_OP(96, WGMMA_D48, "%48,%49,%50,%51", "%52", "%53", WGMMA_32(0), WGMMA_16(8))
WGMMA_OP(112, WGMMA_D56, "%56,%57,%58,%59", "%60", "%61", WGMMA_32(0), WGMMA_16(8), WGMMA_8(12))
WGMMA_OP(128, WGMMA_D64, "%64,%65,%66,%67", "%68", "%69", WGMMA_64(0))
WGMMA_OP(144, WGMMA_D72, "%72,%73,%74,%75", "%76", "%77", WGMMA_64(0), WGMMA_8(16))
WGMMA_OP(160, WGMMA_D80, "%80,%81,%82,%83", "%84", "%85", WGMMA_64(0), WGMMA_16(16))
WGMMA_OP(192, WGMMA_D96, "%96,%97,%98,%99", "%100", "%101", WGMMA_64(0), WGMMA_32(16))
WGMMA_OP(256, WGMMA_D128, "%128,%129,%130,%131", "%132", "%133", WGMMA_64(0), WGMMA_64(16))
#endif
