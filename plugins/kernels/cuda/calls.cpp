// A layer for whoever loads the library without TensorRT: `nmsparse bench --tune`, and the tests.
#include "layer.h"

using namespace nmsparse;

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int nmsparse_layer_path(Layer const* layer, int tokens) { return int(path_of(*layer, tokens)); }

EXPORTED size_t nmsparse_layer_workspace(Layer const* layer, int tokens) { return workspace_bytes(*layer, tokens); }

#define LAYER(NAME, TYPE)                                                                                      \
    EXPORTED int NAME(Layer const* layer, Tensors const* tensors, int tokens, int tile, void* workspace,       \
                      cudaStream_t stream) {                                                                   \
        return run_layer<TYPE>(*layer, *tensors, tokens, Tile(tile), workspace, stream);                       \
    }
LAYER(nmsparse_layer_float16, __half)
LAYER(nmsparse_layer_bfloat16, __nv_bfloat16)
