// A layer on a CPU: what a call is given, its way to y, and the parts of that way.
#pragma once

#include <cstdint>

#include "../../op_spec.h"

namespace nmsparse::cpu {

constexpr int64_t LINE = 64;  // bytes of a line of the cache

inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }
inline int64_t round_up(int64_t number, int64_t step) { return ceil_div(number, step) * step; }

// W as it is stored: [k, n] numbers, of 32 or 16 bits, or integers, each to be multiplied by the scale of its column and
// of the so many rows that share one. Of four bits, two integers lie in a byte, the first in the lower half.
enum class Kind { FLOAT, FLOAT16, BFLOAT16, INT8, INT4 };

constexpr int64_t bytes(Kind kind, int64_t numbers) {
    switch (kind) {
        case Kind::FLOAT: return 4 * numbers;
        case Kind::FLOAT16:
        case Kind::BFLOAT16: return 2 * numbers;
        case Kind::INT8: return numbers;
        case Kind::INT4: return numbers / 2;
    }
    return 0;
}

struct Weight {
    Kind kind;
    void const* data;
    int64_t n;
    float const* scale;  // [k / rows, n]
    int64_t rows;
};

// One call; what the node has not is null.
struct Layer {
    int64_t tokens, k, n, rank;
    int64_t keep, group;
    ShiftMode shift_mode;
    bool variance;
    bool sparse;  // false in a dense phase: every channel is kept and nothing is corrected
    Weight w;
    float const *x, *bias, *channel_scale, *shift, *row_sum;
    int64_t const* permutation;
    float const *residual_in, *residual_out;
    float* y;
};

// Rows that a token's product reads, and what each is multiplied by: in rising order, cut where a block of rows ends.
// Where `rows` is null, `values` has a number for each of the k rows, and zeros after them.
struct Lists {
    int64_t k;
    int64_t capacity;  // of rows and values, for a token: k, up to the next multiple of STEP
    int64_t block;     // rows of a block
    int32_t* rows;     // [tokens, capacity]
    float* values;     // [tokens, capacity]
    int32_t* ends;     // [tokens, blocks]: how many of them lie in this block and those before it

    int64_t blocks() const { return ceil_div(k, block); }
};

// What is left for the epilogue of a token.
struct Token {
    float eta, nu;
};

constexpr int STEP = 8;            // rows that are read at once
constexpr int64_t CHUNK = 128;     // tokens whose lists are held at once
constexpr int64_t MOST_ROWS = 64;  // of a block

// The ways to a product, told in product.cpp. All give the same bits.
enum class Way { STREAMED, HELD, PACKED };

// The fastest for so many tokens.
Way way(Layer const& layer, int64_t tokens);

// Rows of a block: such that in most patterns each block keeps a multiple of eight, and that they share a scale.
int64_t block_rows(Layer const& layer);

// Selects the channels of token `t`. What is not null is written, at place `slot`: zs and z - zs.
struct Selected {
    int64_t slot;
    Lists const *kept, *dropped;
};
Token select_channels(Layer const& layer, int64_t t, Selected const& to);

// What a product is cut into: tiles of so many columns, and parts of so many rows of W, or one part.
struct Cut {
    int64_t columns, parts;
};
Cut cut(Way way, Lists const& lists, int64_t tokens, Weight const& w);

// One tile of one part of a product: out[t, c] = sum over the listed rows of value * w[row, c]. HELD wants lists where
// `rows` is null, the others want rows. The whole is the sum of the parts, in their order.
struct Piece {
    int64_t column, columns, part;
};
void product(Way way, Lists const& lists, int64_t tokens, Weight const& w, Cut const& cut, Piece const& piece, float* out,
             int64_t out_stride);

// y = nu * (the sum of the parts) + eta * row_sum + bias + residual, for columns of one token. A part lies `stride`
// numbers after the one before it; `residual` may be null.
void epilogue(Layer const& layer, Token const& token, float const* first, int64_t parts, int64_t stride,
              float const* residual, int64_t column, int64_t columns, float* y);

// A reference to what is done for each i; it copies nothing, for it is made in every call.
class Body {
public:
    template <class Function>
    Body(Function const& function)
        : function_(&function),
          call_([](void const* of, int64_t i) { (*static_cast<Function const*>(of))(i); }) {}
    void operator()(int64_t i) const { call_(function_, i); }

private:
    void const* function_;
    void (*call_)(void const*, int64_t);
};

// Where a call has its memory and threads from.
class Host {
public:
    virtual ~Host() = default;
    virtual void* memory(int64_t bytes) = 0;  // until the call ends; throws where there is none
    // Runs body(0) to body(count - 1), on several threads where that is `worth` it.
    virtual void parallel(int64_t count, bool worth, Body const& body) = 0;
};

// Writes y of every token of the layer.
void run_layer(Layer const& layer, Host& host);

}  // namespace nmsparse::cpu
