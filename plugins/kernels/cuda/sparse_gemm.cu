// Prefill on sparse tensor cores (mma.sp): the activations are the sparse operand, 2:4 along K.
#include <cutlass/gemm/device/gemm_sparse_with_visitor.h>

#include "gemm.h"

namespace nmsparse {

namespace {  // or the linker takes one file's template for the other's

template <class T, Tile TILE, class E = typename Element<T>::type, class Shape = ShapeOf<TILE>>
using SparseKernel = cutlass::gemm::device::SparseGemmWithVisitor<
    E, Row, E, Row, E, Row, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, typename Shape::Block,
    typename Shape::Warp, cutlass::gemm::GemmShape<16, 8, 32>, typename Epilogue<E, Shape>::Tree,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, Shape::STAGES, 8, 8, cutlass::arch::OpMultiplyAdd, 1>;

template <class T, Tile TILE>
cudaError_t sparse_gemm_of(Gemm const& args, cudaStream_t stream) {
    using E = typename Element<T>::type;
    using Epilogue = Epilogue<E, ShapeOf<TILE>>;
    using Kernel = SparseKernel<T, TILE>;
    using Metadata = typename Kernel::ElementE;
    typename Kernel::Arguments const arguments(
        {args.padded, args.n, args.k}, {static_cast<E const*>(args.a), args.k / 2}, {static_cast<E const*>(args.w), args.n},
        {reinterpret_cast<Metadata*>(const_cast<uint32_t*>(args.metadata)), Kernel::LayoutE::packed({args.padded, args.k / 16})},
        Epilogue::arguments(args));
    cutlass::Status const status = Kernel::can_implement(arguments);
    return status_of(status == cutlass::Status::kSuccess ? Kernel()(arguments, nullptr, stream) : status);
}

}  // namespace

template <class T>
cudaError_t sparse_gemm(Tile tile, Gemm const& args, cudaStream_t stream) {
    return with_tile(tile, [&](auto of) { return sparse_gemm_of<T, of.value>(args, stream); });
}

template cudaError_t sparse_gemm<NMSPARSE_TYPE>(Tile, Gemm const&, cudaStream_t);
NMSPARSE_SHARED(sparse_gemm, sizeof(typename SparseKernel<NMSPARSE_TYPE, of.value>::GemmKernel::SharedStorage))

}  // namespace nmsparse
