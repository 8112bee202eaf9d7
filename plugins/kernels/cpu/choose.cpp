// Which channels of a token are kept, and its shift and scale. The definition is in docs/format.md.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "layer.h"
#include "simd.h"

namespace nmsparse::cpu {

namespace {

constexpr int SUMS = 16;         // of a long sum
constexpr int64_t COUNTED = 64;  // groups up to this size are ranked by counting, larger ones by a histogram

// Integers in the order of the numbers. NaN counts as the largest, and zeros are equal.
NMSPARSE_INLINE int32_t key(float number) {
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
    vectorized([=]() NMSPARSE_INLINED {
        if (shift != nullptr)
            for (int64_t i = 0; i < k; ++i) z[i] = x[i] - shift[i];
        else
            for (int64_t i = 0; i < k; ++i) z[i] = x[i] - eta;
    });
}

void score_keys(float const* z, float const* scale, int64_t k, int32_t* keys) {
    vectorized([=]() NMSPARSE_INLINED {
        if (scale != nullptr)
            for (int64_t i = 0; i < k; ++i) keys[i] = key(std::fabs(z[i]) * scale[i]);
        else
            for (int64_t i = 0; i < k; ++i) keys[i] = key(std::fabs(z[i]));
    });
}

// zs, by bits: a branch on what is kept would be guessed wrong half of the time.
void prune(float const* z, int32_t const* marks, int64_t k, float* zs) {
    with_simd([=](auto simd) {
        compiled(simd, [=]() NMSPARSE_INLINED {
            constexpr int LANES = LANES_OF<simd>;
            int64_t i = 0;
            for (IntsOf<simd> bits, mask; i + LANES <= k; i += LANES) {
                std::memcpy(&bits, z + i, sizeof bits), std::memcpy(&mask, marks + i, sizeof mask);
                bits &= mask;
                std::memcpy(zs + i, &bits, sizeof bits);
            }
            for (; i < k; ++i) zs[i] = marks[i] ? z[i] : 0.0F;
        });
    });
}

// The sum of (x - centre) or of its square, over 16 sums in runs of 64, then over the sums: a fixed order.
template <Simd S, bool SQUARED>
NMSPARSE_INLINE float sum_of(float const* x, int64_t count, float centre) {
    constexpr int LANES = LANES_OF<S>, VECTORS = SUMS / LANES;
    FloatsOf<S> total[VECTORS] = {};
    int64_t i = 0;
    while (i + SUMS <= count) {
        FloatsOf<S> run[VECTORS] = {};
        int64_t const end = std::min(count, i + 64 * SUMS);
        for (; i + SUMS <= end; i += SUMS)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                FloatsOf<S> const apart = load<S>(x + i + v * LANES) - centre;
                run[v] += SQUARED ? apart * apart : apart;
            }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) total[v] += run[v];
    }
    float found = 0;
    for (int lane = 0; lane < SUMS; ++lane) found += total[lane / LANES][lane % LANES];
    for (; i < count; ++i) found += SQUARED ? (x[i] - centre) * (x[i] - centre) : x[i] - centre;
    return found;
}

template <bool SQUARED>
float sum(float const* x, int64_t count, float centre) {
    return with_simd([=](auto simd) {
        return compiled(simd, [=]() NMSPARSE_INLINED { return sum_of<simd, SQUARED>(x, count, centre); });
    });
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

// Ranks the channels of as many groups at once as a register has lanes: how many of its group go before each one. `place`
// says which channel is at a place of the arrangement.
template <Simd S, class Place>
NMSPARSE_INLINE void mark_by_counting(int32_t const* keys, int64_t k, int64_t keep, int64_t group, Place place,
                                      int32_t* kept) {
    constexpr int LANES = LANES_OF<S>;
    IntsOf<S> key[COUNTED], before[COUNTED];
    int64_t const groups = k / group;
    for (int64_t g = 0; g < groups; g += LANES) {
        int const lanes = static_cast<int>(std::min<int64_t>(LANES, groups - g));
        for (int64_t i = 0; i < group; ++i) {
            int32_t column[LANES] = {};
            for (int lane = 0; lane < lanes; ++lane) column[lane] = keys[place((g + lane) * group + i)];
            std::memcpy(&key[i], column, sizeof column);
            before[i] = IntsOf<S>{} + static_cast<int32_t>(i);  // ties go to the lower place
        }
        for (int64_t i = 0; i < group; ++i)
            for (int64_t j = i + 1; j < group; ++j) {
                IntsOf<S> const larger = key[j] > key[i];  // -1 where it is
                before[i] -= larger;
                before[j] += larger;
            }
        for (int64_t i = 0; i < group; ++i) {
            int32_t column[LANES];
            std::memcpy(column, &before[i], sizeof column);
            for (int lane = 0; lane < lanes; ++lane) kept[place((g + lane) * group + i)] = -(column[lane] < keep);
        }
    }
}

// Larger ones first, by Batcher's merging of what is sorted at every other place (doi 10.1145/1468075.1468121).
template <Simd S, int COUNT, int APART>
NMSPARSE_INLINE void merge(IntsOf<S>* keys) {
    if constexpr (2 * APART < COUNT) {
        merge<S, COUNT, 2 * APART>(keys);
        merge<S, COUNT, 2 * APART>(keys + APART);
    }
    constexpr bool WHOLE = 2 * APART < COUNT;
#pragma GCC unroll 16
    for (int i = WHOLE ? APART : 0; i + APART < (WHOLE ? COUNT : 2 * APART); i += 2 * APART) {
        IntsOf<S> const a = keys[i], b = keys[i + APART];
        keys[i] = a > b ? a : b, keys[i + APART] = a > b ? b : a;
    }
}
template <Simd S, int COUNT>
NMSPARSE_INLINE void sort(IntsOf<S>* keys) {
    if constexpr (COUNT > 1) {
        sort<S, COUNT / 2>(keys);
        sort<S, COUNT / 2>(keys + COUNT / 2);
        merge<S, COUNT, 1>(keys);
    }
}

// The same for groups of a power of two that lie side by side: sorts as many of them at once.
template <Simd S, int GROUP>
NMSPARSE_INLINE void mark_by_sorting(int32_t const* keys, int64_t k, int64_t keep, int32_t* kept) {
    constexpr int64_t COUNT = LANES_OF<S> * GROUP;
    for (int64_t i = 0; i < k; i += COUNT) {
        IntsOf<S> key[GROUP] = {}, sorted[GROUP];
        size_t const bytes = (k - i) * sizeof(int32_t);
        bytes < sizeof key ? std::memcpy(key, keys + i, bytes) : std::memcpy(key, keys + i, sizeof key);
        put_apart<S, GROUP>(key);
        std::memcpy(sorted, key, sizeof key);
        sort<S, GROUP>(sorted);
        IntsOf<S> const least = sorted[keep - 1];
        IntsOf<S> ties = IntsOf<S>{} + static_cast<int32_t>(keep);
#pragma GCC unroll 32
        for (int j = 0; j < GROUP; ++j) ties = key[j] > least ? ties - 1 : ties;
#pragma GCC unroll 32
        for (int j = 0; j < GROUP; ++j) {  // ties go to the lower place
            IntsOf<S> const bar = ties > 0 ? least : least + 1;
            ties = key[j] == least ? ties - 1 : ties;
            key[j] = key[j] >= bar;
        }
        put_in_order<S, GROUP>(key);
        bytes < sizeof key ? std::memcpy(kept + i, key, bytes) : std::memcpy(kept + i, key, sizeof key);
    }
}

// Calls `body` with a group of 2 to 32, a power of two.
template <class Body>
NMSPARSE_INLINE void with_group(int64_t group, Body const& body) {
    switch (group) {
        case 2: return body(std::integral_constant<int, 2>());
        case 4: return body(std::integral_constant<int, 4>());
        case 8: return body(std::integral_constant<int, 8>());
        case 16: return body(std::integral_constant<int, 16>());
        default: return body(std::integral_constant<int, 32>());
    }
}

template <Simd S>
void mark_small(int32_t const* keys, int64_t k, int64_t keep, int64_t group, int64_t const* permutation, int32_t* kept,
                std::vector<int32_t>& arranged) {
    if (group > 1 && 32 % group == 0) {
        if (permutation == nullptr)
            return with_group(group, [=](auto size) {
                compiled(Is<S>(), [=]() NMSPARSE_INLINED { mark_by_sorting<S, size>(keys, k, keep, kept); });
            });
        arranged.resize(2 * k);
        int32_t *const from = arranged.data(), *const to = from + k;
        for (int64_t i = 0; i < k; ++i) from[i] = keys[permutation[i]];
        mark_small<S>(from, k, keep, group, nullptr, to, arranged);
        for (int64_t i = 0; i < k; ++i) kept[permutation[i]] = to[i];
        return;
    }
    compiled(Is<S>(), [=]() NMSPARSE_INLINED {
        if (permutation != nullptr)
            mark_by_counting<S>(
                keys, k, keep, group, [=](int64_t i) NMSPARSE_INLINED { return permutation[i]; }, kept);
        else
            mark_by_counting<S>(keys, k, keep, group, [](int64_t i) NMSPARSE_INLINED { return i; }, kept);
    });
}

void mark_large(int32_t const* keys, int64_t k, int64_t keep, int64_t group, int64_t const* permutation, int32_t* kept,
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

#if defined(__x86_64__)
// Lists the channels that are marked, from `begin` to `end`, after `count` others, and returns how many there are then.
NMSPARSE_TARGET("avx512f,popcnt")
int32_t compress(int32_t const* marks, float const* z, int64_t begin, int64_t end, int32_t count, int32_t* rows,
                 float* values) {
    constexpr int LANES = LANES_OF<Simd::AVX512>;
    __m512i const all = _mm512_set1_epi32(-1);
    __m512i row = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                   _mm512_set1_epi32(static_cast<int32_t>(begin)));
    for (int64_t i = begin; i < end; i += LANES) {
        __mmask16 const here = end - i < LANES ? (1U << (end - i)) - 1 : 0xffffU;
        __mmask16 const marked = _mm512_test_epi32_mask(all, _mm512_maskz_loadu_epi32(here, marks + i));
        int const found = __builtin_popcount(marked);
        __mmask16 const places = (1U << found) - 1;
        _mm512_mask_storeu_epi32(rows + count, places, _mm512_maskz_compress_epi32(marked, row));
        _mm512_mask_storeu_ps(values + count, places,
                              _mm512_maskz_compress_ps(marked, _mm512_maskz_loadu_ps(here, z + i)));
        count += found;
        row = _mm512_add_epi32(row, _mm512_set1_epi32(LANES));
    }
    return count;
}
#endif

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

void list_kept(Lists const& lists, int64_t slot, int32_t const* marks, float const* z) {
#if defined(__x86_64__)
    if (this_processor() == Simd::AVX512) {
        int32_t count = 0;
        for (int64_t b = 0; b < lists.blocks(); ++b) {
            int64_t const begin = b * lists.block, end = std::min(lists.k, begin + lists.block);
            count = compress(marks, z, begin, end, count, lists.rows + slot * lists.capacity,
                             lists.values + slot * lists.capacity);
            lists.ends[slot * lists.blocks() + b] = count;
        }
        return;
    }
#endif
    list(lists, slot, [=](int64_t i) { return -marks[i]; }, [=](int64_t i) { return z[i]; });
}

struct Scratch {
    std::vector<float> z, zs;
    std::vector<int32_t> keys, few, arranged;
    std::vector<int32_t> kept;  // -1 where a channel is, else 0
};

void mark(Layer const& layer, float const* z, Scratch& scratch) {
    int64_t const k = layer.k;
    if (!layer.sparse || layer.keep == layer.group) {
        std::fill(scratch.kept.begin(), scratch.kept.end(), -1);
        return;
    }
    int32_t* const keys = scratch.keys.data();
    int32_t* const kept = scratch.kept.data();
    score_keys(z, layer.channel_scale, k, keys);
    if (layer.group <= COUNTED)
        with_simd([&](auto simd) {
            mark_small<simd>(keys, k, layer.keep, layer.group, layer.permutation, kept, scratch.arranged);
        });
    else
        mark_large(keys, k, layer.keep, layer.group, layer.permutation, kept, scratch.arranged, scratch.few);
}

}  // namespace

int64_t block_rows(Layer const& layer) {
    // Fewer are better for panels; but after each block of integers there is more to do.
    bool const few = layer.w.scale == nullptr && layer.sparse && layer.permutation == nullptr && 32 % layer.group == 0 &&
                     32 / layer.group * layer.keep % STEP == 0;
    int64_t rows = few ? 32 : MOST_ROWS;
    while (layer.w.scale != nullptr && layer.w.rows < layer.k && layer.w.rows % rows != 0) rows /= 2;
    return rows;
}

Token choose(Layer const& layer, int64_t t, Chosen const& to) {
    thread_local Scratch scratch;
    int64_t const k = layer.k;
    scratch.z.resize(k), scratch.keys.resize(k), scratch.kept.resize(k);
    float const* z = layer.x + t * k;
    Token token{token_shift(layer, z, scratch.keys, scratch.few), 1};
    if (layer.shift_mode != ShiftMode::NONE) {
        subtract(z, layer.shift, token.eta, k, scratch.z.data());
        z = scratch.z.data();
    }
    int32_t const* const marks = scratch.kept.data();
    mark(layer, z, scratch);
    if (to.kept->rows != nullptr) {
        list_kept(*to.kept, to.slot, marks, z);
    } else {
        float* const pruned = to.kept->values + to.slot * to.kept->capacity;
        prune(z, marks, k, pruned);
        std::fill(pruned + k, pruned + to.kept->capacity, 0.0F);
    }
    // z - zs is 0 where a channel is kept, but NaN of Inf and NaN.
    if (to.dropped != nullptr)
        list(*to.dropped, to.slot, [=](int64_t i) { return !marks[i] || !std::isfinite(z[i]); },
             [=](int64_t i) { return z[i] - (marks[i] ? z[i] : 0.0F); });
    if (layer.variance && layer.sparse) {
        scratch.zs.resize(k);
        prune(z, marks, k, scratch.zs.data());
        float const of_kept = variance(scratch.zs.data(), k);
        token.nu = std::sqrt(variance(z, k) / (of_kept < VARIANCE_FLOOR ? VARIANCE_FLOOR : of_kept));
    }
    return token;
}

}  // namespace nmsparse::cpu
