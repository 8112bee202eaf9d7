// Stands in for kernels.cu and the GEMMs of CUTLASS where there is no GPU: the kernels' own source, its grid walked by
// loops, and products by their definition. Of the sparse one the values and metadata are read by CUTLASS's own code.
#include <algorithm>
#include <memory>
#include <vector>

#include "../kernels/cuda/launch.h"

using Uncompress = void(uint16_t* values, void const* metadata, uint16_t* zs, int padded, int k);
extern "C" Uncompress pack_uncompressed, pack_uncompressed_wgmma;

namespace nmsparse {

int walked_sm = 0;  // the device that is stood in for
int compute_capability() { return walked_sm; }

namespace {

template <class Kernel, int PHASE = 0>
void walk_block(typename Kernel::Args const& args, typename Kernel::Shared& shared, Place place) {
    for (place.thread = 0; place.thread < Kernel::THREADS; ++place.thread)
        Kernel::template phase<PHASE>(args, shared, place);
    if constexpr (PHASE + 1 < Kernel::PHASES) walk_block<Kernel, PHASE + 1>(args, shared, place);
}

// Of a row of a and a column of w, from one step of K to another.
template <class T>
float product(T const* a, Gemm const& args, int row, int column, int from, int to) {
    auto const* w = static_cast<T const*>(args.w);
    float sum = 0;
    for (int i = from; i < to; ++i) sum += widen(a[int64_t(row) * args.k + i]) * widen(w[int64_t(i) * args.n + column]);
    return sum;
}

template <class T>
void multiply(T const* a, Gemm const& args) {
    for (int row = 0; row < args.tokens; ++row)
        for (int column = 0; column < args.n; ++column) {
            float sum = product(a, args, row, column, 0, args.k);
            if (args.nu != nullptr) sum *= args.nu[row];
            if (args.eta != nullptr && args.row_sum != nullptr) sum += args.eta[row] * args.row_sum[column];
            if (args.bias != nullptr) sum += args.bias[column];
            narrow(sum, static_cast<T*>(args.y)[int64_t(row) * args.n + column]);
        }
}

template <class T>
cudaError_t multiply_packed(Uncompress& uncompress, Gemm const& args) {
    std::vector<uint16_t> values(size_t(args.padded) * args.k / 2), zs(size_t(args.padded) * args.k);
    std::copy_n(static_cast<uint16_t const*>(args.a), values.size(), values.data());
    uncompress(values.data(), args.metadata, zs.data(), args.padded, args.k);
    multiply(reinterpret_cast<T const*>(zs.data()), args);
    return cudaSuccess;
}

}  // namespace

template <class Kernel>
cudaError_t launch(typename Kernel::Args const& args, cudaStream_t) {
    // One block's memory for all, never cleared: as on a GPU, a block finds what another left.
    auto const shared = std::make_unique<typename Kernel::Shared>();
    for (int y = 0; y < Kernel::blocks_y(args); ++y)
        for (int x = 0; x < Kernel::blocks_x(args); ++x) walk_block<Kernel>(args, *shared, {x, y, 0});
    return cudaSuccess;
}

template <class T>
cudaError_t sparse_gemm(Tile, Gemm const& args, cudaStream_t) {
    return multiply_packed<T>(pack_uncompressed, args);
}

template <class T>
cudaError_t sparse_gemm_sm90(Tile, Gemm const& args, cudaStream_t) {
    return multiply_packed<T>(pack_uncompressed_wgmma, args);
}

template <class T>
cudaError_t dense_gemm(Tile, Gemm const& args, cudaStream_t) {
    multiply(static_cast<T const*>(args.a), args);
    return cudaSuccess;
}

template <class T>
cudaError_t dense_gemm_sm90(Tile, Gemm const& args, cudaStream_t) {
    multiply(static_cast<T const*>(args.a), args);
    return cudaSuccess;
}

template <class T>
cudaError_t skinny_gemm_sm90(Gemm const& args, cudaStream_t) {
    int const part = args.k / args.splits;
    for (int token = 0; token < args.tokens; ++token)
        for (int split = 0; split < args.splits; ++split)
            for (int column = 0; column < args.n; ++column)
                args.partial[(int64_t(token) * args.splits + split) * args.n + column] =
                    product(static_cast<T const*>(args.a), args, token, column, part * split, part * (split + 1));
    return cudaSuccess;
}

#define INSTANCE(...) template cudaError_t launch<__VA_ARGS__>(__VA_ARGS__::Args const&, cudaStream_t);
NMSPARSE_KERNELS(INSTANCE)
template cudaError_t sparse_gemm<__half>(Tile, Gemm const&, cudaStream_t);
template cudaError_t sparse_gemm<__nv_bfloat16>(Tile, Gemm const&, cudaStream_t);
template cudaError_t sparse_gemm_sm90<__half>(Tile, Gemm const&, cudaStream_t);
template cudaError_t sparse_gemm_sm90<__nv_bfloat16>(Tile, Gemm const&, cudaStream_t);
template cudaError_t dense_gemm_sm90<__half>(Tile, Gemm const&, cudaStream_t);
template cudaError_t dense_gemm_sm90<__nv_bfloat16>(Tile, Gemm const&, cudaStream_t);
template cudaError_t skinny_gemm_sm90<__half>(Gemm const&, cudaStream_t);
template cudaError_t skinny_gemm_sm90<__nv_bfloat16>(Gemm const&, cudaStream_t);
template cudaError_t dense_gemm<__half>(Tile, Gemm const&, cudaStream_t);
template cudaError_t dense_gemm<__nv_bfloat16>(Tile, Gemm const&, cudaStream_t);

}  // namespace nmsparse
