// Which channels of a group are kept, and what a token's rows are scaled by. The definition is in docs/format.md.
#pragma once

#include "cuda/kernel.h"
#include "../op_spec.h"

namespace nmsparse {

// What a channel is ranked by. NaN counts as the largest score, so that it is kept and stays visible.
NMSPARSE_DEVICE float score(float z, float channel_scale) {
    float const found = fabsf(z) * channel_scale;
    return found == found ? found : INFINITY;
}

// Whether the channel at place `i` with score `a` goes before the one at `j` with `b`: ties go to the lower place.
NMSPARSE_DEVICE bool before(float a, int i, float b, int j) { return a > b || (a == b && i < j); }

// nu = sqrt(Var(z) / max(Var(zs), floor)), arXiv:2509.22166 eq. (5); NaN passes.
NMSPARSE_DEVICE float token_scale(Moments const& z, Moments const& kept) {
    float const variance = kept.variance();
    return sqrtf(z.variance() / (variance < VARIANCE_FLOOR ? VARIANCE_FLOOR : variance));
}

}  // namespace nmsparse
