// What CUTLASS calls our types, and our word for how it ended.
#pragma once

#include <cuda_runtime_api.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

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

inline cudaError_t status_of(cutlass::Status status) {
    if (status == cutlass::Status::kSuccess) return cudaSuccess;
    cudaError_t const last = cudaGetLastError();
    return last == cudaSuccess ? cudaErrorInvalidValue : last;
}

}  // namespace nmsparse
