// gelu — the erf form, for kernels that have many of them to compute beside products.   Reference: reference.rs::gelu
#pragma once

// GELU = max(v, 0) - |v| Phi(-|v|), Phi(-a) = 2^P(a): the logarithm is smooth, and an error of it is a relative error of the tail. P is the
// polynomial of degree 5 whose largest error over [0, 5.6], in units of the result's f16 spacing, is least (Lawson's reweighted least
// squares): 0.16 for all f16 and between, where 0.5 v (1 + erff) has 1.5, for want of digits near v = -5. Beyond it P falls for ever.
// 8 instructions, one of them of the slow kind; erff takes some 30 and a branch. Abramowitz and Stegun's 7.1.26: 14, two slow, and 0.97.
__device__ __forceinline__ float gelu(float v) {
    const float a = fabsf(v);
    const float p = fmaf(fmaf(fmaf(fmaf(fmaf(-3.2669518e-4f, a, 5.8874865e-3f), a, -0.048439112f), a, -0.46385074f), a, -1.1492977f), a,
                         -1.0001132f);
    float tail;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(p));
    return fmaf(-a, tail, fmaxf(v, 0.f));
}
