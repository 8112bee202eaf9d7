// What the CPU kernels are written in: vectors of 16 numbers, which the compiler lowers to what a processor has, and
// the choice between the copies that it makes for AVX-512, for AVX2 and for any processor.
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

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef Floats FloatsAnywhere __attribute__((aligned(4), may_alias));

NMSPARSE_INLINE FloatsAnywhere& at(float* place) { return *reinterpret_cast<FloatsAnywhere*>(place); }
NMSPARSE_INLINE FloatsAnywhere const& at(float const* place) { return *reinterpret_cast<FloatsAnywhere const*>(place); }

enum class Simd { PLAIN, AVX2, AVX512 };
template <Simd S>
using Is = std::integral_constant<Simd, S>;

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
