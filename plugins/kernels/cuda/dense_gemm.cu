// Tokens too few for the sparse tensor cores and too many for the GEMV: what Select leaves, times W, densely.
#include "gemm.h"

namespace nmsparse {

namespace {  // or the linker takes one file's template for the other's

template <class T, Tile TILE, class E = typename Element<T>::type, class Shape = ShapeOf<TILE>>
using DenseKernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    E, Row, cutlass::ComplexTransform::kNone, 8, E, Row, cutlass::ComplexTransform::kNone, 8, E, Row, 8, float, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, cutlass::gemm::GemmShape<Shape::Block::kM, Shape::Block::kN, 32>,
    cutlass::gemm::GemmShape<Shape::Warp::kM, Shape::Warp::kN, 32>, cutlass::gemm::GemmShape<16, 8, 16>,
    typename Epilogue<E, Shape>::Tree, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, Shape::STAGES,
    cutlass::arch::OpMultiplyAdd, 1>::GemmKernel;

template <class T, Tile TILE>
cudaError_t dense_gemm_of(Gemm const& args, cudaStream_t stream) {
    using Epilogue = Epilogue<typename Element<T>::type, ShapeOf<TILE>>;
    using Adapter = cutlass::gemm::device::GemmUniversalAdapter<DenseKernel<T, TILE>>;
    typename Adapter::Arguments const arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, {args.tokens, args.n, args.k}, 1, Epilogue::arguments(args), args.a, args.w,
        nullptr, nullptr, 0, 0, 0, 0, args.k, args.n, 0, 0);
    cutlass::Status const status = Adapter::can_implement(arguments);
    return status_of(status == cutlass::Status::kSuccess ? Adapter()(arguments, nullptr, stream) : status);
}

}  // namespace

template <class T>
cudaError_t dense_gemm(Tile tile, Gemm const& args, cudaStream_t stream) {
    return with_tile(tile, [&](auto of) { return dense_gemm_of<T, of.value>(args, stream); });
}

template cudaError_t dense_gemm<NMSPARSE_TYPE>(Tile, Gemm const&, cudaStream_t);
NMSPARSE_SHARED(dense_gemm, sizeof(typename DenseKernel<NMSPARSE_TYPE, of.value>::SharedStorage))

}  // namespace nmsparse
