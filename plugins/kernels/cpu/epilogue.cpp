// What is left of a token once its product is there, in loops that compilers make vectors of.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "epilogue.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "layer.h"

HWY_BEFORE_NAMESPACE();
namespace nmsparse::cpu::HWY_NAMESPACE {

void finish(Layer const& layer, Token const& token, float const* first, int64_t parts, int64_t stride,
              float const* residual, int64_t column, int64_t columns, float* y) {
    bool const scaled = layer.variance && layer.sparse;
    bool const added = residual != nullptr || layer.row_sum != nullptr || layer.bias != nullptr;
    if (first == y && parts == 1 && !scaled && !added) return;
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
}

}  // namespace nmsparse::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace nmsparse::cpu {

HWY_EXPORT(finish);

void epilogue(Layer const& layer, Token const& token, float const* first, int64_t parts, int64_t stride,
              float const* residual, int64_t column, int64_t columns, float* y) {
    HWY_DYNAMIC_DISPATCH(finish)(layer, token, first, parts, stride, residual, column, columns, y);
}

}  // namespace nmsparse::cpu
#endif
