// y = nu * (zs W) + eta * row_sum + bias for a few tokens, reading only the rows of W[K, N] that a token keeps.
//
// Gemv: a block has 256 columns of one token and a part of its list; a warp takes every eighth row of that part, a
// lane 8 columns, 16 bytes a row. GemvSum adds the parts in their order, so that the result is the same every time.
#pragma once

#include "kernel.h"

namespace nmsparse {

template <class T>
struct Gemv {
    static constexpr int THREADS = 256, PHASES = 2, LANES = 32, WARPS = THREADS / LANES, COLUMNS = 8 * LANES, FLIGHT = 4;

    struct Args {
        int32_t const* rows;  // [tokens, length]
        float const* values;  // [tokens, length]
        T const* w;           // [k, n]
        float* partial;       // [tokens, splits, n]
        int tokens, length, n, splits;
    };

    struct Shared {
        float sums[WARPS][COLUMNS];
    };

    static int blocks_x(Args const& args) { return (args.n + COLUMNS - 1) / COLUMNS * args.splits; }
    static int blocks_y(Args const& args) { return args.tokens; }

    template <int PHASE>
    NMSPARSE_DEVICE static void phase(Args const& args, Shared& shared, Place place) {
        int const split = place.block_x % args.splits, first = place.block_x / args.splits * COLUMNS;
        if constexpr (PHASE == 0) {
            int const warp = place.thread / LANES, lane = place.thread % LANES;
            float sums[8] = {};
            if (first + 8 * lane < args.n) add_rows(args, place.block_y, split, warp, first + 8 * lane, sums);
            for (int i = 0; i < 8; ++i) shared.sums[warp][8 * lane + i] = sums[i];
        } else {
            int const column = first + place.thread;
            if (column >= args.n) return;
            float sum = 0;
            for (int warp = 0; warp < WARPS; ++warp) sum += shared.sums[warp][place.thread];
            args.partial[(int64_t(place.block_y) * args.splits + split) * args.n + column] = sum;
        }
    }

    NMSPARSE_DEVICE static void add_rows(Args const& args, int token, int split, int warp, int column, float (&sums)[8]) {
        int const part = (args.length + args.splits - 1) / args.splits;
        int const end = part * (split + 1) < args.length ? part * (split + 1) : args.length;
        int32_t const* rows = args.rows + int64_t(token) * args.length;
        float const* values = args.values + int64_t(token) * args.length;
        // FLIGHT rows are asked for before the first is used.
        for (int at = part * split + warp; at < end; at += WARPS * FLIGHT) {
            Eight<T> weights[FLIGHT];
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                int const from = at + i * WARPS < end ? at + i * WARPS : at;
                weights[i] = *reinterpret_cast<Eight<T> const*>(args.w + int64_t(rows[from]) * args.n + column);
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                if (at + i * WARPS >= end) break;
                float const value = values[at + i * WARPS];
                for (int j = 0; j < 8; ++j) sums[j] += value * widen(weights[i].at[j]);
            }
        }
    }
};

template <class T>
struct GemvSum {
    static constexpr int THREADS = 256, PHASES = 1;

    struct Args {
        float const* partial;         // [tokens, splits, n]
        float const *nu, *eta;        // [tokens] or null
        float const *row_sum, *bias;  // [n] or null
        T* y;                         // [tokens, n]
        int tokens, n, splits;
    };

    struct Shared {};

    static int blocks_x(Args const& args) { return (args.n + THREADS - 1) / THREADS; }
    static int blocks_y(Args const& args) { return args.tokens; }

    template <int PHASE>
    NMSPARSE_DEVICE static void phase(Args const& args, Shared&, Place place) {
        int const column = place.block_x * THREADS + place.thread, token = place.block_y;
        if (column >= args.n) return;
        float sum = 0;
        for (int split = 0; split < args.splits; ++split)
            sum += args.partial[(int64_t(token) * args.splits + split) * args.n + column];
        if (args.nu != nullptr) sum *= args.nu[token];
        if (args.eta != nullptr && args.row_sum != nullptr) sum += args.eta[token] * args.row_sum[column];
        if (args.bias != nullptr) sum += args.bias[column];
        narrow(sum, args.y[int64_t(token) * args.n + column]);
    }
};

}  // namespace nmsparse
