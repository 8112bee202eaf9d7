// Any N:M: from X[T, K] to the kept channels of each token beside zeros, for a dense GEMM, and the moments that its scale
// is made of.
//
// A block has some whole groups of one token. A thread ranks a channel by counting who goes before it in its group.
#pragma once

#include "rank.h"

namespace nmsparse {

template <class T>
struct Select {
    static constexpr int THREADS = 256, PHASES = 5, PLACES = 1024, PARTS = 16;

    struct Args {
        T const* x;                  // [tokens, k]
        float const* channel_scale;  // [k] or null
        float const* shift;          // [k] or null
        float const* eta;            // [tokens] or null
        int32_t const* permutation;  // [k] or null: place -> channel; the rows of W are in the order of the places
        T* zs;                   // [tokens, k]
        Moments* z;                  // [tokens, blocks_y] or null
        Moments* kept;               // likewise
        int tokens, k, keep, group;  // group is at most PLACES
    };

    struct Shared {
        float z[PLACES], scores[PLACES];
        bool keep[PLACES];
        Moments of_z[THREADS], of_kept[THREADS];
    };

    NMSPARSE_DEVICE static int places(int group) { return PLACES / group * group; }
    NMSPARSE_DEVICE static int parts(int k, int group) { return (k + places(group) - 1) / places(group); }
    static int blocks_x(Args const& args) { return args.tokens; }  // y has room for 65,535 only
    NMSPARSE_DEVICE static int blocks_y(Args const& args) { return parts(args.k, args.group); }

    template <int PHASE>
    NMSPARSE_DEVICE static void phase(Args const& args, Shared& shared, Place place) {
        int const token = place.block_x, first = place.block_y * places(args.group);
        int const count = args.k - first < places(args.group) ? args.k - first : places(args.group);
        if constexpr (PHASE == 0) {
            for (int i = place.thread; i < count; i += THREADS) load(args, shared, token, first, i);
        } else if constexpr (PHASE == 1) {
            for (int i = place.thread; i < count; i += THREADS)
                shared.keep[i] = is_kept_of(shared.scores, i, args.group, args.keep);
        } else if constexpr (PHASE == 2) {
            for (int i = place.thread; i < count; i += THREADS) write(args, shared, token, first, i);
            if (args.z != nullptr)
                moments<THREADS>(shared, place.thread, count, shared.of_z[place.thread], shared.of_kept[place.thread]);
        } else if (args.z != nullptr) {
            // 256 moments to 16, and these to one; always in the same order.
            constexpr int STRIDE = PHASE == 3 ? 1 : PARTS;
            if (place.thread % (STRIDE * PARTS) != 0) return;
            for (int i = 1; i < PARTS; ++i) {
                shared.of_z[place.thread].add(shared.of_z[place.thread + i * STRIDE]);
                shared.of_kept[place.thread].add(shared.of_kept[place.thread + i * STRIDE]);
            }
            if (PHASE == 4) {
                int64_t const at = int64_t(token) * blocks_y(args) + place.block_y;
                args.z[at] = shared.of_z[0];
                args.kept[at] = shared.of_kept[0];
            }
        }
    }

    NMSPARSE_DEVICE static void write(Args const& args, Shared& shared, int token, int first, int i) {
        T value;
        narrow(shared.keep[i] ? shared.z[i] : 0, value);
        args.zs[int64_t(token) * args.k + first + i] = value;
    }
};

// nu of each token, `[tokens]`, from the moments of its parts.
struct TokenScale {
    static constexpr int THREADS = 64, PHASES = 1;

    struct Args {
        Moments const *z, *kept;  // [tokens, parts]
        float* nu;                // [tokens]
        int tokens, parts;
    };

    struct Shared {};

    static int blocks_x(Args const& args) { return (args.tokens + THREADS - 1) / THREADS; }
    static int blocks_y(Args const&) { return 1; }

    template <int PHASE>
    NMSPARSE_DEVICE static void phase(Args const& args, Shared&, Place place) {
        int const token = place.block_x * THREADS + place.thread;
        if (token >= args.tokens) return;
        Moments z, kept;
        for (int part = 0; part < args.parts; ++part) {
            z.add(args.z[int64_t(token) * args.parts + part]);
            kept.add(args.kept[int64_t(token) * args.parts + part]);
        }
        args.nu[token] = token_scale(z, kept);
    }
};

}  // namespace nmsparse
