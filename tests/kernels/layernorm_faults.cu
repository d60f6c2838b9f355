// Reads where there is no memory: `peregrine lab try` must say that it faults.
#define AFTER_SUM sum += *(const volatile float*)(uintptr_t)64
#include "newcomer.cuh"
