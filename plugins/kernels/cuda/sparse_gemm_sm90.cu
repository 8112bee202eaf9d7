// Prefill on the sparse tensor cores of an H100 (wgmma), where mma.sp does not reach the rate of a dense product: the
// activations are the sparse operand, 2:4 along K, and W is read as it lies. Compiled for sm_90a only.
#include <cutlass/cutlass.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "element.h"

namespace nmsparse {

namespace epilogue = cutlass::epilogue;
namespace gemm = cutlass::gemm;
namespace visitor = cutlass::epilogue::fusion;
using cute::_1;
using cute::_2;
using cute::Int;
using cute::Shape;
using Row = cutlass::layout::RowMajor;

// A block's tile, the blocks that read a part of W together, and how two groups of warps share the work. They wait for
// their products after each step of K, so a step is as long as it can be: 128 channels, a block of metadata.
//
// WIDE moves the fewest bytes for a product: a step's A, which is half a matrix, is as large as its W, and three steps
// fit in shared memory. TALL has twice the blocks. SMALL has four times as many, and one group stores its tile while the
// other multiplies: for few tokens, few columns or a short K. Chosen by these sums; none has been timed.
template <int M, class Cluster_, class Mainloop_, class Epilogue_>
struct Plan {
    using Block = Shape<Int<M>, Int<128>, Int<WGMMA_CHANNELS>>;
    using Cluster = Cluster_;
    using Mainloop = Mainloop_;
    using Epilogue = Epilogue_;
};
template <int M>
using Together = Plan<M, Shape<_2, _1, _1>, gemm::KernelTmaWarpSpecializedCooperative,
                      epilogue::TmaWarpSpecializedCooperative>;
template <int M>
using InTurn = Plan<M, Shape<_1, _1, _1>, gemm::KernelTmaWarpSpecializedPingpong, epilogue::TmaWarpSpecialized>;
template <Tile TILE>
struct PlanOf;
template <>
struct PlanOf<Tile::WIDE> : Together<256> {};
template <>
struct PlanOf<Tile::TALL> : Together<128> {};
template <>
struct PlanOf<Tile::SMALL> : InTurn<64> {};

template <class E, class Block>
struct Epilogue {
    using OfToken = visitor::Sm90ColBroadcast<0, Block, float>;
    using OfColumn = visitor::Sm90RowBroadcast<0, Block, float>;
    template <class To>
    using MultiplyAdd =
        visitor::Sm90Compute<cutlass::homogeneous_multiply_add, To, float, cutlass::FloatRoundStyle::round_to_nearest>;
    using Shifted = visitor::Sm90EVT<MultiplyAdd<float>, OfToken, OfColumn, OfColumn>;
    using Tree = visitor::Sm90EVT<MultiplyAdd<E>, OfToken, visitor::Sm90AccFetch, Shifted>;

    static typename Tree::Arguments arguments(Gemm const& args) {
        return {{args.nu, 1}, {}, {{args.eta, 0}, {args.row_sum, 0}, {args.bias, 0}, {}}, {}};
    }
};

template <class E, Tile TILE>
struct Parts : PlanOf<TILE> {
    using Plan = PlanOf<TILE>;
    using Fusion = Epilogue<E, typename Plan::Block>;
    using Store = typename epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, typename Plan::Block, typename Plan::Cluster,
        epilogue::collective::EpilogueTileAuto, float, float, void, Row, 8, E, Row, 8, typename Plan::Epilogue,
        typename Fusion::Tree>::CollectiveOp;
    using Multiply = typename gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, E, Row, 16, E, Row, 8, float, typename Plan::Block,
        typename Plan::Cluster, gemm::collective::StageCountAutoCarveout<int(sizeof(typename Store::SharedStorage))>,
        typename Plan::Mainloop>::CollectiveOp;
    using Kernel = gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Multiply, Store>;
};

// For its name, by which resources.py knows it.
template <class E, Tile TILE>
struct SparseGemmSm90 : Parts<E, TILE>::Kernel {};

template <class T, Tile TILE>
cudaError_t sparse_gemm_of(Gemm const& args, cudaStream_t stream) {
    using E = typename Element<T>::type;
    using Of = Parts<E, TILE>;
    using Adapter = gemm::device::GemmUniversalAdapter<SparseGemmSm90<E, TILE>>;
    using Sparse = typename Of::Multiply::SparseConfig;
    static_assert(typename Sparse::TensorEAtomM{} == WGMMA_TOKENS && typename Sparse::TensorEAtomK{} == WGMMA_CHANNELS);
    // The metadata are rounded up to whole blocks; beyond the tokens and K the copies into shared memory fill in zeros.
    auto const problem = cute::make_shape(args.tokens, args.n, args.k, 1);
    typename Adapter::Arguments const arguments{
        gemm::GemmUniversalMode::kGemm,
        problem,
        {static_cast<E const*>(args.a), Sparse::fill_layoutA(problem), static_cast<E const*>(args.w), {_1{}, args.n, 0},
         reinterpret_cast<uint8_t const*>(args.metadata), Sparse::fill_layoutE(problem)},
        {Of::Fusion::arguments(args), nullptr, {}, static_cast<E*>(args.y), {args.n, _1{}, 0}}};
    cutlass::Status const status = Adapter::can_implement(arguments);
    return status_of(status == cutlass::Status::kSuccess ? Adapter()(arguments, nullptr, stream) : status);
}

template <class T>
cudaError_t sparse_gemm_sm90(Tile tile, Gemm const& args, cudaStream_t stream) {
    return with_tile(tile, [&](auto of) { return sparse_gemm_of<T, of.value>(args, stream); });
}

template cudaError_t sparse_gemm_sm90<NMSPARSE_TYPE>(Tile, Gemm const&, cudaStream_t);
NMSPARSE_SHARED(sparse_gemm_sm90, Parts<typename Element<NMSPARSE_TYPE>::type, of.value>::Kernel::SharedStorageSize)

}  // namespace nmsparse
