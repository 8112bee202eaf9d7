// One SparseLinear on a GPU: which path so many tokens take, the workspace it needs, and the kernels in their order.
#pragma once

#include <cstddef>

#include "launch.h"

namespace nmsparse {

constexpr int MAX_GROUP = Select<__half>::PLACES;
constexpr int MOST = 1 << 30;            // tokens or channels: an int has room for the next multiple of a tile
constexpr int MOST_GEMV_TOKENS = 65535;  // blocks of a grid's y

struct Layer {
    int k, n, keep, group;
    ShiftMode shift_mode;
    int variance;       // 0 or 1
    int gemv_tokens;    // up to so many tokens read only the rows that they keep
    int sparse_tokens;  // from so many on go through the sparse tensor cores, where the pattern allows; 0 is never
    int sm;             // the device's compute_capability()
};

enum class Path { GEMV, SPARSE, DENSE };

struct Tensors {
    void const *x, *w;  // [tokens, k]; [k, n], rows in the order of the places when there is a permutation
    float const *bias, *channel_scale, *shift, *row_sum;
    int32_t const* permutation;
    void* y;  // [tokens, n]
};

// What of the layer no kernel can run, or null.
char const* refusal(Layer const& layer);

// The sparse tensor cores know 2:4, which 1:4 fits into too, and steps of 64 channels.
Path path_of(Layer const& layer, int tokens);

// Of the sparse path: an H100 has wgmma, which takes any K that the path does; every other GPU has mma.sp.
MetadataOrder order_of(Layer const& layer);

// Bytes; not less for fewer tokens.
size_t workspace_bytes(Layer const& layer, int max_tokens);

template <class T>
cudaError_t run_layer(Layer const& layer, Tensors const& tensors, int tokens, Tile tile, void* workspace,
                      cudaStream_t stream);

}  // namespace nmsparse
