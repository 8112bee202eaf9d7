// What tests/native.py calls besides a layer: the kernels, one by one, as walk.cpp or a GPU runs them.
#include "../kernels/cuda/layer.h"

using namespace nmsparse;

#define CALL(NAME, ...) \
    extern "C" int NAME(__VA_ARGS__::Args const* args) { return launch<__VA_ARGS__>(*args, nullptr); }
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

extern "C" int layer_order(Layer const* layer) { return int(order_of(*layer)); }
