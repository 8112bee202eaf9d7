// Products with W of integers as sums of integers, for processors that multiply bytes by fours.
//
// What a token multiplies the rows of a block by is made fixed-point of 23 bits, in a unit that is a power of two, and
// cut into three digits of a signed byte. The sum of each digit's products is exact, so that it is the same in any order;
// all that is rounded is a number that is much smaller than the block's largest, where a sum of floats rounds each step.
//
// Bytes of four rows are put side by side for each column. Integers are made unsigned by adding OFFSET, whose products
// are taken off the sums before they begin. Of four bits, the products of a whole byte are summed, and those of its lower
// half: their difference is sixteen times the upper half's.
#pragma once

#include <algorithm>
#include <cmath>

#include "layer.h"
#include "rows.h"

#if defined(__x86_64__)
#define NMSPARSE_BYTES __attribute__((target("avx512f,avx512bw,avx512vnni,fma")))
#else
#define NMSPARSE_BYTES
#endif

namespace nmsparse::cpu {

constexpr int DIGITS = 3, BASE_BITS = 8, QUAD = 4;

// Whether this processor multiplies bytes by fours.
inline bool multiplies_bytes() {
#if defined(NMSPARSE_SIMD) || !defined(__x86_64__)
    return false;
#else
    static bool const found =
        this_processor() == Simd::AVX512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
    return found;
#endif
}

// What the rows of a block are multiplied by.
struct Fixed {
    int32_t words[DIGITS][MOST_ROWS / QUAD];  // a digit of each of four rows
    int32_t sums[DIGITS];
    float unit;
    int quads;

    // False where a number is not finite, or all are so small that the unit would be no number.
    NMSPARSE_BYTES bool take(float const* values, int64_t count) {
        constexpr int32_t SIGN = INT32_MIN, INFINITE = 0x7f800000, LEAST = 22;  // of the exponents
        int32_t numbers[MOST_ROWS] = {}, largest = 0;
        int8_t digits[DIGITS][MOST_ROWS];
        std::memcpy(numbers, values, count * sizeof(float));
        for (int32_t const bits : numbers) largest = std::max(largest, bits & ~SIGN);
        // The largest number has 22 bits and a sign.
        int32_t const exponent = largest == 0 ? LEAST : largest >> 23;
        if (largest >= INFINITE || exponent < LEAST) return false;
        float const units = power(127 + 21 + 127 - exponent);
        unit = power(exponent - 21);
        quads = static_cast<int>((count + QUAD - 1) / QUAD);
        for (int i = 0; i < MOST_ROWS; ++i) {
            float number;
            std::memcpy(&number, &numbers[i], sizeof number);
            numbers[i] = static_cast<int32_t>(std::nearbyint(number * units));
        }
        for (int d = 0; d < DIGITS; ++d) {
            sums[d] = 0;
            for (int i = 0; i < MOST_ROWS; ++i) {
                digits[d][i] = static_cast<int8_t>(numbers[i]);
                numbers[i] = (numbers[i] - digits[d][i]) >> BASE_BITS;
                sums[d] += digits[d][i];
            }
        }
        std::memcpy(words, digits, sizeof words);
        return true;
    }

private:
    static float power(int32_t exponent) {
        int32_t const bits = exponent << 23;
        float found;
        std::memcpy(&found, &bits, sizeof found);
        return found;
    }
};

#if defined(__x86_64__)

// Chunk i of vector v, of four numbers, becomes chunk v of vector i.
NMSPARSE_BYTES NMSPARSE_INLINE void turn(__m512* x) {
    __m512 const a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
    __m512 const c = _mm512_shuffle_f32x4(x[0], x[1], 0xee), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_f32x4(a, b, 0x88), x[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
    x[2] = _mm512_shuffle_f32x4(c, d, 0x88), x[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

NMSPARSE_BYTES NMSPARSE_INLINE __m512 number(__m512i const* digits) {
    __m512i const low = _mm512_add_epi32(_mm512_slli_epi32(digits[1], BASE_BITS), digits[0]);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(digits[2]), _mm512_set1_ps(0x1p16F), _mm512_cvtepi32_ps(low));
}

// Adds the products of a strip of one line of each row.
template <int BITS>
NMSPARSE_BYTES NMSPARSE_INLINE void multiply_line(Byte const* const* rows, int64_t place, Fixed const& fixed,
                                                  float const* scale, float* sums) {
    constexpr int PARTS = 8 / BITS, OFFSET = 1 << (BITS - 1);
    __m512i const flip = _mm512_set1_epi8(static_cast<char>(BITS == 8 ? 0x80 : 0x88)), half = _mm512_set1_epi8(0x0f);
    __m512i sum[PARTS][QUAD][DIGITS];
#pragma GCC unroll 4
    for (int v = 0; v < QUAD; ++v)
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d) {
            sum[0][v][d] = _mm512_set1_epi32(-OFFSET * fixed.sums[d]);
            if (PARTS == 2) sum[PARTS - 1][v][d] = _mm512_set1_epi32(-(OFFSET << BITS | OFFSET) * fixed.sums[d]);
        }
    for (int q = 0; q < fixed.quads; ++q, rows += QUAD) {
        __m512i row[QUAD];
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; ++r) row[r] = _mm512_xor_si512(_mm512_loadu_si512(rows[r] + place), flip);
        __m512i const first[2] = {_mm512_unpacklo_epi8(row[0], row[1]), _mm512_unpackhi_epi8(row[0], row[1])};
        __m512i const last[2] = {_mm512_unpacklo_epi8(row[2], row[3]), _mm512_unpackhi_epi8(row[2], row[3])};
#pragma GCC unroll 4
        for (int v = 0; v < QUAD; ++v) {
            __m512i const bytes = v % 2 == 0 ? _mm512_unpacklo_epi16(first[v / 2], last[v / 2])
                                             : _mm512_unpackhi_epi16(first[v / 2], last[v / 2]);
#pragma GCC unroll 3
            for (int d = 0; d < DIGITS; ++d) {
                __m512i const digit = _mm512_set1_epi32(fixed.words[d][q]);
                sum[PARTS - 1][v][d] = _mm512_dpbusd_epi32(sum[PARTS - 1][v][d], bytes, digit);
                if (PARTS == 2) sum[0][v][d] = _mm512_dpbusd_epi32(sum[0][v][d], _mm512_and_si512(bytes, half), digit);
            }
        }
    }
    __m512 found[PARTS][QUAD];
#pragma GCC unroll 4
    for (int v = 0; v < QUAD; ++v) {
        __m512 const lower = number(sum[0][v]);
        if (PARTS == 1) {
            found[0][v] = lower;
            continue;
        }
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d) sum[PARTS - 1][v][d] = _mm512_sub_epi32(sum[PARTS - 1][v][d], sum[0][v][d]);
        __m512 const upper = _mm512_mul_ps(number(sum[PARTS - 1][v]), _mm512_set1_ps(1.0F / (1 << BITS)));
        // Their columns by turns: chunk i of vector j, of eight, has columns 32 * i + 4 * j to 3 more.
        found[v / 2 * (PARTS - 1)][2 * v % QUAD] = _mm512_unpacklo_ps(lower, upper);
        found[v / 2 * (PARTS - 1)][2 * v % QUAD + 1] = _mm512_unpackhi_ps(lower, upper);
    }
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; ++part) {
        turn(found[part]);
#pragma GCC unroll 4
        for (int i = 0; i < QUAD; ++i) {
            int64_t const c = (PARTS * i + part) * 16;
            __m512 const factor = _mm512_mul_ps(_mm512_loadu_ps(scale + c), _mm512_set1_ps(fixed.unit));
            _mm512_storeu_ps(sums + c, _mm512_fmadd_ps(found[part][i], factor, _mm512_loadu_ps(sums + c)));
        }
    }
}

// Adds the products of a block's rows, for whole lines, and asks meanwhile for so many of the next lines after each.
template <int BITS>
NMSPARSE_BYTES void multiply_lines(Byte const* const* rows, Fixed const& fixed, int64_t columns, float const* scale,
                                   float* sums, Ahead& ahead, int64_t ask) {
    for (int64_t c = 0; c < columns; c += LINE * 8 / BITS) {
        ahead.ask(ask);
        multiply_line<BITS>(rows, c * BITS / 8, fixed, scale + c, sums + c);
    }
}

#else  // never called: multiplies_bytes

template <int BITS>
void multiply_lines(Byte const* const*, Fixed const&, int64_t, float const*, float*, Ahead&, int64_t) {}

#endif

}  // namespace nmsparse::cpu
