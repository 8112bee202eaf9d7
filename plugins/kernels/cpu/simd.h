// What the CPU kernels are written in: vectors of 16 numbers, which the compiler lowers to what a processor has.
#pragma once

#include <cstdint>
#include <cstring>

// One copy of a function for AVX-512, one for AVX2 with FMA and one for any x86-64; the loader picks one.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define NMSPARSE_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define NMSPARSE_CLONES
#endif
#define NMSPARSE_INLINE __attribute__((always_inline)) inline

namespace nmsparse::cpu {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef Floats FloatsAnywhere __attribute__((aligned(4), may_alias));

NMSPARSE_INLINE FloatsAnywhere& at(float* place) { return *reinterpret_cast<FloatsAnywhere*>(place); }
NMSPARSE_INLINE FloatsAnywhere const& at(float const* place) { return *reinterpret_cast<FloatsAnywhere const*>(place); }

}  // namespace nmsparse::cpu
