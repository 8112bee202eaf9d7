// What CUTLASS calls our types, and our word for how it ended.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include "launch.h"

namespace nmsparse {

template <class T>
struct Element;
template <>
struct Element<__half> {
    using type = cutlass::half_t;
};
template <>
struct Element<__nv_bfloat16> {
    using type = cutlass::bfloat16_t;
};

// The bytes that a block of a GEMM asks for as shared memory when it starts, for resources.py: KERNEL_shared_TYPE(tile),
// 0 for a tile that there is not. BYTES is an expression of `of`, the tile as a type.
#define NMSPARSE_JOIN_NAMED(KERNEL, TYPE) KERNEL##_shared_##TYPE
#define NMSPARSE_JOIN(KERNEL, TYPE) NMSPARSE_JOIN_NAMED(KERNEL, TYPE)
#define NMSPARSE_SHARED(KERNEL, ...)                                                                            \
    extern "C" __attribute__((visibility("default"))) int NMSPARSE_JOIN(KERNEL, NMSPARSE_TYPE)(int tile) {      \
        int bytes = 0;                                                                                          \
        with_tile(Tile(tile), [&](auto of) {                                                                    \
            bytes = int(__VA_ARGS__);                                                                           \
            return cudaSuccess;                                                                                 \
        });                                                                                                     \
        return bytes;                                                                                           \
    }

inline cudaError_t status_of(cutlass::Status status) {
    if (status == cutlass::Status::kSuccess) return cudaSuccess;
    cudaError_t const last = cudaGetLastError();
    return last == cudaSuccess ? cudaErrorInvalidValue : last;
}

}  // namespace nmsparse
