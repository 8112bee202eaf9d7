// A layer on a CPU: what a call is given, and the parts of its way to y. Threads, memory and GEMM are the caller's.
#pragma once

#include <cstdint>

#include "../../op_spec.h"

namespace nmsparse::cpu {

// One call; what the node has not is null.
struct Layer {
    int64_t tokens, k, n, rank;
    int64_t keep, group;
    ShiftMode shift_mode;
    bool variance;
    bool sparse;  // false in a dense phase: every channel is kept and nothing is corrected
    float const *x, *w, *bias, *channel_scale, *shift, *row_sum;
    int64_t const* permutation;
    float const *residual_in, *residual_out;
    float* y;
};

// Rows that a token's product reads, and what each is multiplied by: in rising order, cut where a block of rows ends.
struct Lists {
    int64_t capacity;  // of rows and values, for a token
    int64_t block;     // rows of a block
    int32_t* rows;     // [tokens, capacity]
    float* values;     // [tokens, capacity]
    int32_t* ends;     // [tokens, blocks]: how many of them lie in this block and those before it

    int64_t blocks() const { return (capacity + block - 1) / block; }
};

// What is left for the epilogue of a token.
struct Token {
    float eta, nu;
};

constexpr int64_t CHUNK = 128;             // tokens whose lists are held at once
constexpr int64_t STREAMED_TOKENS = 8;     // of a tile that streams, at most
constexpr int64_t STREAMED_COLUMNS = 1024;
constexpr int64_t PACKED_COLUMNS = 512;    // of a tile that copies, at most
constexpr int64_t PACKED_ROWS = 64;        // of a block, at most

// Rows of a block: such that in most patterns each block keeps a multiple of eight.
int64_t block_rows(Layer const& layer);

// Chooses the channels of token `t`. What is not null is written: zs and z - zs as lists, at place `slot`, or as rows of
// k numbers.
struct Chosen {
    int64_t slot;
    Lists const *kept, *dropped;
    float *pruned, *rest;
};
Token choose(Layer const& layer, int64_t t, Chosen const& to);

// One tile of columns of a product: out[t, c] = sum over the listed rows of value * w[row, c]. `packed` says which of the
// two limits above it keeps to; both ways give the same bits.
void product(Lists const& lists, int64_t tokens, float const* w, int64_t n, int64_t column, int64_t columns, bool packed,
             float* out, int64_t out_stride);

// y = nu * y + eta * row_sum + bias + residual, for columns of one token. `residual` may be null.
void epilogue(Layer const& layer, Token const& token, float* y, float const* residual, int64_t column, int64_t columns);

}  // namespace nmsparse::cpu
