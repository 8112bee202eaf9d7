// The fields of a plugin: what the graph says of a node, and what an engine stores of it.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "../kernels/cuda/layer.h"

namespace nmsparse {

struct Fields {
    int32_t keep = 0, group = 0;
    int32_t shift_mode = 0;   // ShiftMode
    int32_t variance = 0;     // 0 or 1
    int32_t inputs = 0;       // bit i: the node has the input i of the op's signature
    int32_t gemv_tokens = 0;  // as in Layer
    int32_t sparse_tokens = 0;

    static constexpr int COUNT = 7;
    static constexpr std::array<char const*, COUNT> NAMES = {"keep",   "group",       "shift_mode",   "variance",
                                                             "inputs", "gemv_tokens", "sparse_tokens"};

    // Reads `given` into `fields`; returns what is wrong with it, or nothing.
    static std::string read(nvinfer1::PluginFieldCollection const* given, Fields& fields);

    std::array<nvinfer1::PluginField, COUNT> as_fields() const;

    // Where the node has an input, or -1.
    int index_of(Input input) const;
    int input_count() const;

    Layer layer(int k, int n, int sm) const;
    std::string text() const;
};

}  // namespace nmsparse
