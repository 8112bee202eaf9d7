// What tests/test_kernels.py calls: the kernels, and a layer made of them, as walk.cpp runs them.
#include "../kernels/cuda/layer.h"

using namespace nmsparse;

#define CALL(NAME, ...) \
    extern "C" void NAME(__VA_ARGS__::Args const* args) { launch<__VA_ARGS__>(*args, nullptr); }
CALL(pack_float16, Pack<__half>)
CALL(pack_bfloat16, Pack<__nv_bfloat16>)
CALL(select_float16, Select<__half>)
CALL(select_bfloat16, Select<__nv_bfloat16>)
CALL(token_shift_float16, TokenShift<__half>)
CALL(token_shift_bfloat16, TokenShift<__nv_bfloat16>)
CALL(token_scale, TokenScale)
CALL(gemv_float16, Gemv<__half>)
CALL(gemv_bfloat16, Gemv<__nv_bfloat16>)
CALL(gemv_sum_float16, GemvSum<__half>)
CALL(gemv_sum_bfloat16, GemvSum<__nv_bfloat16>)

extern "C" int layer_path(Layer const* layer, int tokens) { return int(path_of(*layer, tokens)); }

extern "C" int layer_order(Layer const* layer) { return int(order_of(*layer)); }

extern "C" size_t layer_workspace(Layer const* layer, int tokens) { return workspace_bytes(*layer, tokens); }

extern "C" int layer_float16(Layer const* layer, Tensors const* tensors, int tokens, void* workspace) {
    return run_layer<__half>(*layer, *tensors, tokens, Tile::WIDE, workspace, nullptr);
}

extern "C" int layer_bfloat16(Layer const* layer, Tensors const* tensors, int tokens, void* workspace) {
    return run_layer<__nv_bfloat16>(*layer, *tensors, tokens, Tile::WIDE, workspace, nullptr);
}
