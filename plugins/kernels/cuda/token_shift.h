// eta of the shifts that are a token's own: its mean, or the lower of the two middle channels, `[tokens]`.
//
// A block has one token. The median is found exactly, by the 16 bits of a number as an integer that sorts as the
// number does: a count of the high bytes says where it lies, one of the low bytes among those what it is.
#pragma once

#include "../../op_spec.h"
#include "kernel.h"

namespace nmsparse {

template <class T>
struct TokenShift {
    static constexpr int THREADS = 256, PHASES = 6, PARTS = 16, BINS = 256;

    struct Args {
        T const* x;  // [tokens, k]
        float* eta;  // [tokens]
        int tokens, k;
        bool median;
    };

    struct Shared {
        float sums[THREADS];
        uint32_t counts[2][BINS], nans;
        int high, before;  // of the median: its high byte, and how many numbers have a lower one
    };

    static int blocks_x(Args const& args) { return args.tokens; }
    static int blocks_y(Args const&) { return 1; }

    template <int PHASE>
    NMSPARSE_DEVICE static void phase(Args const& args, Shared& shared, Place place) {
        T const* row = args.x + int64_t(place.block_x) * args.k;
        if (args.median)
            median<PHASE>(args, shared, place, row);
        else
            mean<PHASE>(args, shared, place, row);
    }

    template <int PHASE>
    NMSPARSE_DEVICE static void mean(Args const& args, Shared& shared, Place place, T const* row) {
        if constexpr (PHASE == 0) {
            float sum = 0;
            for (int i = place.thread; i < args.k; i += THREADS) sum += widen(row[i]);
            shared.sums[place.thread] = sum;
        } else if constexpr (PHASE == 1) {
            if (place.thread % PARTS == 0) shared.sums[place.thread] = sum_of(shared.sums + place.thread, 1);
        } else if constexpr (PHASE == 2) {
            if (place.thread == 0) args.eta[place.block_x] = sum_of(shared.sums, PARTS) / args.k;
        }
    }

    NMSPARSE_DEVICE static float sum_of(float const* from, int stride) {
        float sum = 0;
        for (int i = 0; i < PARTS; ++i) sum += from[i * stride];
        return sum;
    }

    template <int PHASE>
    NMSPARSE_DEVICE static void median(Args const& args, Shared& shared, Place place, T const* row) {
        int const rank = (args.k - 1) / 2;
        if constexpr (PHASE == 0) {
            for (int i = place.thread; i < BINS; i += THREADS) shared.counts[0][i] = shared.counts[1][i] = 0;
            if (place.thread == 0) shared.nans = 0;
        } else if constexpr (PHASE == 1) {
            for (int i = place.thread; i < args.k; i += THREADS) {
                float const value = widen(row[i]);
                if (value != value) count(shared.nans);
                count(shared.counts[0][key(row[i]) >> 8]);
            }
        } else if constexpr (PHASE == 2) {
            if (place.thread == 0) shared.high = bin_of(shared.counts[0], rank, shared.before);
        } else if constexpr (PHASE == 3) {
            for (int i = place.thread; i < args.k; i += THREADS)
                if (key(row[i]) >> 8 == shared.high) count(shared.counts[1][key(row[i]) & 255]);
        } else if constexpr (PHASE == 4) {
            if (place.thread != 0) return;
            int unused;
            int const low = bin_of(shared.counts[1], rank - shared.before, unused);
            args.eta[place.block_x] = shared.nans != 0 ? NAN : number(shared.high << 8 | low);
        }
    }

    // The bin in which the number with `rank` smaller ones lies, and how many are in the bins before.
    NMSPARSE_DEVICE static int bin_of(uint32_t const* counts, int rank, int& before) {
        before = 0;
        int bin = 0;
        while (before + int(counts[bin]) <= rank) before += counts[bin++];
        return bin;
    }

    NMSPARSE_DEVICE static int key(T value) {
        auto const bits = reinterpret_cast<uint16_t const&>(value);
        return bits & 0x8000 ? uint16_t(~bits) : bits | 0x8000;
    }

    NMSPARSE_DEVICE static float number(int key) {
        auto const bits = uint16_t(key & 0x8000 ? key & 0x7FFF : ~key);
        return widen(reinterpret_cast<T const&>(bits));
    }

    NMSPARSE_DEVICE static void count(uint32_t& counter) {
#ifdef __CUDA_ARCH__
        atomicAdd(&counter, 1U);
#else
        ++counter;
#endif
    }
};

}  // namespace nmsparse
