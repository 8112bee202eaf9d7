// What a kernel is here: a struct that says what a block shares and what one thread does in each of its phases, with
// a barrier between two phases. A GPU runs it (kernels.cu); a CPU walks the same code in loops (walk.cpp), so that what
// is shipped is what the tests on machines without a GPU compare with the reference.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define NMSPARSE_DEVICE __host__ __device__ __forceinline__
#else
#define NMSPARSE_DEVICE inline
#endif

namespace nmsparse {

struct Place {
    int block_x, block_y, thread;
};

NMSPARSE_DEVICE float widen(__half value) { return __half2float(value); }
NMSPARSE_DEVICE float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
NMSPARSE_DEVICE void narrow(float value, __half& to) { to = __float2half_rn(value); }
NMSPARSE_DEVICE void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// Eight 16-bit numbers that travel in one access of 16 bytes.
template <class T>
struct alignas(16) Eight {
    T at[8];
};

// a / b, on a GPU within two units in the last place, in fewer instructions than a rounded division.
NMSPARSE_DEVICE float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

// Count, mean and sum of squared deviations of some numbers.
// Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983 (the pairwise update).
struct Moments {
    float count = 0, mean = 0, squares = 0;

    NMSPARSE_DEVICE void add(Moments const& other) {
        if (other.count == 0) return;
        if (count == 0) {
            *this = other;
            return;
        }
        float const total = count + other.count, apart = other.mean - mean, share = quotient(other.count, total);
        mean += apart * share;
        squares += other.squares + apart * apart * (count * share);
        count = total;
    }

    NMSPARSE_DEVICE float variance() const { return squares / (count - 1); }

    template <int COUNT>
    NMSPARSE_DEVICE static Moments of(float const (&values)[COUNT]) {
        Moments found;
        found.count = COUNT;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) found.mean += values[i];
        found.mean /= COUNT;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float const apart = values[i] - found.mean;
            found.squares += apart * apart;
        }
        return found;
    }
};

}  // namespace nmsparse
