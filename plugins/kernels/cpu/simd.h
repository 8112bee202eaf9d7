// What the CPU kernels are written in: vectors of numbers, and the choice between the copies that the compiler makes for
// AVX-512, for AVX2 and for any processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define NMSPARSE_INLINED __attribute__((always_inline))
#define NMSPARSE_INLINE NMSPARSE_INLINED inline
#if defined(__x86_64__)
#pragma GCC diagnostic push  // of GCC's own header, before version 13: https://gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#define NMSPARSE_TARGET(features) __attribute__((target(features), noinline))
#else
#define NMSPARSE_TARGET(features)
#endif

namespace nmsparse::cpu {

enum class Simd { PLAIN, AVX2, AVX512 };
template <Simd S>
using Is = std::integral_constant<Simd, S>;

// A vector as long as a register. Longer ones mean the same, but arrays of them are kept in memory. Of two vectors, FIRST
// and LAST take the first and the last halves by turns, EVEN and ODD every other number.
template <Simd>
struct Register {
    typedef float Floats __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
    static constexpr Ints FIRST = {0, 4, 1, 5}, LAST = {2, 6, 3, 7}, EVEN = {0, 2, 4, 6}, ODD = {1, 3, 5, 7};
};
template <>
struct Register<Simd::AVX2> {
    typedef float Floats __attribute__((vector_size(32)));
    typedef int32_t Ints __attribute__((vector_size(32)));
    static constexpr Ints FIRST = {0, 8, 1, 9, 2, 10, 3, 11}, LAST = {4, 12, 5, 13, 6, 14, 7, 15};
    static constexpr Ints EVEN = {0, 2, 4, 6, 8, 10, 12, 14}, ODD = {1, 3, 5, 7, 9, 11, 13, 15};
};
template <>
struct Register<Simd::AVX512> {
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));
    static constexpr Ints FIRST = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    static constexpr Ints LAST = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    static constexpr Ints EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, ODD = EVEN + 1;
};
template <Simd S>
using FloatsOf = typename Register<S>::Floats;
template <Simd S>
using IntsOf = typename Register<S>::Ints;
template <Simd S>
constexpr int LANES_OF = sizeof(FloatsOf<S>) / sizeof(float);

template <Simd S>
NMSPARSE_INLINE FloatsOf<S> load(float const* place) {
    FloatsOf<S> found;
    std::memcpy(&found, place, sizeof found);
    return found;
}
template <Simd S>
NMSPARSE_INLINE void store(float* place, FloatsOf<S> numbers) {
    std::memcpy(place, &numbers, sizeof numbers);
}

// Number i of vector k is that of place COUNT * i + k; afterwards the places follow each other.
template <Simd S, int COUNT, class Vector>
NMSPARSE_INLINE void put_in_order(Vector* vectors) {
    if constexpr (COUNT > 1) {
        Vector first[COUNT / 2], last[COUNT / 2];
#pragma GCC unroll 16
        for (int k = 0; k < COUNT / 2; ++k) {
            first[k] = __builtin_shuffle(vectors[k], vectors[k + COUNT / 2], Register<S>::FIRST);
            last[k] = __builtin_shuffle(vectors[k], vectors[k + COUNT / 2], Register<S>::LAST);
        }
        put_in_order<S, COUNT / 2>(first);
        put_in_order<S, COUNT / 2>(last);
#pragma GCC unroll 16
        for (int k = 0; k < COUNT / 2; ++k) vectors[k] = first[k], vectors[k + COUNT / 2] = last[k];
    }
}

// The way back.
template <Simd S, int COUNT, class Vector>
NMSPARSE_INLINE void put_apart(Vector* vectors) {
    if constexpr (COUNT > 1) {
        Vector even[COUNT / 2], odd[COUNT / 2];
#pragma GCC unroll 16
        for (int k = 0; k < COUNT / 2; ++k) {
            even[k] = __builtin_shuffle(vectors[2 * k], vectors[2 * k + 1], Register<S>::EVEN);
            odd[k] = __builtin_shuffle(vectors[2 * k], vectors[2 * k + 1], Register<S>::ODD);
        }
        put_apart<S, COUNT / 2>(even);
        put_apart<S, COUNT / 2>(odd);
#pragma GCC unroll 16
        for (int k = 0; k < COUNT / 2; ++k) vectors[2 * k] = even[k], vectors[2 * k + 1] = odd[k];
    }
}

// Runs `body` as compiled for a kind of processor. It must be NMSPARSE_INLINED, and what it calls. With AVX-512 comes
// FMA for the shorter vectors too: a sum must not depend on where the compiler used which.
template <class Body>
NMSPARSE_TARGET("avx512f,fma")
auto compiled(Is<Simd::AVX512>, Body const& body) {
    return body();
}
template <class Body>
NMSPARSE_TARGET("avx2,fma")
auto compiled(Is<Simd::AVX2>, Body const& body) {
    return body();
}
template <class Body>
auto compiled(Is<Simd::PLAIN>, Body const& body) {
    return body();
}

inline Simd this_processor() {
#if defined(NMSPARSE_SIMD)  // the tests build a library for each, so that all of them run
    return Simd::NMSPARSE_SIMD;
#elif defined(__x86_64__)
    static Simd const found = !__builtin_cpu_supports("fma")       ? Simd::PLAIN
                              : __builtin_cpu_supports("avx512f") ? Simd::AVX512
                              : __builtin_cpu_supports("avx2")    ? Simd::AVX2
                                                                  : Simd::PLAIN;
    return found;
#else
    return Simd::PLAIN;
#endif
}

// Calls `body` with the kind of this processor.
template <class Body>
auto with_simd(Body const& body) {
    switch (this_processor()) {
        case Simd::AVX512: return body(Is<Simd::AVX512>());
        case Simd::AVX2: return body(Is<Simd::AVX2>());
        default: return body(Is<Simd::PLAIN>());
    }
}

// Runs `body` as compiled for this processor.
template <class Body>
auto vectorized(Body const& body) {
    return with_simd([&](auto simd) { return compiled(simd, body); });
}

}  // namespace nmsparse::cpu
