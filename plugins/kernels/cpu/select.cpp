// Which channels of a token are kept, and its shift and scale. The definition is in docs/format.md.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "select.cpp"
#include <hwy/foreach_target.h>

#include "layer.h"
#include "vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nmsparse::cpu::HWY_NAMESPACE {

namespace {

constexpr int SUMS = 16;         // of a long sum
constexpr int64_t COUNTED = 64;  // groups up to this size are ranked by counting, larger ones by a histogram

// Integers in the order of the numbers. NaN counts as the largest, and zeros are equal.
HWY_INLINE int32_t key(float number) {
    float const found = (number == number ? number : std::numeric_limits<float>::infinity()) + 0.0F;
    int32_t bits;
    std::memcpy(&bits, &found, sizeof bits);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

float number(int32_t key) {
    int32_t const bits = key ^ (key >> 31 & 0x7fffffff);
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

void subtract(float const* x, float const* shift, float eta, int64_t k, float* z) {
    if (shift != nullptr)
        for (int64_t i = 0; i < k; ++i) z[i] = x[i] - shift[i];
    else
        for (int64_t i = 0; i < k; ++i) z[i] = x[i] - eta;
}

void score_keys(float const* z, float const* scale, int64_t k, int32_t* keys) {
    if (scale != nullptr)
        for (int64_t i = 0; i < k; ++i) keys[i] = key(std::fabs(z[i]) * scale[i]);
    else
        for (int64_t i = 0; i < k; ++i) keys[i] = key(std::fabs(z[i]));
}

// zs, by bits: a branch on what is kept would be guessed wrong half of the time.
void keep_only(float const* z, int32_t const* kept, int64_t k, float* zs) {
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES)
        store(zs + i, hn::And(load(z + i), hn::BitCast(FLOATS, hn::LoadU(INTS, kept + i))));
    for (; i < k; ++i) zs[i] = kept[i] ? z[i] : 0.0F;
}

// The sum of (x - centre) or of its square, over 16 sums in runs of 64, then over the sums: a fixed order.
template <bool SQUARED>
float sum(float const* x, int64_t count, float centre) {
    constexpr int VECTORS = SUMS / LANES;
    alignas(64) float total[SUMS] = {};
    int64_t i = 0;
    while (i + SUMS <= count) {
        Floats run[VECTORS];
        for (Floats& vector : run) vector = hn::Zero(FLOATS);
        int64_t const end = std::min(count, i + 64 * SUMS);
        for (; i + SUMS <= end; i += SUMS)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                Floats const apart = hn::Sub(load(x + i + v * LANES), hn::Set(FLOATS, centre));
                run[v] = SQUARED ? hn::MulAdd(apart, apart, run[v]) : hn::Add(run[v], apart);
            }
        for (int v = 0; v < VECTORS; ++v) store(total + v * LANES, hn::Add(load(total + v * LANES), run[v]));
    }
    float found = 0;
    for (float const lane : total) found += lane;
    for (; i < count; ++i) found += SQUARED ? (x[i] - centre) * (x[i] - centre) : x[i] - centre;
    return found;
}

float variance(float const* x, int64_t k) {
    return sum<true>(x, k, sum<false>(x, k, 0) / static_cast<float>(k)) / static_cast<float>(k - 1);
}

// The key with `rank` larger or equal ones before it. A histogram of the leading bits leaves few to sort.
int32_t nth_largest(int32_t const* keys, int64_t count, int64_t rank, std::vector<int32_t>& few) {
    constexpr int BITS = 11, SHIFT = 32 - BITS;
    int32_t counts[1 << BITS] = {};
    auto const bin = [](int32_t key) { return (static_cast<uint32_t>(key) ^ 0x80000000U) >> SHIFT; };
    for (int64_t i = 0; i < count; ++i) ++counts[bin(keys[i])];
    uint32_t found = (1U << BITS) - 1;
    while (rank >= counts[found]) rank -= counts[found--];
    few.clear();
    for (int64_t i = 0; i < count; ++i)
        if (bin(keys[i]) == found) few.push_back(keys[i]);
    std::nth_element(few.begin(), few.begin() + rank, few.end(), std::greater<int32_t>());
    return few[rank];
}

// Ranks the channels of as many groups at once as a register has lanes: how many of its group go before each one.
// `place` says which channel is at a place of the arrangement.
template <class Place>
HWY_INLINE void select_by_counting(int32_t const* keys, int64_t k, int64_t keep, int64_t group, Place place,
                                 int32_t* kept) {
    Ints key[COUNTED], before[COUNTED];
    int64_t const groups = k / group;
    for (int64_t g = 0; g < groups; g += LANES) {
        int const lanes = static_cast<int>(std::min<int64_t>(LANES, groups - g));
        for (int64_t i = 0; i < group; ++i) {
            int32_t column[LANES] = {};
            for (int lane = 0; lane < lanes; ++lane) column[lane] = keys[place((g + lane) * group + i)];
            key[i] = hn::LoadU(INTS, column);
            before[i] = hn::Set(INTS, static_cast<int32_t>(i));  // ties go to the lower place
        }
        for (int64_t i = 0; i < group; ++i)
            for (int64_t j = i + 1; j < group; ++j) {
                Ints const larger = hn::VecFromMask(INTS, hn::Gt(key[j], key[i]));  // -1 where it is
                before[i] = hn::Sub(before[i], larger);
                before[j] = hn::Add(before[j], larger);
            }
        for (int64_t i = 0; i < group; ++i) {
            int32_t column[LANES];
            hn::StoreU(before[i], INTS, column);
            for (int lane = 0; lane < lanes; ++lane) kept[place((g + lane) * group + i)] = -(column[lane] < keep);
        }
    }
}

// Larger ones first, by Batcher's merging of what is sorted at every other place (doi 10.1145/1468075.1468121).
template <int COUNT, int APART>
HWY_INLINE void merge(Ints* keys) {
    if constexpr (2 * APART < COUNT) {
        merge<COUNT, 2 * APART>(keys);
        merge<COUNT, 2 * APART>(keys + APART);
    }
    constexpr bool WHOLE = 2 * APART < COUNT;
#pragma GCC unroll 16
    for (int i = WHOLE ? APART : 0; i + APART < (WHOLE ? COUNT : 2 * APART); i += 2 * APART) {
        Ints const a = keys[i], b = keys[i + APART];
        keys[i] = hn::Max(a, b), keys[i + APART] = hn::Min(a, b);
    }
}
template <int COUNT>
HWY_INLINE void sort(Ints* keys) {
    if constexpr (COUNT > 1) {
        sort<COUNT / 2>(keys);
        sort<COUNT / 2>(keys + COUNT / 2);
        merge<COUNT, 1>(keys);
    }
}

// The same for groups of a power of two that lie side by side: sorts as many of them at once.
template <int GROUP>
HWY_NOINLINE void select_by_sorting(int32_t const* keys, int64_t k, int64_t keep, int32_t* kept) {
    constexpr int64_t COUNT = LANES * GROUP;
    Ints const one = hn::Set(INTS, 1);
    for (int64_t i = 0; i < k; i += COUNT) {
        alignas(64) int32_t edge[COUNT];
        bool const whole = i + COUNT <= k;
        if (!whole) std::fill(std::copy(keys + i, keys + k, edge), edge + COUNT, 0);
        int32_t const* const from = whole ? keys + i : edge;
        int32_t* const to = whole ? kept + i : edge;
        Ints key[GROUP], sorted[GROUP];
#pragma GCC unroll 32
        for (int j = 0; j < GROUP; ++j) key[j] = hn::LoadU(INTS, from + j * LANES);
        put_apart<GROUP>(key);
#pragma GCC unroll 32
        for (int j = 0; j < GROUP; ++j) sorted[j] = key[j];
        sort<GROUP>(sorted);
        Ints const least = sorted[keep - 1], above = hn::Add(least, one);
        Ints ties = hn::Set(INTS, static_cast<int32_t>(keep));
#pragma GCC unroll 32
        for (int j = 0; j < GROUP; ++j) ties = hn::MaskedSubOr(ties, hn::Gt(key[j], least), ties, one);
#pragma GCC unroll 32
        for (int j = 0; j < GROUP; ++j) {  // ties go to the lower place
            Ints const bar = hn::IfThenElse(hn::Gt(ties, hn::Zero(INTS)), least, above);
            ties = hn::MaskedSubOr(ties, hn::Eq(key[j], least), ties, one);
            key[j] = hn::VecFromMask(INTS, hn::Ge(key[j], bar));
        }
        put_in_order<GROUP>(key);
#pragma GCC unroll 32
        for (int j = 0; j < GROUP; ++j) hn::StoreU(key[j], INTS, to + j * LANES);
        if (!whole) std::copy(edge, edge + (k - i), kept + i);
    }
}

// Calls `body` with a group of 2 to 32, a power of two.
template <class Body>
HWY_INLINE void with_group(int64_t group, Body const& body) {
    switch (group) {
        case 2: return body(std::integral_constant<int, 2>());
        case 4: return body(std::integral_constant<int, 4>());
        case 8: return body(std::integral_constant<int, 8>());
        case 16: return body(std::integral_constant<int, 16>());
        default: return body(std::integral_constant<int, 32>());
    }
}

void select_small(int32_t const* keys, int64_t k, int64_t keep, int64_t group, int64_t const* permutation, int32_t* kept,
                std::vector<int32_t>& arranged) {
    if (group > 1 && 32 % group == 0) {
        if (permutation == nullptr)
            return with_group(group, [=](auto size) { select_by_sorting<size>(keys, k, keep, kept); });
        arranged.resize(2 * k);
        int32_t *const from = arranged.data(), *const to = from + k;
        for (int64_t i = 0; i < k; ++i) from[i] = keys[permutation[i]];
        select_small(from, k, keep, group, nullptr, to, arranged);
        for (int64_t i = 0; i < k; ++i) kept[permutation[i]] = to[i];
        return;
    }
    if (permutation != nullptr)
        select_by_counting(keys, k, keep, group, [=](int64_t i) { return permutation[i]; }, kept);
    else
        select_by_counting(keys, k, keep, group, [](int64_t i) { return i; }, kept);
}

void select_large(int32_t const* keys, int64_t k, int64_t keep, int64_t group, int64_t const* permutation, int32_t* kept,
                std::vector<int32_t>& arranged, std::vector<int32_t>& few) {
    for (int64_t g = 0; g < k; g += group) {
        arranged.clear();
        for (int64_t i = g; i < g + group; ++i) arranged.push_back(keys[permutation == nullptr ? i : permutation[i]]);
        int32_t const least = nth_largest(arranged.data(), group, keep - 1, few);
        int64_t ties = keep;
        for (int32_t const other : arranged) ties -= other > least;
        for (int64_t i = 0; i < group; ++i) {
            bool const tied = arranged[i] == least, keeps = arranged[i] > least || (tied && ties > 0);
            ties -= tied && keeps;
            kept[permutation == nullptr ? g + i : permutation[g + i]] = -static_cast<int32_t>(keeps);
        }
    }
}

float token_shift(Layer const& layer, float const* x, std::vector<int32_t>& keys, std::vector<int32_t>& few) {
    if (layer.shift_mode == ShiftMode::TOKEN_MEAN) return sum<false>(x, layer.k, 0) / static_cast<float>(layer.k);
    if (layer.shift_mode != ShiftMode::TOKEN_MEDIAN) return 0;
    for (int64_t i = 0; i < layer.k; ++i) {
        if (x[i] != x[i]) return x[i];
        keys[i] = key(x[i]);
    }
    return number(nth_largest(keys.data(), layer.k, layer.k / 2, few));
}

// Lists the channels that `wanted` names, with no branch on what was kept.
template <class Wanted, class Value>
void list(Lists const& lists, int64_t slot, Wanted wanted, Value value) {
    int64_t const k = lists.k;
    int32_t* const rows = lists.rows + slot * lists.capacity;
    float* const values = lists.values + slot * lists.capacity;
    int32_t* const ends = lists.ends + slot * lists.blocks();
    int32_t count = 0;
    for (int64_t b = 0, i = 0; i < k; ++b) {
        for (int64_t const end = std::min(k, i + lists.block); i < end; ++i) {
            rows[count] = static_cast<int32_t>(i);
            values[count] = value(i);
            count += wanted(i);
        }
        ends[b] = count;
    }
}

void list_kept(Lists const& lists, int64_t slot, int32_t const* kept, float const* z) {
    int32_t* const rows = lists.rows + slot * lists.capacity;
    float* const values = lists.values + slot * lists.capacity;
    size_t count = 0;
    for (int64_t b = 0; b < lists.blocks(); ++b) {
        int64_t const end = std::min(lists.k, (b + 1) * lists.block);
        for (int64_t i = b * lists.block; i < end; i += LANES) {
            size_t const here = std::min<size_t>(LANES, end - i);
            auto const is_kept = hn::MaskFromVec(hn::LoadN(INTS, kept + i, here));
            auto const number_is_kept = hn::RebindMask(FLOATS, is_kept);
            hn::CompressBlendedStore(hn::Iota(INTS, static_cast<int32_t>(i)), is_kept, INTS, rows + count);
            count += hn::CompressBlendedStore(hn::LoadN(FLOATS, z + i, here), number_is_kept, FLOATS, values + count);
        }
        lists.ends[slot * lists.blocks() + b] = static_cast<int32_t>(count);
    }
}

struct Scratch {
    std::vector<float> z, zs;
    std::vector<int32_t> keys, few, arranged;
    std::vector<int32_t> kept;  // -1 where a channel is, else 0
};

void select_kept(Layer const& layer, float const* z, Scratch& scratch) {
    int64_t const k = layer.k;
    if (!layer.sparse || layer.keep == layer.group) {
        std::fill(scratch.kept.begin(), scratch.kept.end(), -1);
        return;
    }
    int32_t* const keys = scratch.keys.data();
    int32_t* const kept = scratch.kept.data();
    score_keys(z, layer.channel_scale, k, keys);
    if (layer.group <= COUNTED)
        select_small(keys, k, layer.keep, layer.group, layer.permutation, kept, scratch.arranged);
    else
        select_large(keys, k, layer.keep, layer.group, layer.permutation, kept, scratch.arranged, scratch.few);
}

}  // namespace

Token selected(Layer const& layer, int64_t t, Selected const& to) {
    thread_local Scratch scratch;
    int64_t const k = layer.k;
    scratch.z.resize(k), scratch.keys.resize(k), scratch.kept.resize(k);
    float const* z = layer.x + t * k;
    Token token{token_shift(layer, z, scratch.keys, scratch.few), 1};
    if (layer.shift_mode != ShiftMode::NONE) {
        subtract(z, layer.shift, token.eta, k, scratch.z.data());
        z = scratch.z.data();
    }
    int32_t const* const kept = scratch.kept.data();
    select_kept(layer, z, scratch);
    if (to.kept->rows != nullptr) {
        list_kept(*to.kept, to.slot, kept, z);
    } else {
        float* const zs = to.kept->values + to.slot * to.kept->capacity;
        keep_only(z, kept, k, zs);
        std::fill(zs + k, zs + to.kept->capacity, 0.0F);
    }
    // z - zs is 0 where a channel is kept, but NaN of Inf and NaN.
    if (to.dropped != nullptr)
        list(*to.dropped, to.slot, [=](int64_t i) { return !kept[i] || !std::isfinite(z[i]); },
             [=](int64_t i) { return z[i] - (kept[i] ? z[i] : 0.0F); });
    if (layer.variance && layer.sparse) {
        scratch.zs.resize(k);
        keep_only(z, kept, k, scratch.zs.data());
        float const of_kept = variance(scratch.zs.data(), k);
        token.nu = std::sqrt(variance(z, k) / (of_kept < VARIANCE_FLOOR ? VARIANCE_FLOOR : of_kept));
    }
    return token;
}

}  // namespace nmsparse::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nmsparse::cpu {

HWY_EXPORT(selected);

Token select_channels(Layer const& layer, int64_t t, Selected const& to) { return HWY_DYNAMIC_DISPATCH(selected)(layer, t, to); }

}  // namespace nmsparse::cpu
#endif
