// The product of pruned tokens with W: only the rows that a token keeps are multiplied.
//
// Few tokens stream their rows, eight at once, into a tile of partial sums in L1. For more, a block of rows is copied to
// L1 first, where each token picks its own. A sum has three levels (the rows of a block, a run of blocks, all runs), so
// that its error is below that of a GEMM's long chains. What is added to what depends on the lists alone: not on the
// way, the tile, the other tokens or the threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "layer.h"
#include "simd.h"

#ifndef NMSPARSE_MUTANT
#define NMSPARSE_MUTANT 1.0F  // the tests build a library that is wrong on purpose, to see that they notice
#endif

namespace nmsparse::cpu {

namespace {

constexpr int STEP = 8;
constexpr int64_t RUN = 512;  // rows of W after which the partial sums are added to the output

struct Tile {
    Lists const& lists;
    int64_t tokens;
    float const* w;  // of the first column of the tile
    int64_t n, columns;
    float* out;
    int64_t out_stride;
    float* scratch;  // for `packed`, on a line of the cache
};

// The rows of a token that lie in a block.
struct Span {
    int32_t const* rows;
    float const* values;
    int64_t begin, end, last;

    NMSPARSE_INLINE Span(Lists const& lists, int64_t t, int64_t block)
        : rows(lists.rows + t * lists.capacity), values(lists.values + t * lists.capacity) {
        int32_t const* const ends = lists.ends + t * lists.blocks();
        begin = block == 0 ? 0 : ends[block - 1], end = ends[block], last = ends[lists.blocks() - 1];
    }
};

// Adds the sums of a run to the output and clears them.
NMSPARSE_INLINE void flush(Tile const& tile, float* sums, bool first) {
    for (int64_t t = 0; t < tile.tokens; ++t) {
        float *const y = tile.out + t * tile.out_stride, *const sum = sums + t * tile.columns;
        for (int64_t c = 0; c < tile.columns; ++c) {
            y[c] = (first ? 0.0F : y[c]) + sum[c] * NMSPARSE_MUTANT;
            sum[c] = 0;
        }
    }
}

// Streams ROWS rows at once, and asks for the next ones. `carried` holds a block's sum between two steps of it.
template <int ROWS>
NMSPARSE_INLINE void stream(float const* const* w, float const* values, float const* const* next, float* carried,
                            float* sums, bool first, bool last, int64_t columns) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        for (int r = 0; r < STEP; ++r) __builtin_prefetch(next[r] + c);
        Floats sum = first ? Floats{} : at(carried + c);
        for (int r = 0; r < ROWS; ++r) sum += at(w[r] + c) * values[r];
        if (last)
            at(sums + c) += sum;
        else
            at(carried + c) = sum;
    }
    for (; c < columns; ++c) {
        float sum = first ? 0.0F : carried[c];
        for (int r = 0; r < ROWS; ++r) sum += w[r][c] * values[r];
        if (last)
            sums[c] += sum;
        else
            carried[c] = sum;
    }
}

NMSPARSE_INLINE void stream_any(int64_t rows, float const* const* w, float const* values, float const* const* next,
                                float* carried, float* sums, bool first, bool last, int64_t columns) {
    switch (rows) {
        case 1: return stream<1>(w, values, next, carried, sums, first, last, columns);
        case 2: return stream<2>(w, values, next, carried, sums, first, last, columns);
        case 3: return stream<3>(w, values, next, carried, sums, first, last, columns);
        case 4: return stream<4>(w, values, next, carried, sums, first, last, columns);
        case 5: return stream<5>(w, values, next, carried, sums, first, last, columns);
        case 6: return stream<6>(w, values, next, carried, sums, first, last, columns);
        case 7: return stream<7>(w, values, next, carried, sums, first, last, columns);
        default: return stream<8>(w, values, next, carried, sums, first, last, columns);
    }
}

// For few tokens: each streams its rows from where they are.
NMSPARSE_INLINE void streamed(Tile const& tile) {
    alignas(64) float sums[STREAMED_TOKENS * STREAMED_COLUMNS], carried[STREAMED_COLUMNS];
    Lists const& lists = tile.lists;
    int64_t const blocks = lists.blocks(), run = std::max<int64_t>(RUN / lists.block, 1);
    std::fill(sums, sums + tile.tokens * tile.columns, 0.0F);
    for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t t = 0; t < tile.tokens; ++t) {
            Span const span(lists, t, b);
            for (int64_t i = span.begin; i < span.end; i += STEP) {
                int64_t const count = std::min<int64_t>(STEP, span.end - i);
                float const *here[STEP], *next[STEP];
                for (int64_t r = 0; r < STEP; ++r) {
                    here[r] = tile.w + span.rows[std::min(i + r, span.last - 1)] * tile.n;
                    next[r] = tile.w + span.rows[std::min(i + count + r, span.last - 1)] * tile.n;
                }
                stream_any(count, here, span.values + i, next, carried, sums + t * tile.columns, i == span.begin,
                           i + STEP >= span.end, tile.columns);
            }
        }
        if ((b + 1) % run == 0 || b + 1 == blocks) flush(tile, sums, b < run);
    }
}

// Adds a token's rows of a block, COUNT vectors wide, with the sums in registers.
template <int COUNT>
NMSPARSE_INLINE void gather(Span const& span, float const* panel, int64_t width, float* sums) {
    Floats sum[COUNT] = {};
    for (int64_t i = span.begin; i < span.end; ++i) {
        float const* const w = panel + span.rows[i] * width;
        float const value = span.values[i];
        for (int v = 0; v < COUNT; ++v) sum[v] += at(w + v * LANES) * value;
    }
    for (int v = 0; v < COUNT; ++v) at(sums + v * LANES) += sum[v];
}

// Copies a row to its place in each panel.
template <int64_t WIDTH>
NMSPARSE_INLINE void copy_row(Tile const& tile, int64_t row, int64_t start, float* copy) {
    int64_t const block = tile.lists.block;
    float const* const from = tile.w + row * tile.n;
    int64_t c = 0;
    for (; c + LANES <= tile.columns; c += LANES)
        at(copy + c / WIDTH * WIDTH * block + (row - start) * WIDTH + c % WIDTH) = at(from + c);
    for (; c < tile.columns; ++c) copy[c / WIDTH * WIDTH * block + (row - start) * WIDTH + c % WIDTH] = from[c];
}

// Asks for part `t` of a panel of the next block, while this one is multiplied.
template <int64_t WIDTH>
NMSPARSE_INLINE void ask(Tile const& tile, int64_t start, int64_t rows, int64_t column, int64_t t) {
    constexpr int64_t LINES = WIDTH / LANES;
    for (int64_t i = rows * LINES * t / tile.tokens, end = rows * LINES * (t + 1) / tile.tokens; i < end; ++i)
        __builtin_prefetch(tile.w + (start + i / LINES) * tile.n + column + i % LINES * LANES, 0, 2);
}

// For many tokens: a block of rows is copied to panels that fit into L1 before the tokens use it.
template <int COUNT>
NMSPARSE_INLINE void packed(Tile const& tile) {
    constexpr int64_t WIDTH = COUNT * LANES;
    float *const sums = tile.scratch, *const copy = sums + CHUNK * PACKED_COLUMNS;
    Lists const& lists = tile.lists;
    int64_t const blocks = lists.blocks(), run = std::max<int64_t>(RUN / lists.block, 1), columns = tile.columns;
    std::fill(sums, sums + tile.tokens * columns, 0.0F);
    for (int64_t b = 0; b < blocks; ++b) {
        int64_t const start = b * lists.block, rows = std::min(lists.block, lists.capacity - start);
        for (int64_t r = 0; r < rows; ++r) copy_row<WIDTH>(tile, start + r, start, copy);
        for (int64_t c = 0; c < columns; c += WIDTH) {
            float const* const panel = copy + c * lists.block - start * WIDTH;
            for (int64_t t = 0; t < tile.tokens; ++t) {
                ask<WIDTH>(tile, start + rows, std::min(lists.block, lists.capacity - start - rows), c, t);
                Span const span(lists, t, b);
                float* const sum = sums + t * columns + c;
                if (c + WIDTH <= columns) {
                    gather<COUNT>(span, panel, WIDTH, sum);
                    continue;
                }
                int64_t v = 0;
                for (; c + v + LANES <= columns; v += LANES) gather<1>(span, panel + v, WIDTH, sum + v);
                for (; c + v < columns; ++v) {
                    float one = 0;
                    for (int64_t i = span.begin; i < span.end; ++i)
                        one += panel[span.rows[i] * WIDTH + v] * span.values[i];
                    sum[v] += one;
                }
            }
        }
        if ((b + 1) % run == 0 || b + 1 == blocks) flush(tile, sums, b < run);
    }
}

template <int COUNT>
NMSPARSE_INLINE void either(Tile const& tile, bool copies) { copies ? packed<COUNT>(tile) : streamed(tile); }

// COUNT sums of 16 numbers fit into the registers that there are.
using Body = void (*)(Tile const&, bool);
void plain(Tile const& tile, bool copies) { either<2>(tile, copies); }
#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void avx2(Tile const& tile, bool copies) { either<4>(tile, copies); }
__attribute__((target("avx512f"))) void avx512(Tile const& tile, bool copies) { either<8>(tile, copies); }
Body chosen() {
    if (__builtin_cpu_supports("avx512f")) return avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2 : plain;
}
#else
Body chosen() { return plain; }
#endif

}  // namespace

void product(Lists const& lists, int64_t tokens, float const* w, int64_t n, int64_t column, int64_t columns, bool packed,
             float* out, int64_t out_stride) {
    static Body const body = chosen();
    thread_local std::vector<float> scratch;
    if (packed) scratch.resize((CHUNK + PACKED_ROWS) * PACKED_COLUMNS + LANES);
    void* start = scratch.data();
    size_t room = scratch.size() * sizeof(float);
    std::align(LANES * sizeof(float), 1, start, room);
    body({lists, tokens, w + column, n, columns, out, out_stride, static_cast<float*>(start)}, packed);
}

NMSPARSE_CLONES
void epilogue(Layer const& layer, Token const& token, float* y, float const* residual, int64_t column, int64_t columns) {
    bool const scaled = layer.variance && layer.sparse;
    float const* const row_sum = layer.row_sum == nullptr ? nullptr : layer.row_sum + column;
    float const* const bias = layer.bias == nullptr ? nullptr : layer.bias + column;
    for (int64_t c = 0; c < columns; ++c) {
        float found = scaled ? y[c] * token.nu : y[c];
        if (residual != nullptr) found += residual[c];
        if (row_sum != nullptr) found += token.eta * row_sum[c];
        if (bias != nullptr) found += bias[c];
        y[c] = found;
    }
}

}  // namespace nmsparse::cpu
