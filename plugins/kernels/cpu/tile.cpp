// The product of tokens with W, in one of three ways.
//
// STREAMED, for very few tokens: each reads the rows that it keeps from where they are, eight at once.
// HELD, for few: every row is read once, eight at once, and held in registers while it is multiplied for all tokens, by
// zero where a token has dropped it. Reading W is what takes the time, and long runs of whole rows are read fastest.
// PACKED, for many: a block of rows is copied to a panel in L1, where each token multiplies its own, with the sums in
// registers, so that dropped rows cost nothing.
//
// A sum has three levels (the rows of a block, a run of blocks, all runs), so that its error is below that of a GEMM's
// long chains. The scale of integers is applied to the sum of a block, whose rows share it. What is added to what
// depends on the kept numbers alone: not on the way, the tile, the other tokens or the threads. (A row times zero
// changes no sum, unless W holds Inf or NaN, which HELD shows as a dense product does.)
#include <algorithm>
#include <cstring>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tile.cpp"
#include <hwy/foreach_target.h>

#include "rows-inl.h"
#include "tile.h"

#ifndef NMSPARSE_MUTANT
#define NMSPARSE_MUTANT 1.0F  // the tests build a library that is wrong on purpose, to see that they notice
#endif

HWY_BEFORE_NAMESPACE();
namespace nmsparse::cpu::HWY_NAMESPACE {

namespace {

constexpr int SUMS = 12;             // vectors of sums for a token of a panel that fit into the registers
constexpr int64_t PANEL = 9 * 1024;  // numbers of a panel, which must stay in L1

// What fits into the registers: so many rows of so many vectors, beside a sum of each vector for so many tokens. A
// token alone has all registers for its sums, and reads wider strips.
constexpr int ROWS_HELD = LANES / 2, VECTORS_HELD = LANES == 4 ? 4 : 2, TOKENS_HELD = LANES / 4;
template <class Row>
struct Many {
    static constexpr int VECTORS = std::max(Row::VECTORS, VECTORS_HELD);
    static constexpr int ROWS = std::max(ROWS_HELD * VECTORS_HELD / VECTORS, 1);
    static constexpr int TOKENS = std::max(TOKENS_HELD * VECTORS_HELD / VECTORS, 1);
    static constexpr int64_t WIDTH = VECTORS * LANES;  // of a strip, in columns
    static constexpr int64_t AHEAD = 512;              // bytes of a row that are asked for before they are read
};
template <class Row>
struct Alone {
    static constexpr int VECTORS = std::max(Row::VECTORS, 4);
    static constexpr int64_t WIDTH = VECTORS * LANES, AHEAD = 1024;
};

// The rows of a token that lie in a block.
struct Span {
    int32_t const* rows;
    float const* values;
    int64_t begin, end, last;

    HWY_INLINE Span(Lists const& lists, int64_t t, int64_t block, int64_t blocks)
        : rows(lists.rows + t * lists.capacity), values(lists.values + t * lists.capacity) {
        int32_t const* const ends = lists.ends + t * blocks;
        begin = block == 0 ? 0 : ends[block - 1], end = ends[block], last = ends[blocks - 1];
    }
};

// Adds the sums of a run to the output and clears them. They lie in strips of `width` columns, in each token after token.
HWY_NOINLINE void flush(float* sums, int64_t tokens, int64_t columns, int64_t width, float* out, int64_t out_stride,
                        bool first) {
    for (int64_t c = 0; c < columns; c += width)
        for (int64_t t = 0; t < tokens; ++t, sums += width) {
            float* const y = out + t * out_stride + c;
            if (c + width <= columns) {
                for (int64_t v = 0; v < width; v += LANES)
                    store(y + v, multiply_add(load(sums + v), NMSPARSE_MUTANT, first ? hn::Zero(FLOATS) : load(y + v)));
            } else {
                for (int64_t v = 0; v < columns - c; ++v) y[v] = (first ? 0.0F : y[v]) + sums[v] * NMSPARSE_MUTANT;
            }
            for (int64_t v = 0; v < width; v += LANES) store(sums + v, hn::Zero(FLOATS));
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
HWY_INLINE void ask(Eight const& eight, int64_t columns, int64_t c) {
    int64_t const bytes = bytes_of<Row>(columns), place = bytes_of<Row>(c) + std::min(Strip::AHEAD, bytes);
    int64_t const over = place - bytes;
#pragma GCC unroll 8
    for (int r = 0; r < STEP; ++r) {
        Byte const* const strip = over < 0 ? eight.w[r] + place : eight.next[r] + over;
        for (int64_t byte = 0; byte < bytes_of<Row>(Strip::WIDTH); byte += LINE) __builtin_prefetch(strip + byte);
    }
}

template <class Row, int VECTORS>
HWY_INLINE void read(Byte const* row, int64_t c, Floats* to) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v += Row::VECTORS) Row::read(row, c + v * LANES, to + v);
}

// Leaves the sum of a strip where the next eight rows find it, or adds it where they were the last of their block.
template <class Row, int VECTORS, bool LAST>
HWY_INLINE void leave(Floats* sum, float const* scale, int64_t c, float* carried, float* sums) {
#pragma GCC unroll 8
    for (int v = 0; LAST && v < VECTORS; v += Row::VECTORS) put_columns_in_order<Row>(sum + v);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
        if (LAST)
            store(sums + v * LANES, hn::Add(load(sums + v * LANES), scaled<Row>(sum[v], scale, c + v * LANES)));
        else
            store(carried + v * LANES, sum[v]);
}

// Multiplies a strip of the rows that are held, from row `begin` of the eight on, for TOKENS tokens by turns: a sum waits
// for its own last addition, so one alone would not keep the processor busy.
template <class Row, int TOKENS, bool FIRST, bool LAST>
HWY_INLINE void multiply_held(Floats const (*row)[Many<Row>::VECTORS], Eight const& eight, int begin, int64_t t,
                              int64_t c, float* carried, float* sums) {
    constexpr int ROWS = Many<Row>::ROWS, VECTORS = Many<Row>::VECTORS;
    constexpr int64_t WIDTH = Many<Row>::WIDTH;
    float const* const values = eight.values + t * STEP + begin;
    Floats sum[TOKENS][VECTORS];
    carried += t * WIDTH, sums += t * WIDTH;
#pragma GCC unroll 4
    for (int i = 0; i < TOKENS; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v)
            sum[i][v] = FIRST && begin == 0 ? hn::Zero(FLOATS) : load(carried + i * WIDTH + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < TOKENS; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = multiply_add(row[r][v], values[i * STEP + r], sum[i][v]);
#pragma GCC unroll 4
    for (int i = 0; i < TOKENS; ++i)
        if (LAST && begin + ROWS == STEP)
            leave<Row, VECTORS, true>(sum[i], eight.scale, c, carried + i * WIDTH, sums + i * WIDTH);
        else
            leave<Row, VECTORS, false>(sum[i], eight.scale, c, carried + i * WIDTH, sums + i * WIDTH);
}

// Multiplies whole strips of eight rows, which are held in registers, as many as fit, for all tokens.
template <class Row, bool FIRST, bool LAST>
HWY_NOINLINE void multiply_rows(Eight const& eight, int64_t tokens, int64_t columns, float* carried, float* sums) {
    using Strip = Many<Row>;
    constexpr int ROWS = Strip::ROWS, VECTORS = Strip::VECTORS, TOKENS = Strip::TOKENS;
    constexpr int64_t WIDTH = Strip::WIDTH;
    for (int64_t c = 0; c < columns; c += WIDTH, carried += tokens * WIDTH, sums += tokens * WIDTH) {
        ask<Row, Strip>(eight, columns, c);
#pragma GCC unroll 8
        for (int begin = 0; begin < STEP; begin += ROWS) {
            Floats row[ROWS][VECTORS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) read<Row, VECTORS>(eight.w[begin + r], c, row[r]);
            int64_t t = 0;
            for (; t + TOKENS <= tokens; t += TOKENS)
                multiply_held<Row, TOKENS, FIRST, LAST>(row, eight, begin, t, c, carried, sums);
            for (; TOKENS > 1 && t < tokens; ++t)
                multiply_held<Row, 1, FIRST, LAST>(row, eight, begin, t, c, carried, sums);
        }
    }
}

// The same for one token, whose sum is held instead.
template <class Row, bool FIRST, bool LAST>
HWY_NOINLINE void multiply_alone(Eight const& eight, int64_t columns, float* carried, float* sums) {
    constexpr int VECTORS = Alone<Row>::VECTORS;
    constexpr int64_t WIDTH = Alone<Row>::WIDTH;
    for (int64_t c = 0; c < columns; c += WIDTH) {
        ask<Row, Alone<Row>>(eight, columns, c);
        if (Row::SCALED && FIRST && !LAST)  // the block's last rows need it, a row of W later
            for (int64_t v = 0; v < WIDTH; v += LINE / sizeof(float)) __builtin_prefetch(eight.scale + c + v);
        Floats sum[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sum[v] = FIRST ? hn::Zero(FLOATS) : load(carried + c + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < STEP; ++r) {
            Floats row[VECTORS];
            read<Row, VECTORS>(eight.w[r], c, row);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sum[v] = multiply_add(row[v], eight.values[r], sum[v]);
        }
        leave<Row, VECTORS, LAST>(sum, eight.scale, c, carried + c, sums + c);
    }
}

template <class Row, class Strip>
void multiply_strips(Eight const& eight, int64_t tokens, int64_t columns, float* carried, float* sums) {
    auto const run = [&](auto first, auto last) {
        if constexpr (std::is_same_v<Strip, Alone<Row>>)
            multiply_alone<Row, first, last>(eight, columns, carried, sums);
        else
            multiply_rows<Row, first, last>(eight, tokens, columns, carried, sums);
    };
    if (eight.first)
        eight.last ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
    else
        eight.last ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
}

// The same for any number of columns: what is left beside whole strips is copied, with zeros after it.
template <class Row, class Strip>
void multiply(Eight eight, int64_t tokens, int64_t columns, float* carried, float* sums) {
    constexpr int64_t WIDTH = Strip::WIDTH;
    int64_t const whole = columns / WIDTH * WIDTH;
    multiply_strips<Row, Strip>(eight, tokens, whole, carried, sums);
    if (whole == columns) return;
    alignas(64) Byte edge[STEP][bytes_of<Row>(WIDTH)] = {};
    alignas(64) float scale[WIDTH] = {};
    for (int r = 0; r < STEP; ++r) {
        std::memcpy(edge[r], eight.w[r] + bytes_of<Row>(whole), bytes_of<Row>(columns - whole));
        eight.w[r] = eight.next[r] = edge[r];
    }
    if (Row::SCALED) std::copy(eight.scale + whole, eight.scale + columns, scale), eight.scale = scale;
    multiply_strips<Row, Strip>(eight, tokens, WIDTH, carried + whole * tokens, sums + whole * tokens);
}

template <class Row>
void streamed(Tile const& tile) {
    constexpr int64_t WIDTH = Alone<Row>::WIDTH;
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
                multiply<Row, Alone<Row>>(eight, 1, tile.columns, carried, sums + t * room);
            }
        }
        if (tile.ends_run(b))
            for (int64_t t = 0; t < tile.tokens; ++t)
                flush(sums + t * room, 1, tile.columns, WIDTH, tile.out + t * tile.out_stride, 0, tile.in_first_run(b));
    }
}

template <class Row>
void held(Tile const& tile) {
    constexpr int64_t WIDTH = Many<Row>::WIDTH;
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
            multiply<Row, Many<Row>>(eight, tile.tokens, tile.columns, carried, sums);
        }
        if (tile.ends_run(b))
            flush(sums, tile.tokens, tile.columns, WIDTH, tile.out, tile.out_stride, tile.in_first_run(b));
    }
}

// Copies rows, from column c on, to a panel of `width` numbers a row, with zeros where the columns end within it.
template <class Row>
HWY_NOINLINE void copy_rows(Byte const* row, int64_t stride, int64_t rows, int64_t c, int64_t columns, int64_t width,
                            float* panel) {
    alignas(64) Byte edge[bytes_of<Row>(SUMS * LANES)];
    bool const ends = c + width > columns;
    if (ends) std::memset(edge, 0, sizeof edge);
    for (row += bytes_of<Row>(c); rows > 0; --rows, row += stride, panel += width) {
        Byte const* from = row;
        if (ends) from = static_cast<Byte const*>(std::memcpy(edge, row, bytes_of<Row>(columns - c)));
        for (int64_t i = 0; i < width; i += Row::VECTORS * LANES) {
            Floats read[Row::VECTORS];
            Row::read(from, i, read);
            put_columns_in_order<Row>(read);
#pragma GCC unroll 8
            for (int v = 0; v < Row::VECTORS; ++v) store(panel + i + v * LANES, read[v]);
        }
    }
}

// Lines of the next block of W, to ask for while this one is multiplied: row after row, for W is read fastest in long
// runs.
struct Ahead {
    Byte const* place;
    int64_t stride, of_row, left;
    int64_t in_row = 0;

    HWY_INLINE void ask(int64_t lines) {
        lines = std::min(lines, left);
        left -= lines;
        for (; lines > 0; --lines, place += LINE) {
            __builtin_prefetch(place, 0, 2);
            if (++in_row == of_row) in_row = 0, place += stride - of_row * LINE;
        }
    }
};

// Adds each token's rows of a block, COUNT vectors wide, with the sums in registers.
template <class Row, int COUNT>
HWY_NOINLINE void gather(Lists const& lists, int64_t tokens, int64_t block, float const* panel, float const* scale,
                         Ahead& after, int64_t lines, float* sums) {
    constexpr int64_t WIDTH = COUNT * LANES;
    int64_t const blocks = lists.blocks(), start = block * lists.block;
    Ahead ahead = after;  // in registers
    for (int64_t t = 0; t < tokens; ++t, sums += WIDTH) {
        ahead.ask(lines);
        Span const span(lists, t, block, blocks);
        if (t + 2 < tokens) {  // the lists of two tokens lie far apart
            __builtin_prefetch(span.rows + 2 * lists.capacity + span.begin);
            __builtin_prefetch(span.values + 2 * lists.capacity + span.begin);
        }
        Floats sum[COUNT];
#pragma GCC unroll 16
        for (int v = 0; v < COUNT; ++v) sum[v] = hn::Zero(FLOATS);
#pragma GCC unroll 1
        for (int64_t i = span.begin; i < span.end; ++i) {
            float const* w = panel + (span.rows[i] - start) * WIDTH;
            asm("" : "+r"(w));  // one register: an address of two makes two instructions of each multiplication
            float const value = span.values[i];
#pragma GCC unroll 16
            for (int v = 0; v < COUNT; ++v) sum[v] = multiply_add(load(w + v * LANES), value, sum[v]);
        }
#pragma GCC unroll 16
        for (int v = 0; v < COUNT; ++v)
            store(sums + v * LANES, hn::Add(load(sums + v * LANES), scaled<Row>(sum[v], scale, v * LANES)));
    }
    after = ahead;
}

// Vectors of a panel's row: as few panels as there can be, all as wide.
template <class Row>
int64_t of_panel(Tile const& tile) {
    int64_t const most = std::min<int64_t>(SUMS, PANEL / (tile.lists.block * LANES)) / Row::VECTORS * Row::VECTORS;
    int64_t const vectors = ceil_div(tile.columns, LANES), panels = ceil_div(vectors, most);
    return round_up(ceil_div(vectors, panels), Row::VECTORS);
}

// Calls `body` with `count`, one of STEP, 2 STEP and so on, as a number that the compiler knows.
template <int STEP, int AT = STEP, class Body>
HWY_INLINE void with_count(int64_t count, Body const& body) {
    if (count == AT || AT + STEP > SUMS) return body(std::integral_constant<int, AT>());
    if constexpr (AT + STEP <= SUMS) with_count<STEP, AT + STEP>(count, body);
}

template <class Row>
void packed(Tile const& tile) {
    int64_t const count = of_panel<Row>(tile), width = count * LANES;
    Lists const& lists = tile.lists;
    float *const panel = tile.scratch, *const scale = panel + lists.block * width, *const sums = scale + width;
    int64_t const panels = ceil_div(tile.columns, width);
    int64_t const of_row = ceil_div(bytes_of<Row>(tile.columns), LINE);
    std::fill(sums, sums + tile.tokens * panels * width, 0.0F);
    for (int64_t b = tile.begin; b < tile.end; ++b) {
        int64_t const start = b * lists.block, end = std::min(start + lists.block, lists.k);
        int64_t const next = std::min(end + lists.block, tile.rows_end()) - end;
        Ahead ahead{tile.row(end), tile.stride, of_row, next * of_row};
        int64_t const lines = ceil_div(ahead.left, panels * tile.tokens);
        for (int64_t column = 0; column < tile.columns; column += width) {
            copy_rows<Row>(tile.row(start), tile.stride, end - start, column, tile.columns, width, panel);
            if (Row::SCALED)
                copy_rows<FloatRow>(reinterpret_cast<Byte const*>(tile.scale_of(b)), 0, 1, column, tile.columns, width,
                                    scale);
            with_count<Row::VECTORS>(count, [&](auto known) {
                gather<Row, known>(lists, tile.tokens, b, panel, scale, ahead, lines, sums + tile.tokens * column);
            });
        }
        if (tile.ends_run(b))
            flush(sums, tile.tokens, tile.columns, width, tile.out, tile.out_stride, tile.in_first_run(b));
    }
}

template <class Row>
void by(Way way, Tile const& tile) {
    switch (way) {
        case Way::STREAMED: return streamed<Row>(tile);
        case Way::HELD: return held<Row>(tile);
        case Way::PACKED: return packed<Row>(tile);
    }
}

}  // namespace

void tile_by_kind(Way way, Kind kind, Tile const& tile) {
    switch (kind) {
        case Kind::FLOAT: return by<FloatRow>(way, tile);
        case Kind::FLOAT16: return by<HalfRow<false>>(way, tile);
        case Kind::BFLOAT16: return by<HalfRow<true>>(way, tile);
        case Kind::INT8: return by<Int8Row>(way, tile);
        case Kind::INT4: return by<Int4Row>(way, tile);
    }
}

}  // namespace nmsparse::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nmsparse::cpu {

HWY_EXPORT(tile_by_kind);

void multiply_tile(Way way, Kind kind, Tile const& tile) { HWY_DYNAMIC_DISPATCH(tile_by_kind)(way, kind, tile); }

}  // namespace nmsparse::cpu
#endif
