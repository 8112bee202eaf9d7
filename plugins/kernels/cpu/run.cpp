// The whole of a call: `select_channels` (parallel over tokens), `product` (over tiles of columns and parts of the rows) and
// `epilogue` (at once where a tile has one part), in chunks of tokens.
#include <algorithm>

#include "layer.h"
#include "tuning.h"

namespace nmsparse::cpu {

namespace {

template <class T>
T* room(Host& host, int64_t count) {
    return static_cast<T*>(host.memory(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T))));
}

Weight numbers(float const* w, int64_t n) { return {Kind::FLOAT, w, n, nullptr, 0}; }

// (z - zs) residual_in of token t, as the list of the next product.
void list_thin(Layer const& layer, Lists const& dropped, Lists const& thin, int64_t t) {
    int64_t const rank = layer.rank;
    Lists one = dropped;
    one.rows += t * dropped.capacity, one.values += t * dropped.capacity, one.ends += t * dropped.blocks();
    float* const values = thin.values + t * thin.capacity;
    Cut const cut{1024, 1};
    for (int64_t c = 0; c < rank; c += cut.columns)
        product(Way::STREAMED, one, 1, numbers(layer.residual_in, rank), cut, {c, std::min(cut.columns, rank - c), 0},
                values + c, rank);
    std::fill(values + rank, values + thin.capacity, 0.0F);
    if (thin.rows == nullptr) return;
    for (int64_t i = 0; i < rank; ++i) thin.rows[t * thin.capacity + i] = static_cast<int32_t>(i);
    for (int64_t b = 0; b < thin.blocks(); ++b)
        thin.ends[t * thin.blocks() + b] = static_cast<int32_t>(std::min((b + 1) * thin.block, rank));
}

}  // namespace

void run_layer(Layer const& layer, Host& host) {
    int64_t const k = layer.k, n = layer.n, rank = layer.rank;
    // As many tokens in each chunk.
    int64_t const most = ceil_div(layer.tokens, ceil_div(layer.tokens, CHUNK));
    auto const lists = [&](int64_t rows, int64_t block, bool listed) {
        int64_t const capacity = round_up(rows, STEP);
        Lists found{rows, capacity, block, nullptr, room<float>(host, most * capacity), nullptr};
        if (!listed) return found;
        found.rows = room<int32_t>(host, most * capacity);
        found.ends = room<int32_t>(host, most * found.blocks());
        return found;
    };
    Way const way = cpu::way(layer, most);
    bool const listed = way != Way::HELD;
    Lists const kept = lists(k, block_rows(layer), listed);
    Lists const dropped = rank ? lists(k, MOST_ROWS, true) : Lists{};
    Lists const thin = rank ? lists(rank, MOST_ROWS, listed) : Lists{};
    Token* const about = room<Token>(host, most);
    Cut const cut = cpu::cut(way, kept, most, layer.w);
    float* const partial = cut.parts > 1 ? room<float>(host, cut.parts * most * n) : nullptr;
    float* const residual = rank ? room<float>(host, most * n) : nullptr;
    for (int64_t first = 0; first < layer.tokens; first += most) {
        int64_t const tokens = std::min(most, layer.tokens - first);
        host.parallel(tokens, tokens * k >= TUNING.worth_waking, [&](int64_t t) {
            about[t] = select_channels(layer, first + t, {t, &kept, rank ? &dropped : nullptr});
            if (rank) list_thin(layer, dropped, thin, t);
        });
        int64_t const tiles = ceil_div(n, cut.columns), size = tokens * n;
        float* const parts = cut.parts > 1 ? partial : layer.y + first * n;
        auto const piece = [&](int64_t i) {
            int64_t const column = i % tiles * cut.columns;
            return Piece{column, std::min(cut.columns, n - column), i / tiles};
        };
        auto const end = [&](int64_t i) {
            Piece const p = piece(i);
            float* const extra = rank ? residual + p.column : nullptr;
            if (rank) product(way, thin, tokens, numbers(layer.residual_out, n), {cut.columns, 1}, p, extra, n);
            for (int64_t t = 0; t < tokens; ++t)
                epilogue(layer, about[t], parts + t * n + p.column, cut.parts, size, rank ? extra + t * n : nullptr,
                         p.column, p.columns, layer.y + (first + t) * n + p.column);
        };
        host.parallel(tiles * cut.parts, true, [&](int64_t i) {
            Piece const p = piece(i);
            product(way, kept, tokens, layer.w, cut, p, parts + p.part * size + p.column, n);
            if (cut.parts == 1) end(i);
        });
        if (cut.parts > 1) host.parallel(tiles, rank || size >= TUNING.worth_waking, end);
    }
}

}  // namespace nmsparse::cpu
