// The last loop ends one value too early: `peregrine lab try` must name it.
#define LEFT_OUT 1
#include "newcomer.cuh"
