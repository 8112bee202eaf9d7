// CUTLASS's own reading of the values and metadata that Pack writes, which is what the sparse tensor cores are given.
#include <cutlass/layout/matrix.h>
#include <cutlass/util/host_reorder.h>
#include <cutlass/util/host_uncompress.h>

#include <vector>

// pruned[padded, k] from what Pack wrote, by CUTLASS.
extern "C" void pack_uncompressed(uint16_t* values, uint16_t const* metadata, uint16_t* pruned, int padded, int k) {
    using Value = cutlass::half_t;  // any 16 bits: they are moved, not read
    using Rows = cutlass::layout::RowMajor;
    using Interleaved = cutlass::layout::ColumnMajorInterleaved<2>;
    int const columns = k / 16;
    size_t const size = size_t(padded) * columns;
    // reorder_meta says where each row and column of the plain metadata is sent; sent back, they are read.
    std::vector<uint16_t> row_of(size), column_of(size), sent_row(size), sent_column(size), plain(size);
    for (size_t i = 0; i < size; ++i) {
        row_of[i] = i / columns;
        column_of[i] = i % columns;
    }
    auto const there = Interleaved::packed({padded, columns});
    auto const send = [&](std::vector<uint16_t>& to, std::vector<uint16_t>& from) {
        cutlass::reorder_meta(cutlass::TensorRef<uint16_t, Interleaved>(to.data(), there),
                              cutlass::TensorRef<uint16_t, Rows>(from.data(), columns), {padded, 0, columns});
    };
    send(sent_row, row_of);
    send(sent_column, column_of);
    for (size_t i = 0; i < size; ++i) plain[size_t(sent_row[i]) * columns + sent_column[i]] = metadata[i];
    cutlass::uncompress(cutlass::TensorRef<Value, Rows>(reinterpret_cast<Value*>(pruned), k),
                        cutlass::TensorRef<Value, Rows>(reinterpret_cast<Value*>(values), k / 2),
                        cutlass::TensorRef<uint16_t, Rows>(plain.data(), columns), padded, k);
}
