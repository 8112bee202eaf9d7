// What Select leaves, times W, on the dense tensor cores of an H100 (wgmma): the rate of mma is half of theirs. Compiled
// for sm_90a only.
#include "gemm_sm90.h"

namespace nmsparse {

namespace {

template <Tile TILE>
struct PlanOf;
template <>
struct PlanOf<Tile::WIDE> : Together<128, 256, 64, Shape<_2, _1, _1>> {};
template <>
struct PlanOf<Tile::TALL> : InTurn<64, 256, 64, Shape<_1, _1, _1>> {};
template <>
struct PlanOf<Tile::SMALL> : InTurn<64, 128, 64, Shape<_1, _1, _1>> {};

using Dense = cutlass::arch::OpClassTensorOp;

template <class E, Tile TILE>
using DenseParts = Parts<PlanOf<TILE>, Dense, E, 8>;

// For its name, by which resources.py knows it.
template <class E, Tile TILE>
struct DenseGemmSm90 : DenseParts<E, TILE>::Kernel {};

// For few tokens, where reading W is all that takes time: the product turned round, so that W has the side of 128, and K
// in parts, so that there are blocks for every SM; GemvSum adds the parts.
template <class E>
struct Skinny {
    using Plan = Together<128, 64, 64, Shape<_1, _1, _1>>;
    using Fusion = visitor::LinearCombination<float, float, void, float>;
    using Store = StoreOf<Plan, Dense, float, Column, Fusion>;
    using Multiply = MultiplyOf<Plan, Dense, E, Column, 8, Column, Store>;
    using Kernel = gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Multiply, Store>;
};

template <class E>
struct SkinnyGemmSm90 : Skinny<E>::Kernel {};

}  // namespace

template <class T>
cudaError_t dense_gemm_sm90(Tile tile, Gemm const& args, cudaStream_t stream) {
    return with_tile(tile, [&](auto of) {
        using E = typename Element<T>::type;
        using Fusion = typename DenseParts<E, of.value>::Fusion;
        return run<DenseGemmSm90<E, of.value>>(
            {gemm::GemmUniversalMode::kGemm,
             {args.tokens, args.n, args.k, 1},
             {static_cast<E const*>(args.a), {args.k, _1{}, 0}, static_cast<E const*>(args.w), {_1{}, args.n, 0}},
             {Fusion::arguments(args), nullptr, {}, static_cast<E*>(args.y), {args.n, _1{}, 0}}},
            stream);
    });
}

template <class T>
cudaError_t skinny_gemm_sm90(Gemm const& args, cudaStream_t stream) {
    using E = typename Element<T>::type;
    int const part = args.k / args.splits;
    return run<SkinnyGemmSm90<E>>({gemm::GemmUniversalMode::kGemm,
                                   {args.n, args.tokens, part, args.splits},
                                   {static_cast<E const*>(args.w), {_1{}, args.n, int64_t(part) * args.n},
                                    static_cast<E const*>(args.a), {args.k, _1{}, part}},
                                   {{1, 0}, nullptr, {}, args.partial, {_1{}, int64_t(args.splits) * args.n, args.n}}},
                                  stream);
}

template cudaError_t dense_gemm_sm90<NMSPARSE_TYPE>(Tile, Gemm const&, cudaStream_t);
template cudaError_t skinny_gemm_sm90<NMSPARSE_TYPE>(Gemm const&, cudaStream_t);
NMSPARSE_SHARED(skinny_gemm_sm90, Skinny<typename Element<NMSPARSE_TYPE>::type>::Kernel::SharedStorageSize)
NMSPARSE_SHARED(dense_gemm_sm90, DenseParts<typename Element<NMSPARSE_TYPE>::type, of.value>::Kernel::SharedStorageSize)

}  // namespace nmsparse
