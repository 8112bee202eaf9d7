// How rows of W are read, by what they are stored as. A row is the place of its first byte.
//
// Numbers of sixteen bits and of four are taken out of 32-bit words by shifts: the first number of each word to one
// vector, the second to the next. So two or eight vectors of columns are read at once, and their sums are put into the
// order of the columns at the end of a block. (MIXED tells where it is so.)
#if defined(NMSPARSE_ROWS_INL) == defined(HWY_TARGET_TOGGLE)
#ifdef NMSPARSE_ROWS_INL
#undef NMSPARSE_ROWS_INL
#else
#define NMSPARSE_ROWS_INL
#endif

#include "tile.h"
#include "vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nmsparse::cpu::HWY_NAMESPACE {

HWY_INLINE Ints words_at(Byte const* place) { return hn::LoadU(INTS, reinterpret_cast<int32_t const*>(place)); }

// So many columns are read at once as VECTORS have numbers.
struct FloatRow {
    static constexpr Kind KIND = Kind::FLOAT;
    static constexpr bool SCALED = false, MIXED = false;
    static constexpr int VECTORS = 1;

    static HWY_INLINE void read(Byte const* row, int64_t c, Floats* to) {
        *to = load(reinterpret_cast<float const*>(row) + c);
    }
};

// Numbers of sixteen bits, of either kind. Those of float16 get the place of a float32's, with an exponent that is 112
// too low; so infinity is no infinity, but no weight is.
template <bool BRAIN>
struct HalfRow {
    static constexpr Kind KIND = BRAIN ? Kind::BFLOAT16 : Kind::FLOAT16;
    static constexpr bool SCALED = false, MIXED = true;
    static constexpr int VECTORS = 2;

    static HWY_INLINE void read(Byte const* row, int64_t c, Floats* to) {
        Ints const high = hn::Set(INTS, static_cast<int32_t>(BRAIN ? 0xffff0000U : 0x8fffe000U));
        Ints const words = words_at(row + bytes(KIND, c));
        if constexpr (BRAIN) {
            to[0] = hn::BitCast(FLOATS, hn::ShiftLeft<16>(words));
            to[1] = hn::BitCast(FLOATS, hn::And(words, high));
        } else {
            Floats const scale = hn::Set(FLOATS, 0x1p112F);
            to[0] = hn::Mul(hn::BitCast(FLOATS, hn::And(hn::ShiftRight<3>(hn::ShiftLeft<16>(words)), high)), scale);
            to[1] = hn::Mul(hn::BitCast(FLOATS, hn::And(hn::ShiftRight<3>(words), high)), scale);
        }
    }
};

// Integers of a byte.
struct Int8Row {
    static constexpr Kind KIND = Kind::INT8;
    static constexpr bool SCALED = true, MIXED = false;
    static constexpr int VECTORS = 4;

    static HWY_INLINE void read(Byte const* row, int64_t c, Floats* to) {
        constexpr hn::Rebind<int8_t, decltype(INTS)> d;
        int8_t const* const numbers = reinterpret_cast<int8_t const*>(row) + c;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            to[v] = hn::ConvertTo(FLOATS, hn::PromoteTo(INTS, hn::LoadU(d, numbers + v * LANES)));
    }
};

// Two integers in a byte, the first in its lower half. A number of columns that is asked for fills its bytes. AVX-512
// looks up sixteen of them at once, by the lowest bits of each word.
struct Int4Row {
    static constexpr Kind KIND = Kind::INT4;
    static constexpr bool SCALED = true, MIXED = true;
    static constexpr int VECTORS = 8;

    template <int V>
    static HWY_INLINE Floats number(Ints words) {
#if HWY_TARGET <= HWY_AVX3
        alignas(64) static constexpr float NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
        return hn::TableLookupLanes(hn::Load(FLOATS, NUMBERS), hn::Indices512<float>{hn::ShiftRight<4 * V>(words).raw});
#else
        return hn::ConvertTo(FLOATS, hn::ShiftRight<28>(hn::ShiftLeft<28 - 4 * V>(words)));
#endif
    }
    static HWY_INLINE void read(Byte const* row, int64_t c, Floats* to) {
        Ints const words = words_at(row + bytes(KIND, c));
        to[0] = number<0>(words), to[1] = number<1>(words), to[2] = number<2>(words), to[3] = number<3>(words);
        to[4] = number<4>(words), to[5] = number<5>(words), to[6] = number<6>(words), to[7] = number<7>(words);
    }
};

template <class Row>
constexpr int64_t bytes_of(int64_t columns) {
    return bytes(Row::KIND, columns);
}

// Puts the sums of vectors that were read at once into the order of the columns.
template <class Row>
HWY_INLINE void put_columns_in_order(Floats* vectors) {
    if constexpr (Row::MIXED) put_in_order<Row::VECTORS>(vectors);
}

// The sum of a block of rows, with their scale where they have one.
template <class Row>
HWY_INLINE Floats scaled(Floats sum, float const* scale, int64_t c) {
    return Row::SCALED ? hn::Mul(sum, load(scale + c)) : sum;
}

}  // namespace nmsparse::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
