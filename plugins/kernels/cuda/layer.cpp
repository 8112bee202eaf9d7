#include "layer.h"

#include <algorithm>

namespace nmsparse {

namespace {

constexpr int SKINNY_TOKENS = 64, SKINNY_BLOCKS = 264;  // a tile's tokens; two blocks for each SM of an H100
constexpr size_t ALIGNMENT = 256;

int up(int value, int to) { return (value + to - 1) / to * to; }

// What a path keeps in the workspace.
struct Buffers {
    float *eta = nullptr, *nu = nullptr, *partial = nullptr;
    Moments *z = nullptr, *kept = nullptr;
    void *packed = nullptr, *zs = nullptr;
    uint32_t* metadata = nullptr;
    int padded, parts, splits = 1;  // parts: of a token, with moments of their own; splits: of K, with sums of their own
    size_t bytes = 0;
};

// How many parts of K, of whole steps of 64 channels, give skinny_gemm_sm90 blocks enough.
int skinny_splits(Layer const& layer) {
    int const wanted = SKINNY_BLOCKS * 128 / up(layer.n, 128);
    int splits = 1;
    for (int i = 2; i <= wanted; ++i)
        if (layer.k % (64 * i) == 0) splits = i;
    return splits;
}

Buffers lay_out(Layer const& layer, int tokens, void* workspace) {
    Buffers buffers;
    auto const take = [&](auto*& pointer, size_t bytes) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(workspace) + buffers.bytes);
        buffers.bytes += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    };
    Path const path = path_of(layer, tokens);
    bool const wgmma = order_of(layer) == MetadataOrder::WGMMA;
    bool const skinny = path == Path::DENSE && wgmma && tokens <= SKINNY_TOKENS, summed = path == Path::GEMV || skinny;
    buffers.padded = path == Path::SPARSE ? up(tokens, wgmma ? WGMMA_TOKENS : Pack<__half>::TOKENS) : tokens;
    auto const rows = size_t(buffers.padded);
    if (path == Path::GEMV)
        buffers.parts = buffers.splits = Gemv<__half>::splits(layer.k, layer.group);
    else if (path == Path::SPARSE)
        buffers.parts = Pack<__half>::parts(layer.k);
    else
        buffers.parts = Select<__half>::parts(layer.k, layer.group);
    if (skinny) buffers.splits = skinny_splits(layer);
    if (layer.shift_mode >= ShiftMode::TOKEN_MEAN) take(buffers.eta, rows * sizeof(float));
    if (layer.variance != 0) {
        take(buffers.z, rows * buffers.parts * sizeof(Moments));
        take(buffers.kept, rows * buffers.parts * sizeof(Moments));
        if (!summed) take(buffers.nu, rows * sizeof(float));
    }
    if (summed) take(buffers.partial, rows * buffers.splits * layer.n * sizeof(float));
    if (path == Path::SPARSE) {
        take(buffers.packed, rows * layer.k / 2 * sizeof(__half));
        take(buffers.metadata, rows * up(layer.k, wgmma ? WGMMA_CHANNELS : 32) / 32 * sizeof(uint32_t));
    } else if (path == Path::DENSE) {
        take(buffers.zs, rows * layer.k * sizeof(__half));
    }
    return buffers;
}

}  // namespace

char const* refusal(Layer const& layer) {
    if (layer.group < 1 || layer.group > MAX_GROUP) return "group must be 1 to 1024";
    if (layer.keep < 1 || layer.keep > layer.group) return "keep must be 1 to group";
    if (layer.k < 1 || layer.k % layer.group != 0) return "input channels must be divisible by group";
    if (layer.k % 8 != 0) return "input channels must be divisible by 8";
    if (layer.n < 1 || layer.n % 8 != 0) return "output channels must be divisible by 8";
    if (layer.shift_mode < ShiftMode::NONE || layer.shift_mode >= ShiftMode::COUNT) return "shift_mode must be 0 to 3";
    if (layer.gemv_tokens < 0 || layer.gemv_tokens > MOST_GEMV_TOKENS) return "gemv_tokens must be 0 to 65535";
    if (layer.sparse_tokens < 0) return "sparse_tokens must not be negative";
    return nullptr;
}

Path path_of(Layer const& layer, int tokens) {
    if (tokens <= layer.gemv_tokens) return Path::GEMV;
    bool const fits = layer.group == 4 && layer.keep <= 2 && layer.k % 64 == 0;
    return fits && layer.sparse_tokens > 0 && tokens >= layer.sparse_tokens ? Path::SPARSE : Path::DENSE;
}

MetadataOrder order_of(Layer const& layer) { return layer.sm == 90 ? MetadataOrder::WGMMA : MetadataOrder::MMA; }

size_t workspace_bytes(Layer const& layer, int max_tokens) {
    size_t bytes = 0;
    // Each path is largest where it ends.
    for (int const tokens : {layer.gemv_tokens, SKINNY_TOKENS, layer.sparse_tokens - 1, max_tokens})
        if (tokens >= 1) bytes = std::max(bytes, lay_out(layer, std::min(tokens, max_tokens), nullptr).bytes);
    return bytes;
}

template <class T>
cudaError_t run_layer(Layer const& layer, Tensors const& tensors, int tokens, Tile tile, void* workspace,
                      cudaStream_t stream) {
    if (tokens == 0) return cudaSuccess;
    Buffers const at = lay_out(layer, tokens, workspace);
    auto const* x = static_cast<T const*>(tensors.x);
    bool const is_static = layer.shift_mode == ShiftMode::STATIC;
    float const* shift = is_static ? tensors.shift : nullptr;
    cudaError_t error = cudaSuccess;
    auto const next = [&](auto launched) {
        if (error == cudaSuccess) error = launched();
    };
    if (at.eta != nullptr)
        next([&] {
            bool const median = layer.shift_mode == ShiftMode::TOKEN_MEDIAN;
            return launch<TokenShift<T>>({x, at.eta, tokens, layer.k, median}, stream);
        });
    typename GemvSum<T>::Args const sums{at.partial, at.z, at.kept, at.eta, tensors.row_sum, tensors.bias,
                                         static_cast<T*>(tensors.y), tokens, layer.n, at.splits, at.parts};
    if (path_of(layer, tokens) == Path::GEMV) {
        next([&] {
            return launch<Gemv<T>>({x, static_cast<T const*>(tensors.w), tensors.channel_scale, shift, at.eta,
                                    tensors.permutation, at.partial, at.z, at.kept, tokens, layer.k, layer.n, layer.keep,
                                    layer.group},
                                   stream);
        });
        next([&] { return launch<GemvSum<T>>(sums, stream); });
        return error;
    }
    if (at.packed != nullptr)
        next([&] {
            return launch<Pack<T>>({x, tensors.channel_scale, shift, at.eta, tensors.permutation,
                                    static_cast<T*>(at.packed), at.metadata, at.z, at.kept, tokens, at.padded, layer.k,
                                    layer.keep, order_of(layer)},
                                   stream);
        });
    else
        next([&] {
            return launch<Select<T>>({x, tensors.channel_scale, shift, at.eta, tensors.permutation,
                                      static_cast<T*>(at.zs), at.z, at.kept, tokens, layer.k, layer.keep, layer.group},
                                     stream);
        });
    if (at.partial != nullptr) {
        Gemm const gemm{at.zs, nullptr, tensors.w, nullptr, nullptr, nullptr, nullptr, nullptr,
                        tokens, tokens, layer.k, layer.n, at.partial, at.splits};
        next([&] { return skinny_gemm_sm90<T>(gemm, stream); });
        next([&] { return launch<GemvSum<T>>(sums, stream); });
        return error;
    }
    if (at.z != nullptr)
        next([&] { return launch<TokenScale>({at.z, at.kept, at.nu, at.padded, at.parts}, stream); });
    Gemm const gemm{at.packed != nullptr ? at.packed : at.zs, at.metadata, tensors.w, at.nu, at.eta, tensors.row_sum,
                    tensors.bias, tensors.y, tokens, at.padded, layer.k, layer.n};
    bool const wgmma = order_of(layer) == MetadataOrder::WGMMA;
    next([&] {
        if (at.packed == nullptr) return wgmma ? dense_gemm_sm90<T>(tile, gemm, stream) : dense_gemm<T>(tile, gemm, stream);
        return wgmma ? sparse_gemm_sm90<T>(tile, gemm, stream) : sparse_gemm<T>(tile, gemm, stream);
    });
    return error;
}

template cudaError_t run_layer<__half>(Layer const&, Tensors const&, int, Tile, void*, cudaStream_t);
template cudaError_t run_layer<__nv_bfloat16>(Layer const&, Tensors const&, int, Tile, void*, cudaStream_t);

}  // namespace nmsparse
