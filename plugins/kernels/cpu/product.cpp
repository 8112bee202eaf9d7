// The product of pruned tokens with W, in one of three ways.
//
// STREAMED, for very few tokens: each reads the rows that it keeps from where they are, eight at once.
// HELD, for few: every row is read once, eight at once, and held in registers while it is multiplied for all tokens, by
// zero where a token has dropped it. Reading W is what takes the time, and long runs of whole rows are read fastest.
// PACKED, for many: a block of rows is copied to a panel in L1, where each token multiplies its own, with the sums in
// registers, so that dropped rows cost nothing.
//
// A sum has three levels (the rows of a block, a run of blocks, all runs), so that its error is below that of a GEMM's
// long chains. The scale of integers is applied to the sum of a block, whose rows share it. What is added to what
// depends on the pruned numbers alone: not on the way, the tile, the other tokens or the threads. (A row times zero
// changes no sum, unless W holds Inf or NaN, which HELD shows as a dense product does.)
#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "layer.h"
#include "rows.h"
#include "simd.h"

#ifndef NMSPARSE_MUTANT
#define NMSPARSE_MUTANT 1.0F  // the tests build a library that is wrong on purpose, to see that they notice
#endif

namespace nmsparse::cpu {

namespace {

constexpr int64_t RUN = 512;                      // rows of a run, at most
constexpr int64_t WIDEST = 1024, NARROWEST = 64;  // columns of a tile of panels
constexpr int64_t LONGEST = 16384;                // columns of a tile of few tokens
constexpr int64_t SHORT = 1024;                   // bytes of a row that are not worth cutting
constexpr int64_t SCRATCH = 3 * 64 * 1024;        // numbers: a tile's sums must stay in L2, beside the rows of W
constexpr int SUMS = 12;                          // vectors of sums for a token of a panel that fit into the registers
constexpr int64_t PANEL = 9 * 1024;               // numbers of a panel, which must stay in L1

// What fits into the registers: so many rows of so many vectors, beside a sum of each vector for so many tokens. A token
// alone has all registers for its sums, and reads wider strips.
template <Simd>
struct OfNumbers {
    static constexpr int ROWS = 2, VECTORS = 4, TOKENS = 1;
};
template <>
struct OfNumbers<Simd::AVX2> {
    static constexpr int ROWS = 4, VECTORS = 2, TOKENS = 2;
};
template <>
struct OfNumbers<Simd::AVX512> {
    static constexpr int ROWS = 8, VECTORS = 2, TOKENS = 4;
};
template <Simd S, class Row>
struct Many {
    static constexpr int HELD = OfNumbers<S>::ROWS * OfNumbers<S>::VECTORS;
    static constexpr int VECTORS = std::max(Row::VECTORS, OfNumbers<S>::VECTORS), ROWS = std::max(HELD / VECTORS, 1);
    static constexpr int TOKENS = std::max(OfNumbers<S>::TOKENS * OfNumbers<S>::VECTORS / VECTORS, 1);
    static constexpr int64_t WIDTH = VECTORS * LANES_OF<S>;  // of a strip, in columns
    static constexpr int64_t AHEAD = 512;                    // bytes of a row that are asked for before they are read
};
template <Simd S, class Row>
struct Alone {
    static constexpr int VECTORS = std::max(Row::VECTORS, 4);
    static constexpr int64_t WIDTH = VECTORS * LANES_OF<S>, AHEAD = 1024;
};

// Blocks of a run, after which the partial sums are added to the output, and runs: an even number of about as many rows,
// for threads share the work by runs.
int64_t run_of(Lists const& lists) { return ceil_div(lists.blocks(), 2 * ceil_div(lists.k, 2 * RUN)); }
int64_t runs_of(Lists const& lists) { return ceil_div(lists.blocks(), run_of(lists)); }

struct Tile {
    Lists const& lists;
    int64_t tokens;
    Byte const* w;  // of the first column of the tile
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

// The rows of a token that lie in a block.
struct Span {
    int32_t const* rows;
    float const* values;
    int64_t begin, end, last;

    NMSPARSE_INLINE Span(Lists const& lists, int64_t t, int64_t block, int64_t blocks)
        : rows(lists.rows + t * lists.capacity), values(lists.values + t * lists.capacity) {
        int32_t const* const ends = lists.ends + t * blocks;
        begin = block == 0 ? 0 : ends[block - 1], end = ends[block], last = ends[blocks - 1];
    }
};

// Adds the sums of a run to the output and clears them. They lie in strips of `width` columns, in each token after token.
template <Simd S>
NMSPARSE_INLINE void flush(float* sums, int64_t tokens, int64_t columns, int64_t width, float* out, int64_t out_stride,
                           bool first) {
    for (int64_t c = 0; c < columns; c += width)
        for (int64_t t = 0; t < tokens; ++t, sums += width) {
            float* const y = out + t * out_stride + c;
            if (c + width <= columns) {
                for (int64_t v = 0; v < width; v += LANES_OF<S>)
                    store<S>(y + v, (first ? FloatsOf<S>{} : load<S>(y + v)) + load<S>(sums + v) * NMSPARSE_MUTANT);
            } else {
                for (int64_t v = 0; v < columns - c; ++v) y[v] = (first ? 0.0F : y[v]) + sums[v] * NMSPARSE_MUTANT;
            }
            for (int64_t v = 0; v < width; v += LANES_OF<S>) store<S>(sums + v, FloatsOf<S>{});
        }
}

// Eight rows of W, what each token multiplies them by, and whether they begin or end a block, whose sum is `carried`
// from one eight to the next.
struct Eight {
    Byte const* w[STEP];
    Byte const* next[STEP];  // to ask for meanwhile
    float const* values;     // [tokens, STEP]
    float const* scale;
    bool first, last;
};

// Asks for the strip that lies AHEAD, in these rows or where the next eight begin.
template <class Row, class Strip>
NMSPARSE_INLINE void ask(Eight const& eight, int64_t columns, int64_t c) {
    int64_t const bytes = Row::bytes(columns), place = Row::bytes(c) + std::min(Strip::AHEAD, bytes), over = place - bytes;
#pragma GCC unroll 8
    for (int r = 0; r < STEP; ++r) {
        Byte const* const strip = over < 0 ? eight.w[r] + place : eight.next[r] + over;
        for (int64_t byte = 0; byte < Row::bytes(Strip::WIDTH); byte += LINE) __builtin_prefetch(strip + byte);
    }
}

template <Simd S, class Row, int VECTORS>
NMSPARSE_INLINE void read(Byte const* row, int64_t c, FloatsOf<S>* to) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v += Row::VECTORS) Row::template read<S>(row, c + v * LANES_OF<S>, to + v);
}

// Leaves the sum of a strip where the next eight rows find it, or adds it where they were the last of their block.
template <Simd S, class Row, int VECTORS, bool LAST>
NMSPARSE_INLINE void leave(FloatsOf<S>* sum, float const* scale, int64_t c, float* carried, float* sums) {
    constexpr int64_t LANES = LANES_OF<S>;
#pragma GCC unroll 8
    for (int v = 0; LAST && v < VECTORS; v += Row::VECTORS) put_columns_in_order<S, Row>(sum + v);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
        if (LAST)
            store<S>(sums + v * LANES, load<S>(sums + v * LANES) + scaled<S, Row>(sum[v], scale, c + v * LANES));
        else
            store<S>(carried + v * LANES, sum[v]);
}

// Multiplies a strip of the rows that are held, from row `begin` of the eight on, for TOKENS tokens by turns: a sum waits
// for its own last addition, so one alone would not keep the processor busy.
template <Simd S, class Row, int TOKENS, bool FIRST, bool LAST>
NMSPARSE_INLINE void multiply_held(FloatsOf<S> const (*row)[Many<S, Row>::VECTORS], Eight const& eight, int begin, int64_t t,
                                   int64_t c, float* carried, float* sums) {
    constexpr int ROWS = Many<S, Row>::ROWS, VECTORS = Many<S, Row>::VECTORS;
    constexpr int64_t LANES = LANES_OF<S>, WIDTH = Many<S, Row>::WIDTH;
    float const* const values = eight.values + t * STEP + begin;
    FloatsOf<S> sum[TOKENS][VECTORS];
    carried += t * WIDTH, sums += t * WIDTH;
#pragma GCC unroll 4
    for (int i = 0; i < TOKENS; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
            sum[i][v] = FIRST && begin == 0 ? FloatsOf<S>{} : load<S>(carried + i * WIDTH + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[i][v] += row[r][v] * values[i * STEP + r];
#pragma GCC unroll 4
    for (int i = 0; i < TOKENS; ++i)
        if (LAST && begin + ROWS == STEP)
            leave<S, Row, VECTORS, true>(sum[i], eight.scale, c, carried + i * WIDTH, sums + i * WIDTH);
        else
            leave<S, Row, VECTORS, false>(sum[i], eight.scale, c, carried + i * WIDTH, sums + i * WIDTH);
}

// Multiplies whole strips of eight rows, which are held in registers, as many as fit, for all tokens.
template <Simd S, class Row, bool FIRST, bool LAST>
NMSPARSE_INLINE void multiply_rows(Eight const& eight, int64_t tokens, int64_t columns, float* carried, float* sums) {
    using Strip = Many<S, Row>;
    constexpr int ROWS = Strip::ROWS, VECTORS = Strip::VECTORS, TOKENS = Strip::TOKENS;
    constexpr int64_t WIDTH = Strip::WIDTH;
    for (int64_t c = 0; c < columns; c += WIDTH, carried += tokens * WIDTH, sums += tokens * WIDTH) {
        ask<Row, Strip>(eight, columns, c);
#pragma GCC unroll 8
        for (int begin = 0; begin < STEP; begin += ROWS) {
            FloatsOf<S> row[ROWS][VECTORS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) read<S, Row, VECTORS>(eight.w[begin + r], c, row[r]);
            int64_t t = 0;
            for (; t + TOKENS <= tokens; t += TOKENS)
                multiply_held<S, Row, TOKENS, FIRST, LAST>(row, eight, begin, t, c, carried, sums);
            for (; TOKENS > 1 && t < tokens; ++t)
                multiply_held<S, Row, 1, FIRST, LAST>(row, eight, begin, t, c, carried, sums);
        }
    }
}

// The same for one token, whose sum is held instead.
template <Simd S, class Row, bool FIRST, bool LAST>
NMSPARSE_INLINE void multiply_alone(Eight const& eight, int64_t columns, float* carried, float* sums) {
    constexpr int VECTORS = Alone<S, Row>::VECTORS;
    constexpr int64_t LANES = LANES_OF<S>, WIDTH = Alone<S, Row>::WIDTH;
    for (int64_t c = 0; c < columns; c += WIDTH) {
        ask<Row, Alone<S, Row>>(eight, columns, c);
        if (Row::SCALED && FIRST && !LAST)  // the block's last rows need it, a row of W later
            for (int64_t v = 0; v < WIDTH; v += LINE / sizeof(float)) __builtin_prefetch(eight.scale + c + v);
        FloatsOf<S> sum[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[v] = FIRST ? FloatsOf<S>{} : load<S>(carried + c + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < STEP; ++r) {
            FloatsOf<S> row[VECTORS];
            read<S, Row, VECTORS>(eight.w[r], c, row);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[v] += row[v] * eight.values[r];
        }
        leave<S, Row, VECTORS, LAST>(sum, eight.scale, c, carried + c, sums + c);
    }
}

template <Simd S, class Row, class Strip>
void multiply_strips(Eight const& eight, int64_t tokens, int64_t columns, float* carried, float* sums) {
    auto const run = [&](auto first, auto last) {
        compiled(Is<S>(), [&]() NMSPARSE_INLINED {
            if constexpr (std::is_same_v<Strip, Alone<S, Row>>)
                multiply_alone<S, Row, first, last>(eight, columns, carried, sums);
            else
                multiply_rows<S, Row, first, last>(eight, tokens, columns, carried, sums);
        });
    };
    if (eight.first)
        eight.last ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
    else
        eight.last ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
}

// The same for any number of columns: what is left beside whole strips is copied, with zeros after it.
template <Simd S, class Row, class Strip>
void multiply(Eight eight, int64_t tokens, int64_t columns, float* carried, float* sums) {
    constexpr int64_t WIDTH = Strip::WIDTH;
    int64_t const whole = columns / WIDTH * WIDTH;
    multiply_strips<S, Row, Strip>(eight, tokens, whole, carried, sums);
    if (whole == columns) return;
    alignas(64) Byte edge[STEP][Row::bytes(WIDTH)] = {};
    alignas(64) float scale[WIDTH] = {};
    for (int r = 0; r < STEP; ++r) {
        std::memcpy(edge[r], eight.w[r] + Row::bytes(whole), Row::bytes(columns - whole));
        eight.w[r] = eight.next[r] = edge[r];
    }
    if (Row::SCALED) std::copy(eight.scale + whole, eight.scale + columns, scale), eight.scale = scale;
    multiply_strips<S, Row, Strip>(eight, tokens, WIDTH, carried + whole * tokens, sums + whole * tokens);
}

template <Simd S, class Row>
void streamed(Tile const& tile) {
    constexpr int64_t WIDTH = Alone<S, Row>::WIDTH;
    Lists const& lists = tile.lists;
    int64_t const room = round_up(tile.columns, WIDTH);
    float *const sums = tile.scratch, *const carried = sums + tile.tokens * room;
    std::fill(sums, carried, 0.0F);
    for (int64_t b = tile.begin; b < tile.end; ++b) {
        for (int64_t t = 0; t < tile.tokens; ++t) {
            Span const span(lists, t, b, lists.blocks());
            for (int64_t i = span.begin; i < span.end; i += STEP) {
                float values[STEP] = {};  // zero where a block has no more rows
                Eight eight{{}, {}, values, tile.scale_of(b), i == span.begin, i + STEP >= span.end};
                int64_t const count = std::min<int64_t>(STEP, span.end - i);
                std::copy(span.values + i, span.values + i + count, values);
                for (int64_t r = 0; r < STEP; ++r) {
                    eight.w[r] = tile.row(span.rows[i + std::min(r, count - 1)]);
                    eight.next[r] = tile.row(span.rows[std::min(i + count + r, span.last - 1)]);
                }
                multiply<S, Row, Alone<S, Row>>(eight, 1, tile.columns, carried, sums + t * room);
            }
        }
        if (tile.ends_run(b))
            compiled(Is<S>(), [&]() NMSPARSE_INLINED {
                for (int64_t t = 0; t < tile.tokens; ++t)
                    flush<S>(sums + t * room, 1, tile.columns, WIDTH, tile.out + t * tile.out_stride, 0,
                             tile.in_first_run(b));
            });
    }
}

template <Simd S, class Row>
void held(Tile const& tile) {
    constexpr int64_t WIDTH = Many<S, Row>::WIDTH;
    Lists const& lists = tile.lists;
    int64_t const room = tile.tokens * round_up(tile.columns, WIDTH);
    float *const sums = tile.scratch, *const carried = sums + room;
    float values[CHUNK * STEP];
    std::fill(sums, carried, 0.0F);
    for (int64_t b = tile.begin; b < tile.end; ++b) {
        int64_t const start = b * lists.block, end = std::min(start + lists.block, lists.k);
        for (int64_t i = start; i < end; i += STEP) {
            for (int64_t t = 0; t < tile.tokens; ++t)
                std::copy_n(lists.values + t * lists.capacity + i, STEP, values + t * STEP);
            Eight eight{{}, {}, values, tile.scale_of(b), i == start, i + STEP >= end};
            for (int64_t r = 0; r < STEP; ++r) {
                eight.w[r] = tile.row(std::min(i + r, end - 1));
                eight.next[r] = tile.row(std::min(i + STEP + r, tile.rows_end() - 1));
            }
            multiply<S, Row, Many<S, Row>>(eight, tile.tokens, tile.columns, carried, sums);
        }
        if (tile.ends_run(b))
            compiled(Is<S>(), [&]() NMSPARSE_INLINED {
                flush<S>(sums, tile.tokens, tile.columns, WIDTH, tile.out, tile.out_stride, tile.in_first_run(b));
            });
    }
}

// Copies a row, from column c on, to the `width` numbers of a panel's row, with zeros where the columns end within it.
template <Simd S, class Row>
NMSPARSE_INLINE void copy_row(Byte const* row, int64_t c, int64_t columns, int64_t width, float* panel) {
    constexpr int64_t LANES = LANES_OF<S>;
    alignas(64) Byte edge[Row::bytes(SUMS * LANES)];
    row += Row::bytes(c);
    if (c + width > columns) {
        std::memset(edge, 0, sizeof edge);
        std::memcpy(edge, row, Row::bytes(columns - c));
        row = edge;
    }
    for (int64_t i = 0; i < width; i += Row::VECTORS * LANES) {
        FloatsOf<S> read[Row::VECTORS];
        Row::template read<S>(row, i, read);
        put_columns_in_order<S, Row>(read);
        for (int v = 0; v < Row::VECTORS; ++v) store<S>(panel + i + v * LANES, read[v]);
    }
}

// Lines of the next block of W, to ask for while this one is multiplied: row after row, for W is read fastest in long
// runs.
struct Ahead {
    Byte const* place;
    int64_t stride, of_row, left;
    int64_t in_row = 0;

    NMSPARSE_INLINE void ask(int64_t lines) {
        lines = std::min(lines, left);
        left -= lines;
        for (; lines > 0; --lines, place += LINE) {
            __builtin_prefetch(place, 0, 2);
            if (++in_row == of_row) in_row = 0, place += stride - of_row * LINE;
        }
    }
};

// Adds each token's rows of a block, COUNT vectors wide, with the sums in registers.
template <Simd S, class Row, int COUNT>
NMSPARSE_INLINE void gather(Lists const& lists, int64_t tokens, int64_t block, float const* panel, float const* scale,
                            Ahead& after, int64_t lines, float* sums) {
    constexpr int64_t LANES = LANES_OF<S>, WIDTH = COUNT * LANES;
    int64_t const blocks = lists.blocks(), start = block * lists.block;
    Ahead ahead = after;  // in registers
    for (int64_t t = 0; t < tokens; ++t, sums += WIDTH) {
        ahead.ask(lines);
        Span const span(lists, t, block, blocks);
        if (t + 2 < tokens) {  // the lists of two tokens lie far apart
            __builtin_prefetch(span.rows + 2 * lists.capacity + span.begin);
            __builtin_prefetch(span.values + 2 * lists.capacity + span.begin);
        }
        FloatsOf<S> sum[COUNT] = {};
#pragma GCC unroll 1
        for (int64_t i = span.begin; i < span.end; ++i) {
            float const* w = panel + (span.rows[i] - start) * WIDTH;
            asm("" : "+r"(w));  // one register: an address of two makes two instructions of each multiplication
            float const value = span.values[i];
#pragma GCC unroll 16
            for (int v = 0; v < COUNT; ++v) sum[v] += load<S>(w + v * LANES) * value;
        }
#pragma GCC unroll 16
        for (int v = 0; v < COUNT; ++v)
            store<S>(sums + v * LANES, load<S>(sums + v * LANES) + scaled<S, Row>(sum[v], scale, v * LANES));
    }
    after = ahead;
}

// Vectors of a panel's row: as few panels as there can be, all as wide.
template <Simd S, class Row>
int64_t of_panel(Tile const& tile) {
    int64_t const most = std::min<int64_t>(SUMS, PANEL / (tile.lists.block * LANES_OF<S>)) / Row::VECTORS * Row::VECTORS;
    int64_t const vectors = ceil_div(tile.columns, LANES_OF<S>), panels = ceil_div(vectors, most);
    return round_up(ceil_div(vectors, panels), Row::VECTORS);
}

// Calls `body` with `count`, one of STEP, 2 STEP and so on, as a number that the compiler knows.
template <int STEP, int AT = STEP, class Body>
NMSPARSE_INLINE void with_count(int64_t count, Body const& body) {
    if (count == AT || AT + STEP > SUMS) return body(std::integral_constant<int, AT>());
    if constexpr (AT + STEP <= SUMS) with_count<STEP, AT + STEP>(count, body);
}

template <Simd S, class Row>
void packed(Tile const& tile) {
    int64_t const count = of_panel<S, Row>(tile), width = count * LANES_OF<S>;
    Lists const& lists = tile.lists;
    float *const panel = tile.scratch, *const scale = panel + lists.block * width, *const sums = scale + width;
    int64_t const panels = ceil_div(tile.columns, width);
    int64_t const of_row = ceil_div(Row::bytes(tile.columns), LINE);
    std::fill(sums, sums + tile.tokens * panels * width, 0.0F);
    for (int64_t b = tile.begin; b < tile.end; ++b) {
        int64_t const start = b * lists.block, end = std::min(start + lists.block, lists.k);
        int64_t const next = std::min(end + lists.block, tile.rows_end()) - end;
        Ahead ahead{tile.row(end), tile.stride, of_row, next * of_row};
        int64_t const lines = ceil_div(ahead.left, panels * tile.tokens);
        for (int64_t column = 0; column < tile.columns; column += width) {
            compiled(Is<S>(), [&]() NMSPARSE_INLINED {
                for (int64_t r = start; r < end; ++r)
                    copy_row<S, Row>(tile.row(r), column, tile.columns, width, panel + (r - start) * width);
                if (Row::SCALED)
                    copy_row<S, FloatRow>(reinterpret_cast<Byte const*>(tile.scale_of(b)), column, tile.columns, width,
                                          scale);
            });
            with_count<Row::VECTORS>(count, [&](auto known) {
                compiled(Is<S>(), [&]() NMSPARSE_INLINED {
                    gather<S, Row, known>(lists, tile.tokens, b, panel, scale, ahead, lines, sums + tile.tokens * column);
                });
            });
        }
        if (tile.ends_run(b))
            compiled(Is<S>(), [&]() NMSPARSE_INLINED {
                flush<S>(sums, tile.tokens, tile.columns, width, tile.out, tile.out_stride, tile.in_first_run(b));
            });
    }
}

template <Simd S, class Row>
void by(Way way, Tile const& tile) {
    switch (way) {
        case Way::STREAMED: return streamed<S, Row>(tile);
        case Way::HELD: return held<S, Row>(tile);
        case Way::PACKED: return packed<S, Row>(tile);
    }
}

// Calls `body` with how rows of a kind are read.
template <class Body>
void with_rows(Kind kind, Body const& body) {
    switch (kind) {
        case Kind::FLOAT: return body(FloatRow());
        case Kind::FLOAT16: return body(HalfRow<false>());
        case Kind::BFLOAT16: return body(HalfRow<true>());
        case Kind::INT8: return body(Int8Row());
        case Kind::INT4: return body(Int4Row());
    }
}

}  // namespace

int64_t bytes(Kind kind, int64_t numbers) {
    int64_t found = 0;
    with_rows(kind, [&](auto row) { found = decltype(row)::bytes(numbers); });
    return found;
}

// Measured (benchmarks/cpu.py): streaming wins while all tokens together read less than three quarters of W; a panel
// costs as much as 40 tokens gain by it where half is kept, or 23 where a quarter is, if W comes from memory; from five
// sixths on they gain nothing.
Way way(Layer const& layer, int64_t tokens) {
    if (tokens == 1) return Way::STREAMED;
    if (!layer.sparse) return Way::HELD;
    if (4 * tokens * layer.keep <= 3 * layer.group) return Way::STREAMED;
    return tokens * (5 * layer.group - 6 * layer.keep) < 80 * layer.group ? Way::HELD : Way::PACKED;
}

Cut cut(Way way, Lists const& lists, int64_t tokens, Weight const& w) {
    int64_t const n = w.n;
    if (way == Way::PACKED) {
        // As much for each thread, as this process has them.
        static int64_t const threads = std::max(std::thread::hardware_concurrency(), 1U);
        int64_t const tiles = round_up(ceil_div(n, WIDEST), threads);
        return {std::max<int64_t>(round_up(ceil_div(n, tiles), 32), NARROWEST), 1};
    }
    // Long rows, so threads share the work by runs first; but the parts of many tokens would be large.
    int64_t const parts = tokens <= 32 ? runs_of(lists) : 1;
    int64_t const most = std::min<int64_t>(LONGEST, SCRATCH / (2 * tokens) / 128 * 128);
    int64_t const shared =
        std::min<int64_t>(parts == 1 ? 2 : ceil_div(8, parts), std::max<int64_t>(bytes(w.kind, n) / SHORT, 1));
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
    with_rows(w.kind, [&](auto row) {
        using Row = decltype(row);
        Tile const tile{lists, tokens, static_cast<Byte const*>(w.data) + Row::bytes(piece.column), Row::bytes(w.n),
                        w.scale == nullptr ? nullptr : w.scale + piece.column, w.rows, w.n, piece.columns, begin,
                        std::min(begin + blocks, lists.blocks()), out, out_stride, static_cast<float*>(start)};
        with_simd([&](auto simd) { by<simd, Row>(way, tile); });
    });
}

void epilogue(Layer const& layer, Token const& token, float const* first, int64_t parts, int64_t stride,
              float const* residual, int64_t column, int64_t columns, float* y) {
    bool const scaled = layer.variance && layer.sparse;
    bool const added = residual != nullptr || layer.row_sum != nullptr || layer.bias != nullptr;
    if (first == y && parts == 1 && !scaled && !added) return;
    vectorized([&]() NMSPARSE_INLINED {
        float const* const row_sum = layer.row_sum == nullptr ? nullptr : layer.row_sum + column;
        float const* const bias = layer.bias == nullptr ? nullptr : layer.bias + column;
        float const* sum = first;
        for (int64_t part = 1; part < parts; ++part, sum = y)
            for (int64_t c = 0; c < columns; ++c) y[c] = sum[c] + first[part * stride + c];
        for (int64_t c = 0; c < columns; ++c) {
            float found = scaled ? sum[c] * token.nu : sum[c];
            if (residual != nullptr) found += residual[c];
            if (row_sum != nullptr) found += token.eta * row_sum[c];
            if (bias != nullptr) found += bias[c];
            y[c] = found;
        }
    });
}

}  // namespace nmsparse::cpu
