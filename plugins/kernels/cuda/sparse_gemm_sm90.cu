// Prefill on the sparse tensor cores of an H100 (wgmma), where mma.sp does not reach the rate of a dense product: the
// activations are the sparse operand, 2:4 along K, and W is read as it lies. Compiled for sm_90a only.
#include "gemm_sm90.h"

namespace nmsparse {

namespace {

// They wait for their products after each step of K, so a step is as long as it can be: 128 channels, a block of
// metadata.
template <Tile TILE>
struct PlanOf;
template <>
struct PlanOf<Tile::WIDE> : Together<256, 128, WGMMA_CHANNELS, Shape<_2, _1, _1>> {};
template <>
struct PlanOf<Tile::TALL> : Together<128, 128, WGMMA_CHANNELS, Shape<_2, _1, _1>> {};
template <>
struct PlanOf<Tile::SMALL> : InTurn<64, 128, WGMMA_CHANNELS, Shape<_1, _1, _1>> {};

using Sparse = cutlass::arch::OpClassSparseTensorOp;

template <class E, Tile TILE>
using SparseParts = Parts<PlanOf<TILE>, Sparse, E, 16>;

// For its name, by which resources.py knows it.
template <class E, Tile TILE>
struct SparseGemmSm90 : SparseParts<E, TILE>::Kernel {};

}  // namespace

template <class T>
cudaError_t sparse_gemm_sm90(Tile tile, Gemm const& args, cudaStream_t stream) {
    return with_tile(tile, [&](auto of) {
        using E = typename Element<T>::type;
        using Of = SparseParts<E, of.value>;
        using Config = typename Of::Multiply::SparseConfig;
        static_assert(typename Config::TensorEAtomM{} == WGMMA_TOKENS && typename Config::TensorEAtomK{} == WGMMA_CHANNELS);
        // The metadata are rounded up to whole blocks; beyond the tokens and K the copies into shared memory fill in zeros.
        auto const problem = cute::make_shape(args.tokens, args.n, args.k, 1);
        return run<SparseGemmSm90<E, of.value>>(
            {gemm::GemmUniversalMode::kGemm,
             problem,
             {static_cast<E const*>(args.a), Config::fill_layoutA(problem), static_cast<E const*>(args.w), {_1{}, args.n, 0},
              reinterpret_cast<uint8_t const*>(args.metadata), Config::fill_layoutE(problem)},
             {Of::Fusion::arguments(args), nullptr, {}, static_cast<E*>(args.y), {args.n, _1{}, 0}}},
            stream);
    });
}

template cudaError_t sparse_gemm_sm90<NMSPARSE_TYPE>(Tile, Gemm const&, cudaStream_t);
NMSPARSE_SHARED(sparse_gemm_sm90, SparseParts<typename Element<NMSPARSE_TYPE>::type, of.value>::Kernel::SharedStorageSize)

}  // namespace nmsparse
