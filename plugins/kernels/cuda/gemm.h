// GEMMs of CUTLASS whose epilogue is y = nu * (a w) + eta * row_sum + bias, in one tree of visitors for both.
//
// Where a pointer is null a default stands in its place: nu 1, eta, row_sum and bias 0.
#pragma once

// In this order: the headers of the visitors do not include all that they use.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/epilogue_with_visitor_callbacks.h>
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "element.h"

namespace nmsparse {

namespace visitor = cutlass::epilogue::threadblock;
using cute::_0;
using cute::_1;
using cute::Stride;
using Row = cutlass::layout::RowMajor;

// The shape of a block's tile, of a warp's part of it, and how many steps of K are in flight.
template <int M, int N, int WARP_M, int WARP_N, int STAGES_>
struct Shape {
    using Block = cutlass::gemm::GemmShape<M, N, 64>;
    using Warp = cutlass::gemm::GemmShape<WARP_M, WARP_N, 64>;
    static constexpr int STAGES = STAGES_;
};
template <Tile TILE>
struct ShapeOf;
template <>
struct ShapeOf<Tile::WIDE> : Shape<128, 128, 64, 64, 3> {};
template <>
struct ShapeOf<Tile::TALL> : Shape<128, 64, 64, 32, 3> {};
template <>
struct ShapeOf<Tile::SMALL> : Shape<64, 64, 32, 32, 4> {};

// Stores the first `rows` rows: the product has more, because metadata come for 32 tokens at a time.
template <class Map, class E>
using Store =
    visitor::VisitorAuxStore<Map, E, cutlass::FloatRoundStyle::round_to_nearest, Stride<int64_t, _1, int64_t>>;
template <class Map, class E>
struct StoreRows : Store<Map, E> {
    using Base = Store<Map, E>;

    struct Arguments {
        typename Base::Arguments store;
        int rows = 0;
    };
    struct Params {
        typename Base::Params store;
        int rows = 0;
    };

    template <class Problem>
    static constexpr Params to_underlying_arguments(Problem const& problem, Arguments const& args, void* workspace) {
        return {Base::to_underlying_arguments(problem, args.store, workspace), args.rows};
    }

    CUTLASS_HOST_DEVICE StoreRows() {}

    CUTLASS_HOST_DEVICE StoreRows(Params const& params, typename Base::SharedStorage const& shared)
        : Base(params.store, shared), rows(params.rows) {}

    int rows;

    template <class Problem>
    CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, Problem problem) {
        return Base::get_callbacks(tile, thread, cute::make_tuple(rows, cute::get<1>(problem), cute::get<2>(problem)));
    }
};

template <class E, class Shape>
struct Epilogue {
    using Map = visitor::OutputTileThreadLayout<typename Shape::Block, typename Shape::Warp, E, 8, 1>;
    using OfToken = visitor::VisitorColBroadcast<Map, float, Stride<_1, _0, int32_t>>;
    using OfColumn = visitor::VisitorRowBroadcast<Map, float, Stride<_0, _1, int32_t>>;
    using MultiplyAdd = visitor::VisitorCompute<cutlass::homogeneous_multiply_add, float, float,
                                                cutlass::FloatRoundStyle::round_to_nearest>;
    using Shifted = visitor::Sm80EVT<MultiplyAdd, OfToken, OfColumn, OfColumn>;
    using Scaled = visitor::Sm80EVT<MultiplyAdd, OfToken, visitor::VisitorAccFetch, Shifted>;
    using Tree = visitor::Sm80EVT<StoreRows<Map, E>, Scaled>;

    static typename Tree::Arguments arguments(Gemm const& args) {
        typename OfToken::Arguments const nu{const_cast<float*>(args.nu), 1, {}}, eta{const_cast<float*>(args.eta), 0, {}};
        typename OfColumn::Arguments const row_sum{const_cast<float*>(args.row_sum), 0, {}},
            bias{const_cast<float*>(args.bias), 0, {}};
        return {{nu, {}, {eta, row_sum, bias, {}}, {}},
                {{static_cast<E*>(args.y), {args.n, _1{}, int64_t(args.tokens) * args.n}}, args.tokens}};
    }
};

}  // namespace nmsparse
