// What the plugin calls. Every function returns the error of its launch and runs nothing on a stream that has one.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "gemv.h"
#include "pack.h"
#include "select.h"
#include "token_shift.h"

namespace nmsparse {

// Runs one of the kernels below; kernels.cu has them for a GPU.
template <class Kernel>
cudaError_t launch(typename Kernel::Args const& args, cudaStream_t stream);

// Of the current device, 10 * major + minor; 0 where there is none.
int compute_capability();

// Writes DEFINE(kernel) for each.
#define NMSPARSE_KERNELS(DEFINE) \
    DEFINE(Pack<__half>)         \
    DEFINE(Pack<__nv_bfloat16>)  \
    DEFINE(Select<__half>)       \
    DEFINE(Select<__nv_bfloat16>) \
    DEFINE(TokenShift<__half>)   \
    DEFINE(TokenShift<__nv_bfloat16>) \
    DEFINE(TokenScale)           \
    DEFINE(Gemv<__half>)         \
    DEFINE(Gemv<__nv_bfloat16>)  \
    DEFINE(GemvSum<__half>)      \
    DEFINE(GemvSum<__nv_bfloat16>)

// y[tokens, n] = nu * (a w) + eta * row_sum + bias in 16 bits, summed in float32. `a` is what Pack writes, with
// `metadata`, or what Select writes as `zs`, without.
struct Gemm {
    void const* a;
    uint32_t const* metadata;
    void const* w;                // [k, n]
    float const *nu, *eta;        // [padded] or null
    float const *row_sum, *bias;  // [n] or null
    void* y;
    int tokens, padded, k, n;  // padded as Pack has it; of a dense product it is `tokens`
    float* partial = nullptr;  // [tokens, splits, n]: where skinny_gemm_sm90 leaves a w of each part of K, instead of y
    int splits = 1;
};

// The tiles of tokens x columns that a block computes: tactics, of which TensorRT measures the fastest.
enum class Tile : int32_t { WIDE, TALL, SMALL, COUNT };

// Returns of(tile), with the tile as a type.
template <class F>
cudaError_t with_tile(Tile tile, F of) {
    switch (tile) {
        case Tile::WIDE: return of(std::integral_constant<Tile, Tile::WIDE>());
        case Tile::TALL: return of(std::integral_constant<Tile, Tile::TALL>());
        case Tile::SMALL: return of(std::integral_constant<Tile, Tile::SMALL>());
        default: return cudaErrorInvalidValue;
    }
}

template <class T>
cudaError_t sparse_gemm(Tile tile, Gemm const& args, cudaStream_t stream);

// The same with metadata in WGMMA's order, on compute capability 9.0 only.
template <class T>
cudaError_t sparse_gemm_sm90(Tile tile, Gemm const& args, cudaStream_t stream);

template <class T>
cudaError_t dense_gemm(Tile tile, Gemm const& args, cudaStream_t stream);

// The same on compute capability 9.0 only; skinny is for few tokens.
template <class T>
cudaError_t dense_gemm_sm90(Tile tile, Gemm const& args, cudaStream_t stream);
template <class T>
cudaError_t skinny_gemm_sm90(Gemm const& args, cudaStream_t stream);

}  // namespace nmsparse
