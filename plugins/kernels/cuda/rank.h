// Which channels of a group are kept, and what a token's rows are scaled by. The definition is in docs/format.md.
#pragma once

#include "kernel.h"
#include "../../op_spec.h"

namespace nmsparse {

// What a channel is ranked by. NaN counts as the largest score, so that it is kept and stays visible.
NMSPARSE_DEVICE float score(float z, float channel_scale) {
    float const found = fabsf(z) * channel_scale;
    return found == found ? found : INFINITY;
}

// Whether the channel at place `i` with score `a` goes before the one at `j` with `b`: ties go to the lower place.
NMSPARSE_DEVICE bool before(float a, int i, float b, int j) { return a > b || (a == b && i < j); }

// The channel at a place, for the Args of any kernel. An entry of a permutation may be any number: one that is no channel
// stands for channel 0, so that nothing is read outside a row, and what is made of it is NaN, which is kept and visible.
struct Channel {
    int at;
    bool is_real;

    NMSPARSE_DEVICE float of(float value) const { return is_real ? value : NAN; }
};

template <class Args>
NMSPARSE_DEVICE Channel channel_at(Args const& args, int place) {
    int const entry = args.permutation == nullptr ? place : args.permutation[place];
    bool const is_real = unsigned(entry) < unsigned(args.k);
    return {is_real ? entry : 0, is_real};
}

// z of a token's channel.
template <class Args>
NMSPARSE_DEVICE float shifted(Args const& args, int token, int channel) {
    float const x = widen(args.x[int64_t(token) * args.k + channel]);
    if (args.eta != nullptr) return x - args.eta[token];
    return args.shift != nullptr ? x - args.shift[channel] : x;
}

// Leaves z and the score of the channel at place `first` + i in shared.z[i] and shared.scores[i].
template <class Args, class Shared>
NMSPARSE_DEVICE void load(Args const& args, Shared& shared, int token, int first, int i) {
    Channel const channel = channel_at(args, first + i);
    float const z = channel.of(shifted(args, token, channel.at));
    shared.z[i] = z;
    shared.scores[i] = score(z, args.channel_scale == nullptr ? 1 : args.channel_scale[channel.at]);
}

// Leaves the moments of every THREADS-th channel from `thread` on, and of what is kept of them.
template <int THREADS, class Shared>
NMSPARSE_DEVICE void moments(Shared const& shared, int thread, int count, Moments& of_z, Moments& of_kept) {
    Moments z, kept;
    for (int i = thread; i < count; i += THREADS) {
        z.add({1, shared.z[i], 0});
        kept.add({1, shared.keep[i] ? shared.z[i] : 0, 0});
    }
    of_z = z;
    of_kept = kept;
}

// Whether the channel `i` of `scores`, which begin with a whole group, is kept in its group of GROUP; 0 is any group.
template <int GROUP = 0>
NMSPARSE_DEVICE bool is_kept(float const* scores, int i, int group, int keep) {
    int const size = GROUP == 0 ? group : GROUP, begin = i / size * size;
    int rank = 0;
#pragma unroll
    for (int j = begin; j < begin + size; ++j) rank += before(scores[j], j, scores[i], i);
    return rank < keep;
}

// The same, with a loop of known length for the groups that are common.
NMSPARSE_DEVICE bool is_kept_of(float const* scores, int i, int group, int keep) {
    switch (group) {
        case 4: return is_kept<4>(scores, i, group, keep);
        case 8: return is_kept<8>(scores, i, group, keep);
        case 16: return is_kept<16>(scores, i, group, keep);
        case 32: return is_kept<32>(scores, i, group, keep);
        default: return is_kept(scores, i, group, keep);
    }
}

// nu = sqrt(Var(z) / max(Var(zs), floor)), arXiv:2509.22166 eq. (5); NaN passes.
NMSPARSE_DEVICE float token_scale(Moments const& z, Moments const& kept) {
    float const variance = kept.variance();
    return sqrtf(z.variance() / (variance < VARIANCE_FLOOR ? VARIANCE_FLOOR : variance));
}

}  // namespace nmsparse
