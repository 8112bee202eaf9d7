// A tile of a product: what product.cpp cuts and tile.cpp multiplies.
#pragma once

#include <algorithm>

#include "layer.h"

namespace nmsparse::cpu {

using Byte = unsigned char;
constexpr int64_t SCRATCH = 3 * 64 * 1024;  // numbers: a tile's sums must stay in L2, beside the rows of W
constexpr int64_t RUN = 512;                // rows of a run, at most

// Blocks of a run, after which the partial sums are added to the output, and runs: an even number of about as many rows,
// for threads share the work by runs.
inline int64_t run_of(Lists const& lists) { return ceil_div(lists.blocks(), 2 * ceil_div(lists.k, 2 * RUN)); }
inline int64_t runs_of(Lists const& lists) { return ceil_div(lists.blocks(), run_of(lists)); }

struct Tile {
    Lists const& lists;
    int64_t tokens;
    Byte const* w;   // of the first column of the tile
    int64_t stride;  // of a row, in bytes
    float const* scale;
    int64_t scale_rows, n, columns;
    int64_t begin, end;  // blocks
    float* out;
    int64_t out_stride;
    float* scratch;  // on a line of the cache

    int64_t rows_end() const { return std::min(end * lists.block, lists.k); }
    Byte const* row(int64_t i) const { return w + i * stride; }
    float const* scale_of(int64_t block) const {
        return scale == nullptr ? nullptr : scale + block * lists.block / scale_rows * n;
    }
    bool in_first_run(int64_t block) const { return block - begin < run_of(lists); }
    bool ends_run(int64_t block) const { return (block + 1) % run_of(lists) == 0 || block + 1 == end; }
};

// out[t, c] = the sum over the listed rows, from block `begin` to `end`, of value * w[row, c].
void multiply_tile(Way way, Kind kind, Tile const& tile);

}  // namespace nmsparse::cpu
