// The op SparseLinear as the native libraries know it. Made by plugins/op_spec.py from converter/signature.py.
// clang-format off
#pragma once

#include <cstdint>

namespace nmsparse {

constexpr char const* DOMAIN_NAME = "nmsparse";
constexpr char const* OP_NAME = "SparseLinear";
constexpr char const* OP_VERSION = "1";

// The inputs in the order of the op's signature; a node of a plugin has those whose bit is set in its field `inputs`.
enum class Input : int32_t { X, W, BIAS, CHANNEL_SCALE, SHIFT, ROW_SUM, PERMUTATION, RESIDUAL_IN, RESIDUAL_OUT, SPARSE, WEIGHT_SCALE, COUNT };
constexpr char const* INPUT_NAMES[] = {"X", "W", "bias", "channel_scale", "shift", "row_sum", "permutation", "residual_in", "residual_out", "sparse", "weight_scale"};
static_assert(sizeof(INPUT_NAMES) / sizeof(*INPUT_NAMES) == static_cast<int>(Input::COUNT));

enum class ShiftMode : int32_t { NONE, STATIC, TOKEN_MEAN, TOKEN_MEDIAN, COUNT };
constexpr char const* SHIFT_MODE_NAMES[] = {"none", "static", "token_mean", "token_median"};
static_assert(sizeof(SHIFT_MODE_NAMES) / sizeof(*SHIFT_MODE_NAMES) == static_cast<int>(ShiftMode::COUNT));

constexpr float VARIANCE_FLOOR = 1e-09F;

}  // namespace nmsparse
