// Prefill on sparse tensor cores of an H100 (wgmma), where mma.sp is no faster than a dense product: the activations
// are the sparse operand, 2:4 along K, W is read as it lies.
#include <cutlass/cutlass.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "launch.h"

namespace nmsparse {

namespace visitor = cutlass::epilogue::fusion;
namespace collective = cutlass::gemm::collective;
namespace gemm = cutlass::gemm;
using cute::_0;
using cute::_1;
using cute::_2;
using cute::Int;
using cute::Shape;
using cute::Stride;
using Row = cutlass::layout::RowMajor;

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

template <int M, int N, class Cluster_, class Mainloop_, class Epilogue_>
struct Plan {
    using Tile = Shape<Int<M>, Int<N>, Int<128>>;
    using Cluster = Cluster_;
    using Mainloop = Mainloop_;
    using Epilogue = Epilogue_;
};
template <Tile TILE>
struct PlanOf;
template <>
struct PlanOf<Tile::WIDE> : Plan<256, 128, Shape<_2, _1, _1>, gemm::KernelTmaWarpSpecializedCooperative,
                                 cutlass::epilogue::TmaWarpSpecializedCooperative> {};
template <>
struct PlanOf<Tile::TALL> : Plan<128, 128, Shape<_2, _1, _1>, gemm::KernelTmaWarpSpecializedCooperative,
                                 cutlass::epilogue::TmaWarpSpecializedCooperative> {};
template <>
struct PlanOf<Tile::SMALL> : Plan<64, 128, Shape<_1, _1, _1>, gemm::KernelTmaWarpSpecializedPingpong,
                                  cutlass::epilogue::TmaWarpSpecialized> {};

template <class Plan>
struct Tree {
    using OfToken = visitor::Sm90ColBroadcast<0, typename Plan::Tile, float>;
    using OfColumn = visitor::Sm90RowBroadcast<0, typename Plan::Tile, float>;
    template <class Out>
    using MultiplyAdd =
        visitor::Sm90Compute<cutlass::homogeneous_multiply_add, Out, float, cutlass::FloatRoundStyle::round_to_nearest>;
    using Shifted = visitor::Sm90EVT<MultiplyAdd<float>, OfToken, OfColumn, OfColumn>;
    template <class E>
    using Scaled = visitor::Sm90EVT<MultiplyAdd<E>, OfToken, visitor::Sm90AccFetch, Shifted>;
};

template <class T, Tile TILE>
cudaError_t sparse_gemm_of(Gemm const& args, cudaStream_t stream) {
    using E = typename Element<T>::type;
    using Plan = PlanOf<TILE>;
    using Fusion = typename Tree<Plan>::template Scaled<E>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, typename Plan::Tile, typename Plan::Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row, 8, E, Row, 8, typename Plan::Epilogue,
        Fusion>::CollectiveOp;
    using Mainloop = typename collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, E, Row, 16, E, Row, 8, float, typename Plan::Tile,
        typename Plan::Cluster, collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
        typename Plan::Mainloop>::CollectiveOp;
    using Kernel = gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
    using Adapter = gemm::device::GemmUniversalAdapter<Kernel>;
    using Config = typename Mainloop::SparseConfig;

    cute::tuple<int, int, int, int> const problem{args.tokens, args.n, args.k, 1};
    typename Fusion::Arguments const fusion{
        {args.nu, 1}, {}, {{args.eta}, {args.row_sum}, {args.bias}, {}}, {}};
    typename Adapter::Arguments const arguments{
        gemm::GemmUniversalMode::kGemm,
        problem,
        {static_cast<E const*>(args.a), Config::fill_layoutA(problem), static_cast<E const*>(args.w),
         {_1{}, int64_t(args.n), int64_t(0)}, reinterpret_cast<uint8_t const*>(args.metadata), Config::fill_layoutE(problem)},
        {fusion, nullptr, {}, static_cast<E*>(args.y), {int64_t(args.n), _1{}, int64_t(0)}}};
    cutlass::Status status = Adapter::can_implement(arguments);
    Adapter adapter;
    if (status == cutlass::Status::kSuccess) status = adapter(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) return cudaSuccess;
    cudaError_t const last = cudaGetLastError();
    return last == cudaSuccess ? cudaErrorInvalidValue : last;
}

template <class T>
cudaError_t sparse_gemm_sm90(Tile tile, Gemm const& args, cudaStream_t stream) {
    switch (tile) {
        case Tile::WIDE: return sparse_gemm_of<T, Tile::WIDE>(args, stream);
#ifndef NMSPARSE_FIRST
        case Tile::TALL: return sparse_gemm_of<T, Tile::TALL>(args, stream);
        case Tile::SMALL: return sparse_gemm_of<T, Tile::SMALL>(args, stream);
#endif
        default: return cudaErrorInvalidValue;
    }
}

template cudaError_t sparse_gemm_sm90<NMSPARSE_TYPE>(Tile, Gemm const&, cudaStream_t);

}  // namespace nmsparse
