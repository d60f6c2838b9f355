// Right: `peregrine lab try` must accept it.
#include "newcomer.cuh"
