// What the GEMMs of CUTLASS 3 for an H100 (wgmma) share: the plan of the work, and an epilogue that is
// y = nu * (a w) + eta * row_sum + bias in one tree of visitors. Where a pointer is null a default stands in its place:
// nu 1, eta, row_sum and bias 0.
#pragma once

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
using Column = cutlass::layout::ColumnMajor;

// A block's tile of tokens x columns x steps of K, the blocks that read a part of W together, and how two groups of
// warps share the work: both have half of one tile, or each has a tile in its turn and stores it while the other
// multiplies.
template <int M, int N, int K, class Cluster_, class Mainloop_, class Epilogue_>
struct Plan {
    using Block = Shape<Int<M>, Int<N>, Int<K>>;
    using Cluster = Cluster_;
    using Mainloop = Mainloop_;
    using Epilogue = Epilogue_;
};
template <int M, int N, int K, class Cluster>
using Together =
    Plan<M, N, K, Cluster, gemm::KernelTmaWarpSpecializedCooperative, epilogue::TmaWarpSpecializedCooperative>;
template <int M, int N, int K, class Cluster>
using InTurn = Plan<M, N, K, Cluster, gemm::KernelTmaWarpSpecializedPingpong, epilogue::TmaWarpSpecialized>;

template <class E, class Block>
struct Fused {
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

// Stores what a block has multiplied, as D in the layout `To`.
template <class Plan, class Class, class D, class To, class Fusion>
using StoreOf = typename epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, Class, typename Plan::Block, typename Plan::Cluster, epilogue::collective::EpilogueTileAuto, float,
    float, void, To, 16 / sizeof(D), D, To, 16 / sizeof(D), typename Plan::Epilogue, Fusion>::CollectiveOp;

// Multiplies E in the layouts A and B, with as many steps of K in flight as the store leaves room for.
template <class Plan, class Class, class E, class A, int ALIGNED, class B, class Store>
using MultiplyOf = typename gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, Class, E, A, ALIGNED, E, B, 8, float, typename Plan::Block, typename Plan::Cluster,
    gemm::collective::StageCountAutoCarveout<int(sizeof(typename Store::SharedStorage))>,
    typename Plan::Mainloop>::CollectiveOp;

// A GEMM of row-major operands with the epilogue above.
template <class Plan, class Class, class E, int ALIGNED>
struct Parts {
    using Fusion = Fused<E, typename Plan::Block>;
    using Store = StoreOf<Plan, Class, E, Row, typename Fusion::Tree>;
    using Multiply = MultiplyOf<Plan, Class, E, Row, ALIGNED, Row, Store>;
    using Kernel = gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Multiply, Store>;
};

template <class Kernel>
cudaError_t run(typename gemm::device::GemmUniversalAdapter<Kernel>::Arguments const& arguments, cudaStream_t stream) {
    using Adapter = gemm::device::GemmUniversalAdapter<Kernel>;
    cutlass::Status const status = Adapter::can_implement(arguments);
    return status_of(status == cutlass::Status::kSuccess ? Adapter()(arguments, nullptr, stream) : status);
}

}  // namespace nmsparse
