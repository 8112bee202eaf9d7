// What the CPU kernels are written in: vectors of numbers, and the choice between the copies that the compiler makes for
// AVX-512, for AVX2 and for any processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define NMSPARSE_INLINED __attribute__((always_inline))
#define NMSPARSE_INLINE NMSPARSE_INLINED inline
#if defined(__x86_64__)
#define NMSPARSE_TARGET(features) __attribute__((target(features), noinline))
#else
#define NMSPARSE_TARGET(features)
#endif

namespace nmsparse::cpu {

enum class Simd { PLAIN, AVX2, AVX512 };
template <Simd S>
using Is = std::integral_constant<Simd, S>;

// A vector as long as a register. Longer ones mean the same, but arrays of them are kept in memory. FIRST and LAST take
// the first and the last halves of two vectors, by turns.
template <Simd>
struct Register {
    typedef float Floats __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
    static constexpr Ints FIRST = {0, 4, 1, 5}, LAST = {2, 6, 3, 7};
};
template <>
struct Register<Simd::AVX2> {
    typedef float Floats __attribute__((vector_size(32)));
    typedef int32_t Ints __attribute__((vector_size(32)));
    static constexpr Ints FIRST = {0, 8, 1, 9, 2, 10, 3, 11}, LAST = {4, 12, 5, 13, 6, 14, 7, 15};
};
template <>
struct Register<Simd::AVX512> {
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));
    static constexpr Ints FIRST = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    static constexpr Ints LAST = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
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
