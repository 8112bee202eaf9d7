// Which way a product goes, and what it is cut into.
#include <memory>
#include <thread>
#include <vector>

#include "tile.h"
#include "tuning.h"

namespace nmsparse::cpu {

int64_t block_rows(Layer const& layer) {
    // Fewer are better for panels; but after each block of integers there is more to do.
    bool const few = layer.w.scale == nullptr && layer.sparse && layer.permutation == nullptr && 32 % layer.group == 0 &&
                     32 / layer.group * layer.keep % STEP == 0;
    int64_t rows = few ? 32 : MOST_ROWS;
    while (layer.w.scale != nullptr && layer.w.rows < layer.k && layer.w.rows % rows != 0) rows /= 2;
    return rows;
}

// Streaming wins while all tokens together read less than three quarters of W; then holding, until a panel pays.
Way way(Layer const& layer, int64_t tokens) {
    int64_t const keep = layer.sparse ? layer.keep : layer.group, group = layer.group;
    Tuning::Panels const& panels = layer.w.scale != nullptr        ? TUNING.of_integers
                                   : layer.w.kind == Kind::FLOAT ? TUNING.of_float
                                                                 : TUNING.of_sixteen_bits;
    if (tokens == 1 || (layer.sparse && 4 * tokens * keep <= 3 * group)) return Way::STREAMED;
    return tokens * (panels.read * group - 6 * keep) < panels.cost * group ? Way::HELD : Way::PACKED;
}

Cut cut(Way way, Lists const& lists, int64_t tokens, Weight const& w) {
    int64_t const n = w.n;
    if (way == Way::PACKED) {
        // As much for each thread, of as many as this process may have: ONNX Runtime does not tell a kernel how many its
        // session has, and fewer share the tiles evenly where their number divides this one.
        static int64_t const threads = std::max(std::thread::hardware_concurrency(), 1U);
        int64_t const tiles = round_up(ceil_div(n, TUNING.widest), threads);
        return {std::max<int64_t>(round_up(ceil_div(n, tiles), 32), TUNING.narrowest), 1};
    }
    // Long rows, so threads share the work by runs first; but the parts of many tokens would be large.
    int64_t const parts = tokens <= 32 ? runs_of(lists) : 1;
    int64_t const most = std::min<int64_t>(TUNING.longest, SCRATCH / (2 * tokens) / 128 * 128);
    int64_t const shared =
        std::min<int64_t>(parts == 1 ? 2 : ceil_div(8, parts), std::max<int64_t>(bytes(w.kind, n) / TUNING.short_row, 1));
    int64_t const tiles = std::max(ceil_div(n, most), shared);
    return {round_up(ceil_div(n, tiles), 128), parts};
}

void product(Way way, Lists const& lists, int64_t tokens, Weight const& w, Cut const& cut, Piece const& piece, float* out,
             int64_t out_stride) {
    thread_local std::vector<float> scratch(SCRATCH + LINE / sizeof(float));
    void* start = scratch.data();
    size_t room = scratch.size() * sizeof(float);
    std::align(LINE, SCRATCH * sizeof(float), start, room);
    int64_t const blocks = cut.parts == 1 ? lists.blocks() : run_of(lists), begin = piece.part * blocks;
    multiply_tile(
        way, w.kind,
        {lists, tokens, static_cast<Byte const*>(w.data) + bytes(w.kind, piece.column), bytes(w.kind, w.n),
         w.scale == nullptr ? nullptr : w.scale + piece.column, w.rows, w.n, piece.columns, begin,
         std::min(begin + blocks, lists.blocks()), out, out_stride, static_cast<float*>(start)});
}

}  // namespace nmsparse::cpu
