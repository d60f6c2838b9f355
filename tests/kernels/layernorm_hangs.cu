// Waits for what never comes: `peregrine lab try` must stop it.
#define AFTER_SUM \
    while (*(volatile float*)p.x != 12345.f) {}
#include "newcomer.cuh"
