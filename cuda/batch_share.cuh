// batch_share — which part of a product each block of gptq_batch's sm_90a kernel computes.
//
// A block keeps to one K slice, which it walks in stages of some units, and to a few groups of four row tiles, one group a warpgroup.
#pragma once
#include "units.cuh"

constexpr uint32_t GROUP_TILES = 4;  // row tiles of a group, one a warp

// How the inputs are cut into slices, each of `units` units but the last, which has the rest. If attention writes the inputs from attn_unit
// on, and the product begins before it has ended, every slice has its part of them, behind `early` units (whole stages) of those before;
// the last slice, whose inputs are one run, has the first last_late of attention's. early == 0: every slice is one run.
struct Slices {
    uint32_t count, units, last_units, early = 0, attn_unit, last_late = 0;

    Slices(const GptqMatmulParams& p, uint32_t stage_units) : count(p.slices), attn_unit(p.attn_input / UNIT_INPUTS) {
        const uint32_t k_units = p.w.k / UNIT_INPUTS;
        units = (k_units + count - 1) / count;
        const uint32_t others = count - 1, whole = attn_unit / count / stage_units * stage_units;
        last_units = k_units - others * units;
        const uint32_t last_early = attn_unit - others * whole;
        if (!p.ready || !others || whole > units || last_early > last_units) return;
        early = whole, last_late = last_units - last_early;
    }
};

// How the groups of a slice are dealt out to its blocks. The host does divisions: a block asks for its first weights at once.
struct Deal {
    uint32_t parts;       // blocks of a slice
    uint32_t each, more;  // groups of a block; the first `more` blocks have one more
    uint32_t behind;      // groups of the others, which are the first: rows of `qkv` are done sooner, and attention waits for them
    uint64_t reciprocal;  // 1 / slices in steps of 2^-32, rounded up

    // `most` groups a block.
    Deal(const GptqMatmulParams& p, uint32_t most, uint32_t multiprocessors) {
        const uint32_t groups = (p.w.n + GROUP_TILES * UNIT_ROWS - 1) / (GROUP_TILES * UNIT_ROWS);
        parts = max(min(multiprocessors / p.slices, groups), (groups + most - 1) / most);
        each = groups / parts, more = groups % parts, behind = (parts - more) * each;
        reciprocal = ((1ull << 32) + p.slices - 1) / p.slices;
    }
};

// What a block multiplies: `groups` groups of row tiles from `group` on, `count` units, of which `jump` stages begin at unit `first` and
// the others at unit `second`.
template <uint32_t STAGE_UNITS>
struct Share {
    uint32_t slice, group, groups, count, first, second = 0, jump = ~0u;
    uint32_t late = 0;  // the first stage for which attention writes inputs

    __device__ __forceinline__ Share(const Slices& s, const Deal& d) {
        const uint32_t part = (uint32_t)(blockIdx.x * d.reciprocal >> 32);
        slice = blockIdx.x - part * s.count;
        const bool more = part < d.more;
        groups = d.each + more, group = more ? d.behind + part * groups : (part - d.more) * groups;
        first = slice * (s.early ? s.early : s.units);
        count = slice + 1 < s.count ? s.units : s.last_units;
        if (s.early && slice + 1 < s.count) {
            second = s.attn_unit + s.last_late + slice * (s.units - s.early);
            late = jump = s.early / STAGE_UNITS;
        } else if (s.early) {
            late = (s.attn_unit - first) / STAGE_UNITS;
        }
    }
    __device__ __forceinline__ uint32_t stages() const { return (count + STAGE_UNITS - 1) / STAGE_UNITS; }
    // The first unit of a stage.
    __device__ __forceinline__ uint32_t unit(uint32_t stage) const {
        return stage < jump ? first + stage * STAGE_UNITS : second + (stage - jump) * STAGE_UNITS;
    }
    __device__ __forceinline__ uint32_t warps() const { return groups * GROUP_TILES; }
};
