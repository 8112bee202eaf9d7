// y = nu * (zs W) + eta * row_sum + bias for a few tokens, reading only the rows of W[K, N] that a token keeps.
//
// Gemv: a block has 256 columns of one token and a part of its groups. It selects the channels of its part itself: a
// kernel of its own for that took a third of the time. Then a warp takes every eighth row
// of the list, a lane 8 columns, 16 bytes a row. GemvSum adds the parts in their order, so that the result is the same
// every time.
#pragma once

#include "rank.h"

namespace nmsparse {

// Adds COUNT moments that lie STRIDE apart into the first, in their order, and returns it.
template <int COUNT, int STRIDE>
NMSPARSE_DEVICE Moments const& sum_of(Moments* first) {
    for (int i = 1; i < COUNT; ++i) first->add(first[i * STRIDE]);
    return *first;
}

template <class T>
struct Gemv {
    static constexpr int THREADS = 256, PHASES = 6, LANES = 32, WARPS = THREADS / LANES, COLUMNS = 8 * LANES, FLIGHT = 8;
    static constexpr int PLACES = 1024, PART = 256, PARTS = 16;  // places: of the largest part, which is one group then

    struct Args {
        T const* x;                  // [tokens, k]
        T const* w;                  // [k, n]
        float const* channel_scale;  // [k] or null
        float const* shift;          // [k] or null
        float const* eta;            // [tokens] or null
        int32_t const* permutation;  // [k] or null: place -> channel; the rows of W are in the order of the places
        float* partial;              // [tokens, splits, n]
        Moments* z;                  // [tokens, splits] or null
        Moments* kept;               // likewise
        int tokens, k, n, keep, group;
    };

    struct Shared {
        float z[PLACES], scores[PLACES], values[PLACES];
        int32_t rows[PLACES];
        bool keep[PLACES];
        Moments moments[2][THREADS];  // of z and of what is kept
        float sums[WARPS][COLUMNS];
    };

    // Whole groups.
    NMSPARSE_DEVICE static int part(int group) { return group < PART ? PART / group * group : group; }
    NMSPARSE_DEVICE static int splits(int k, int group) { return (k + part(group) - 1) / part(group); }
    static int blocks_x(Args const& args) { return (args.n + COLUMNS - 1) / COLUMNS * splits(args.k, args.group); }
    static int blocks_y(Args const& args) { return args.tokens; }

    template <int PHASE>
    NMSPARSE_DEVICE static void phase(Args const& args, Shared& shared, Place place) {
        int const all = splits(args.k, args.group), split = place.block_x % all, token = place.block_y;
        int const first = split * part(args.group), column = place.block_x / all * COLUMNS;
        int const count = args.k - first < part(args.group) ? args.k - first : part(args.group);
        if constexpr (PHASE == 0) {
            for (int i = place.thread; i < count; i += THREADS) load(args, shared, token, first, i);
        } else if constexpr (PHASE == 1) {
            for (int i = place.thread; i < count; i += THREADS)
                shared.keep[i] = is_kept_of(shared.scores, i, args.group, args.keep);
        } else if constexpr (PHASE == 2) {
            for (int i = place.thread; i < count; i += THREADS) list(args, shared, first, i);
            if (args.z != nullptr && column == 0)
                moments<THREADS>(shared, place.thread, count, shared.moments[0][place.thread],
                                 shared.moments[1][place.thread]);
        } else if constexpr (PHASE == 3) {
            if (args.z != nullptr && column == 0 && place.thread < 2 * PARTS)
                sum_of<THREADS / PARTS, 1>(shared.moments[place.thread / PARTS] + place.thread % PARTS * (THREADS / PARTS));
        } else if constexpr (PHASE == 4) {
            int const warp = place.thread / LANES, lane = place.thread % LANES;
            float sums[8] = {};
            if (column + 8 * lane < args.n)
                add_rows(args, shared, warp, count / args.group * args.keep, column + 8 * lane, sums);
#pragma unroll
            for (int i = 0; i < 8; ++i) shared.sums[warp][8 * lane + i] = sums[i];
        } else {
            if (args.z != nullptr && column == 0 && place.thread < 2)
                (place.thread == 0 ? args.z : args.kept)[int64_t(token) * all + split] =
                    sum_of<PARTS, THREADS / PARTS>(shared.moments[place.thread]);
            if (column + place.thread >= args.n) return;
            float sum = 0;
            for (int warp = 0; warp < WARPS; ++warp) sum += shared.sums[warp][place.thread];
            args.partial[(int64_t(token) * all + split) * args.n + column + place.thread] = sum;
        }
    }

    NMSPARSE_DEVICE static void list(Args const& args, Shared& shared, int first, int i) {
        if (!shared.keep[i]) return;
        int const begin = i / args.group * args.group;
        int at = i / args.group * args.keep;
        for (int j = begin; j < i; ++j) at += shared.keep[j];
        T value;
        narrow(shared.z[i], value);
        shared.rows[at] = first + i;
        shared.values[at] = widen(value);
    }

    NMSPARSE_DEVICE static void add_rows(Args const& args, Shared const& shared, int warp, int length, int column,
                                         float (&sums)[8]) {
        // FLIGHT rows are asked for before the first is used.
        for (int at = warp; at < length; at += WARPS * FLIGHT) {
            Eight<T> weights[FLIGHT];
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                int const from = at + i * WARPS < length ? at + i * WARPS : at;
                weights[i] = *reinterpret_cast<Eight<T> const*>(args.w + int64_t(shared.rows[from]) * args.n + column);
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; ++i) {
                if (at + i * WARPS >= length) break;
                float const value = shared.values[at + i * WARPS];
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[j] += value * widen(weights[i].at[j]);
            }
        }
    }
};

// A block has some columns of one token: 32 where there are many parts, of which a warp then sums every eighth.
template <class T>
struct GemvSum {
    static constexpr int THREADS = 256, PHASES = 3, MANY = 8, PARTS = 16;

    struct Args {
        float const* partial;         // [tokens, splits, n]
        Moments const *z, *kept;      // [tokens, parts] or null
        float const* eta;             // [tokens] or null
        float const *row_sum, *bias;  // [n] or null
        T* y;                         // [tokens, n]
        int tokens, n, splits, parts;
    };

    struct Shared {
        float sums[THREADS];
        Moments moments[2][PARTS];
    };

    NMSPARSE_DEVICE static int columns(Args const& args) { return args.splits < MANY ? THREADS : THREADS / MANY; }
    static int blocks_x(Args const& args) { return (args.n + columns(args) - 1) / columns(args); }
    static int blocks_y(Args const& args) { return args.tokens; }

    template <int PHASE>
    NMSPARSE_DEVICE static void phase(Args const& args, Shared& shared, Place place) {
        int const own = columns(args), token = place.block_y, column = place.block_x * own + place.thread % own;
        if constexpr (PHASE == 0) {
            if (args.z != nullptr && place.thread < 2 * PARTS) moments(args, shared, token, place.thread);
            float sum = 0;
            if (column < args.n)
#pragma unroll 8
                for (int split = place.thread / own; split < args.splits; split += THREADS / own)
                    sum += args.partial[(int64_t(token) * args.splits + split) * args.n + column];
            shared.sums[place.thread] = sum;
        } else if constexpr (PHASE == 1) {
            if (args.z != nullptr && place.thread < 2) sum_of<PARTS, 1>(shared.moments[place.thread]);
        } else {
            if (place.thread >= own || column >= args.n) return;
            float sum = 0;
            for (int i = place.thread; i < THREADS; i += own) sum += shared.sums[i];
            if (args.z != nullptr) sum *= token_scale(shared.moments[0][0], shared.moments[1][0]);
            if (args.eta != nullptr && args.row_sum != nullptr) sum += args.eta[token] * args.row_sum[column];
            if (args.bias != nullptr) sum += args.bias[column];
            narrow(sum, args.y[int64_t(token) * args.n + column]);
        }
    }

    NMSPARSE_DEVICE static void moments(Args const& args, Shared& shared, int token, int thread) {
        Moments const* from = (thread < PARTS ? args.z : args.kept) + int64_t(token) * args.parts;
        Moments sum;
        for (int part = thread % PARTS; part < args.parts; part += PARTS) sum.add(from[part]);
        shared.moments[thread / PARTS][thread % PARTS] = sum;
    }
};

}  // namespace nmsparse
