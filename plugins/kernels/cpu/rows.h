// How rows of W are read, by what they are stored as. A row is the place of its first byte.
//
// What is shorter is taken out of 32-bit words by shifts, which compilers know how to do for every processor: the first
// number of each word to one vector, the second to the next. So two, four or eight vectors of columns are read at once,
// and their sums are put into the order of the columns at the end of a block. (MIXED tells where it is so.)
#pragma once

#include "simd.h"

namespace nmsparse::cpu {

using Byte = unsigned char;
constexpr int64_t LINE = 64;  // bytes of a line of the cache

// So many columns are read at once as VECTORS have numbers.
struct FloatRow {
    static constexpr bool SCALED = false;
    static constexpr int VECTORS = 1;
    template <Simd>
    static constexpr bool MIXED = false;

    static constexpr int64_t bytes(int64_t columns) { return columns * sizeof(float); }
    template <Simd S>
    NMSPARSE_INLINE static void read(Byte const* row, int64_t c, FloatsOf<S>* to) {
        *to = load<S>(reinterpret_cast<float const*>(row) + c);
    }
};

// Numbers of sixteen bits, of either kind. Those of float16 get the place of a float32's, with an exponent that is 112 too
// low; so infinity is no infinity, but no weight is.
template <bool BRAIN>
struct HalfRow {
    static constexpr bool SCALED = false;
    static constexpr int VECTORS = 2;
    template <Simd>
    static constexpr bool MIXED = true;

    static constexpr int64_t bytes(int64_t columns) { return 2 * columns; }
    template <Simd S>
    NMSPARSE_INLINE static void read(Byte const* row, int64_t c, FloatsOf<S>* to) {
        constexpr int32_t HIGH = static_cast<int32_t>(BRAIN ? 0xffff0000U : 0x8fffe000U);
        IntsOf<S> words;
        std::memcpy(&words, row + bytes(c), sizeof words);
#pragma GCC unroll 2
        for (int k = 0; k < VECTORS; ++k) {
            IntsOf<S> bits = k == 0 ? words << 16 : words;
            if constexpr (!BRAIN) bits >>= 3;
            if (!BRAIN || k == 1) bits &= HIGH;
            std::memcpy(&to[k], &bits, sizeof bits);
            if constexpr (!BRAIN) to[k] *= 0x1p112F;
        }
    }
};

// Integers of a byte. AVX2 and AVX-512 widen a vector of them in one instruction, which compilers do not find.
struct Int8Row {
    static constexpr bool SCALED = true;
    static constexpr int VECTORS = 4;
    template <Simd S>
    static constexpr bool MIXED = S == Simd::PLAIN;

    static constexpr int64_t bytes(int64_t columns) { return columns; }
    template <Simd S>
    NMSPARSE_INLINE static void read(Byte const* row, int64_t c, FloatsOf<S>* to) {
        struct Numbers {
            int8_t of[LANES_OF<S>];
        };
        IntsOf<S> words;
#pragma GCC unroll 4
        for (int k = 0; k < VECTORS; ++k) {
            if constexpr (MIXED<S>) {
                std::memcpy(&words, row + c, sizeof words);
                words = words << (24 - 8 * k) >> 24;
            } else {
                asm("vpmovsxbd %1, %0" : "=v"(words) : "m"(reinterpret_cast<Numbers const*>(row + c)[k]));
            }
            to[k] = __builtin_convertvector(words, FloatsOf<S>);
        }
    }
};

// Two integers in a byte, the first in its lower half. A number of columns that is asked for fills its bytes. AVX-512
// looks up sixteen of them at once, by the lowest bits of each word.
struct Int4Row {
    static constexpr bool SCALED = true;
    static constexpr int VECTORS = 8;
    template <Simd>
    static constexpr bool MIXED = true;

    static constexpr int64_t bytes(int64_t columns) { return columns / 2; }
    template <Simd S>
    NMSPARSE_INLINE static void read(Byte const* row, int64_t c, FloatsOf<S>* to) {
        constexpr FloatsOf<Simd::AVX512> NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
        IntsOf<S> words;
        std::memcpy(&words, row + bytes(c), sizeof words);
#pragma GCC unroll 8
        for (int k = 0; k < VECTORS; ++k)
            if constexpr (S == Simd::AVX512)
                to[k] = __builtin_shuffle(NUMBERS, words >> 4 * k);
            else
                to[k] = __builtin_convertvector(words << (28 - 4 * k) >> 28, FloatsOf<S>);
    }
};

// Puts the sums of vectors that were read at once into the order of the columns.
template <Simd S, class Row>
NMSPARSE_INLINE void put_columns_in_order(FloatsOf<S>* vectors) {
    if constexpr (Row::template MIXED<S>) put_in_order<S, Row::VECTORS>(vectors);
}

// The sum of a block of rows, with their scale where they have one. Whoever adds it must not find that a product: as one
// FMA it is rounded once, and the compiler would do so here and not there.
template <Simd S, class Row>
NMSPARSE_INLINE FloatsOf<S> scaled(FloatsOf<S> sum, float const* scale, int64_t c) {
    if constexpr (Row::SCALED) {
        sum *= load<S>(scale + c);
        asm("" : "+m"(sum));
    }
    return sum;
}

}  // namespace nmsparse::cpu
