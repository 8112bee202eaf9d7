// The shell around a layer that TensorRT drives: shapes, formats, tactics, workspace. No mathematics.
#pragma once

#include <memory>

#include "fields.h"

namespace nmsparse {

std::unique_ptr<nvinfer1::IPluginV3> make_plugin(Fields const& fields);

}  // namespace nmsparse
