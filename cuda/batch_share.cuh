// batch_share — which part of a product each block of gptq_batch's sm_90a kernel computes, and what of the next it brings into L2.
//
// A block keeps to one K slice, which it walks in stages of some units, and to a few groups of four row tiles, one group a warpgroup.
#pragma once
#include "bulk.cuh"
#include "units.cuh"

constexpr uint32_t GROUP_TILES = 4;  // row tiles of a group, one a warp
constexpr uint32_t MOST_GROUPS = 3;  // of a block

// How the inputs are cut into slices, each of `units` units but the last, which has the rest. If attention writes the inputs from attn_unit
// on, and the product begins before it has ended, every slice has its part of them, behind `early` units (whole stages) of those before;
// the last slice, whose inputs are one run, has the first last_late of attention's. early == 0: every slice is one run.
struct Slices {
    uint32_t count, units, last_units, early = 0, attn_unit, last_late = 0;

    Slices(const GptqMatrix& w, uint32_t slices, uint32_t stage_units) : count(slices), attn_unit(w.attn_input / UNIT_INPUTS) {
        const uint32_t k_units = w.k / UNIT_INPUTS;
        units = (k_units + count - 1) / count;
        const uint32_t others = count - 1, whole = attn_unit / count / stage_units * stage_units;
        last_units = k_units - others * units;
        const uint32_t last_early = attn_unit - others * whole;
        if (!attn_unit || !others || whole > units || last_early > last_units) return;
        early = whole, last_late = last_units - last_early;
    }
};

// How the groups of a slice are dealt out to its blocks. The host does divisions: a block asks for its first weights at once.
struct Deal {
    uint32_t parts;       // blocks of a slice
    uint32_t each, more;  // groups of a block; the first `more` blocks have one more
    uint32_t behind;      // groups of the others, which are the first: rows of `qkv` are done sooner, and attention waits for them
    uint64_t reciprocal;  // 1 / slices in steps of 2^-32, rounded up

    Deal(const GptqMatrix& w, uint32_t slices, uint32_t multiprocessors) {
        const uint32_t groups = (w.n + GROUP_TILES * UNIT_ROWS - 1) / (GROUP_TILES * UNIT_ROWS);
        parts = max(min(multiprocessors / slices, groups), (groups + MOST_GROUPS - 1) / MOST_GROUPS);
        each = groups / parts, more = groups % parts, behind = (parts - more) * each;
        reciprocal = ((1ull << 32) + slices - 1) / slices;
    }
};

// A block's part and slice.
struct Dealt {
    uint32_t part, slice;

    __device__ __forceinline__ Dealt(uint32_t part, uint32_t slice) : part(part), slice(slice) {}
    // Of the `number`th of blocks that go from slice to slice, then from part to part.
    __device__ __forceinline__ Dealt(uint32_t number, const Slices& s, const Deal& d)
        : part((uint32_t)(number * d.reciprocal >> 32)), slice(number - part * s.count) {}
};

// What a block multiplies: `groups` groups of row tiles from `group` on, `count` units, of which `jump` stages begin at unit `first` and
// the others at unit `second`.
template <uint32_t STAGE_UNITS>
struct Share {
    uint32_t slice, group, groups, count, first, second = 0, jump = ~0u;
    uint32_t late = 0;  // the first stage for which attention writes inputs

    __device__ __forceinline__ Share(Dealt at, const Slices& s, const Deal& d) : slice(at.slice) {
        const uint32_t part = at.part;
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

// The product behind this one, with as many tokens. Its blocks begin when this one's end, and one's first weights take 1.3 us from memory:
// with those of its first stages in L2 they are there when its inputs are.
struct Next {
    const uint8_t* units;  // NULL: none
    uint32_t n, k_units, unit_bytes, blocks;
    Slices slices;
    Deal deal;

    Next(const GptqNext& next, uint32_t multiprocessors, uint32_t stage_units)
        : units(next.w.units), n(next.w.n), k_units(next.w.k / UNIT_INPUTS),
          unit_bytes(UNIT_CODE_BYTES + UNIT_SCALE_BYTES * next.w.scales_per_row * (1 + next.w.has_zeros)),
          slices(next.w, next.slices, stage_units), deal(next.w, next.slices, multiprocessors) {
        blocks = deal.parts * slices.count;
    }
    // By a whole warp: the first `stages` stages of the block that will be blockIdx.x of it, wherever that runs.
    template <uint32_t STAGE_UNITS>
    __device__ __forceinline__ void bring(uint32_t stages) const {
        if (blockIdx.x >= blocks) return;
        const Share<STAGE_UNITS> s(Dealt(blockIdx.x, slices, deal), slices, deal);
        const uint32_t tile = s.group * GROUP_TILES + threadIdx.x % 32;
        if (tile >= min(s.group * GROUP_TILES + s.warps(), n / UNIT_ROWS)) return;
        for (uint32_t j = 0; j < min(stages, s.stages()); j++)
            prefetch_bulk(units + ((size_t)tile * k_units + s.unit(j)) * unit_bytes,
                          min(STAGE_UNITS, s.count - j * STAGE_UNITS) * unit_bytes);
    }
};
