// CUTLASS's own reading of the values and metadata that Pack writes, which is what the sparse tensor cores are given.
#include <cutlass/cutlass.h>

#include <cutlass/gemm/collective/builders/sm90_sparse_config.inl>
#include <cutlass/layout/matrix.h>
#include <cutlass/util/host_reorder.h>
#include <cutlass/util/host_uncompress.h>

#include <algorithm>
#include <vector>

// zs[padded, k] from what Pack wrote for mma.sp, by CUTLASS.
extern "C" void pack_uncompressed(uint16_t* values, void const* written, uint16_t* zs, int padded, int k) {
    auto const* metadata = static_cast<uint16_t const*>(written);
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
    cutlass::uncompress(cutlass::TensorRef<Value, Rows>(reinterpret_cast<Value*>(zs), k),
                        cutlass::TensorRef<Value, Rows>(reinterpret_cast<Value*>(values), k / 2),
                        cutlass::TensorRef<uint16_t, Rows>(plain.data(), columns), padded, k);
}

// The same of what Pack wrote for wgmma: where CUTLASS's layouts, which its kernel is given, place a group's two values
// and the four bits that say where they belong.
extern "C" void pack_uncompressed_wgmma(uint16_t* values, void const* metadata, uint16_t* zs, int padded, int k) {
    using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, cutlass::half_t>, cute::GMMA::Major::K,
                                                 cute::sparse_elem<8, uint8_t>, cute::Int<128>>;
    auto const problem = cute::make_shape(padded, 8, k, 1);
    auto const of_values = Config::fill_layoutA(problem);
    auto const of_places = Config::fill_layoutE(problem);
    std::fill_n(zs, size_t(padded) * k, uint16_t(0));
    for (int row = 0; row < padded; ++row)
        for (int group = 0; group < k; group += 4) {
            // Both count channels: two to a value, eight to a byte of places.
            int64_t const at = of_places(row, group, 0);
            int const places = static_cast<uint8_t const*>(metadata)[at / 8] >> at % 8 / 4 * 4 & 15;
            for (int i = 0; i < 2; ++i)
                zs[int64_t(row) * k + group + (places >> 2 * i & 3)] = values[of_values(row, group + 2 * i, 0) / 2];
        }
}
