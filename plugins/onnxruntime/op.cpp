// The op SparseLinear for ONNX Runtime's CPU provider, in float32. What it means is in docs/format.md.
//
// A call of tokens goes, in chunks, through `choose` (parallel over tokens) and `product` (over tiles of columns); where
// nothing or little is dropped, the pruned input goes through ONNX Runtime's own MatMul instead. Threads and memory are
// ONNX Runtime's.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../kernels/cpu/layer.h"

namespace nmsparse {

namespace {

using cpu::Layer;
using cpu::Lists;
using cpu::Token;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void refuse(std::string const& what) {
    throw Ort::Exception("nmsparse::SparseLinear: " + what, ORT_INVALID_ARGUMENT);
}

// Memory of one call, from the allocator of the session.
class Memory {
public:
    explicit Memory(OrtAllocator* allocator) : allocator_(allocator) {}
    Memory(Memory const&) = delete;
    Memory& operator=(Memory const&) = delete;
    ~Memory() {
        for (void* const part : parts_) allocator_->Free(allocator_, part);
    }

    template <class T>
    T* of(int64_t count) {
        void* const part = allocator_->Alloc(allocator_, std::max<int64_t>(count, 1) * sizeof(T));
        if (part == nullptr) throw std::bad_alloc();
        parts_.push_back(part);
        return static_cast<T*>(part);
    }

private:
    OrtAllocator* allocator_;
    std::vector<void*> parts_;
};

template <class Body>
void parallel(Ort::KernelContext const& context, int64_t count, Body const& body) {
    auto const call = [](void* data, size_t i) { (*static_cast<Body const*>(data))(static_cast<int64_t>(i)); };
    if (count == 1) return body(0);
    context.ParallelFor(call, count, 0, const_cast<Body*>(&body));
}

class Kernel {
public:
    Kernel(OrtApi const&, OrtKernelInfo const* raw) {
        Ort::ConstKernelInfo const info(raw);
        keep_ = info.GetAttribute<int64_t>("keep");
        group_ = info.GetAttribute<int64_t>("group");
        variance_ = info.GetAttribute<int64_t>("variance") != 0;
        std::string const mode = info.GetAttribute<std::string>("shift_mode");
        auto const end = std::end(SHIFT_MODE_NAMES), found = std::find(SHIFT_MODE_NAMES, end, mode);
        if (found == end) refuse("shift_mode must be none, static, token_mean or token_median, got " + mode + ".");
        shift_mode_ = static_cast<ShiftMode>(found - SHIFT_MODE_NAMES);
        if (!(0 < keep_ && keep_ <= group_))
            refuse("keep must be from 1 to group, got " + std::to_string(keep_) + ":" + std::to_string(group_) + ".");
        char const* name = "T";
        ONNXTensorElementDataType const type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        matmul_ = Ort::Op::Create(raw, "MatMul", "", 13, &name, &type, 1, nullptr, 0, 2, 1);
        Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(raw, OrtMemTypeDefault, &allocator_));
    }
    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;
    ~Kernel() { Ort::GetApi().ReleaseAllocator(allocator_); }

    OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
        try {
            compute(Ort::KernelContext(raw));
        } catch (Ort::Exception const& error) {
            return Ort::Status(error).release();
        } catch (std::exception const& error) {
            return Ort::Status(error.what(), ORT_FAIL).release();
        }
        return nullptr;
    }

private:
    static Ort::ConstValue input(Ort::KernelContext const& context, Input which) {
        return context.GetInput(static_cast<size_t>(which));
    }

    // The numbers of an input, or null where the node has none; `shape` is what they must be.
    template <class T>
    static T const* given(Ort::KernelContext const& context, Input which, std::vector<int64_t> const& shape) {
        Ort::ConstValue const value = input(context, which);
        if (!value) return nullptr;
        if (value.GetTensorTypeAndShapeInfo().GetShape() != shape) {
            std::string text;
            for (int64_t const size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
            refuse(std::string(INPUT_NAMES[static_cast<int>(which)]) + " must be of shape [" + text + "].");
        }
        return value.GetTensorData<T>();
    }

    void compute(Ort::KernelContext const& context) {
        Ort::ConstValue const x = input(context, Input::X), w = input(context, Input::W);
        std::vector<int64_t> shape = x.GetTensorTypeAndShapeInfo().GetShape();
        std::vector<int64_t> const of_w = w.GetTensorTypeAndShapeInfo().GetShape();
        if (shape.empty() || of_w.size() != 2 || shape.back() != of_w[0]) refuse("X must be [..., K] and W [K, N].");
        Layer layer{};
        layer.k = of_w[0], layer.n = of_w[1];
        if (layer.k == 0 || layer.k % group_ != 0)
            refuse("K must be a multiple of group, got " + std::to_string(layer.k) + " and " + std::to_string(group_) +
                   ".");
        shape.pop_back();
        layer.tokens = 1;
        for (int64_t const size : shape) layer.tokens *= size;
        shape.push_back(layer.n);
        layer.keep = keep_, layer.group = group_, layer.shift_mode = shift_mode_, layer.variance = variance_;
        layer.x = x.GetTensorData<float>();
        layer.w = w.GetTensorData<float>();
        layer.bias = given<float>(context, Input::BIAS, {layer.n});
        layer.channel_scale = given<float>(context, Input::CHANNEL_SCALE, {layer.k});
        layer.shift = given<float>(context, Input::SHIFT, {layer.k});
        layer.row_sum = given<float>(context, Input::ROW_SUM, {layer.n});
        layer.permutation = given<int64_t>(context, Input::PERMUTATION, {layer.k});
        if (Ort::ConstValue const thin = input(context, Input::RESIDUAL_IN)) {
            std::vector<int64_t> const of_thin = thin.GetTensorTypeAndShapeInfo().GetShape();
            layer.rank = of_thin.size() == 2 ? of_thin[1] : 0;
            layer.residual_in = given<float>(context, Input::RESIDUAL_IN, {layer.k, layer.rank});
            layer.residual_out = given<float>(context, Input::RESIDUAL_OUT, {layer.rank, layer.n});
            if (layer.residual_out == nullptr) refuse("residual_out must be there with residual_in.");
        }
        if ((shift_mode_ == ShiftMode::STATIC) != (layer.shift != nullptr))
            refuse("shift must be there where shift_mode is static, and nowhere else.");
        bool const* const sparse = given<bool>(context, Input::SPARSE, {});
        layer.sparse = sparse == nullptr || *sparse;
        layer.y = context.GetOutput(0, shape).GetTensorMutableData<float>();
        if (layer.tokens == 0 || layer.n == 0) return;
        if (!layer.sparse) layer.rank = 0;
        if (uses_matmul(layer))
            by_matmul(context, layer, w);
        else
            by_rows(context, layer);
    }

    // Measured (benchmarks/cpu.py): where little is dropped, many tokens are faster in a GEMM that multiplies the zeros.
    static bool uses_matmul(Layer const& layer) {
        return layer.tokens >= 64 && (!layer.sparse || 4 * layer.keep > 3 * layer.group);
    }

    // Whether the tokens read their rows from where they are: from the third reading of all of W on, copying it to the
    // cache once is faster.
    static bool streams(Layer const& layer, int64_t tokens) {
        return tokens == 1 || (tokens <= cpu::STREAMED_TOKENS && layer.sparse &&
                               2 * tokens * layer.keep <= 3 * layer.group);
    }

    void by_rows(Ort::KernelContext const& context, Layer const& layer) const {
        int64_t const k = layer.k, n = layer.n, rank = layer.rank;
        // As many tokens in each chunk.
        int64_t const most = ceil_div(layer.tokens, ceil_div(layer.tokens, cpu::CHUNK));
        Memory memory(allocator_);
        auto const lists = [&](int64_t rows, int64_t block) {
            Lists found{rows, block, memory.of<int32_t>(most * rows), memory.of<float>(most * rows), nullptr};
            found.ends = memory.of<int32_t>(most * found.blocks());
            return found;
        };
        Lists const kept = lists(k, cpu::block_rows(layer));
        Lists const dropped = rank ? lists(k, cpu::PACKED_ROWS) : Lists{};
        Lists const thin = rank ? lists(rank, cpu::PACKED_ROWS) : Lists{};
        Token* const about = memory.of<Token>(most);
        float* const residual = rank ? memory.of<float>(most * n) : nullptr;
        for (int64_t first = 0; first < layer.tokens; first += most) {
            int64_t const tokens = std::min(most, layer.tokens - first);
            parallel(context, tokens, [&](int64_t t) {
                about[t] = choose(layer, first + t, {t, &kept, rank ? &dropped : nullptr, nullptr, nullptr});
                if (rank) list_thin(layer, dropped, thin, t);
            });
            bool const packed = !streams(layer, tokens);
            int64_t const width = packed ? std::clamp<int64_t>(ceil_div(n, 4 * 128) * 128, 128, cpu::PACKED_COLUMNS)
                                         : std::clamp<int64_t>(ceil_div(n, 2 * 64) * 64, 256, cpu::STREAMED_COLUMNS);
            parallel(context, ceil_div(n, width), [&](int64_t tile) {
                int64_t const column = tile * width, columns = std::min(width, n - column);
                float* const y = layer.y + first * n + column;
                product(kept, tokens, layer.w, n, column, columns, packed, y, n);
                if (rank)
                    product(thin, tokens, layer.residual_out, n, column, columns, packed, residual + column, n);
                for (int64_t t = 0; t < tokens; ++t)
                    epilogue(layer, about[t], y + t * n, rank ? residual + t * n + column : nullptr, column, columns);
            });
        }
    }

    // (z - zs) residual_in of token t, as the list of the next product.
    static void list_thin(Layer const& layer, Lists const& dropped, Lists const& thin, int64_t t) {
        int64_t const rank = layer.rank;
        Lists one = dropped;
        one.rows += t * layer.k, one.values += t * layer.k, one.ends += t * dropped.blocks();
        for (int64_t c = 0; c < rank; c += cpu::STREAMED_COLUMNS)
            product(one, 1, layer.residual_in, rank, c, std::min(cpu::STREAMED_COLUMNS, rank - c), false,
                    thin.values + t * rank + c, rank);
        for (int64_t i = 0; i < rank; ++i) thin.rows[t * rank + i] = static_cast<int32_t>(i);
        for (int64_t b = 0; b < thin.blocks(); ++b)
            thin.ends[t * thin.blocks() + b] = static_cast<int32_t>(std::min((b + 1) * thin.block, rank));
    }

    void by_matmul(Ort::KernelContext const& context, Layer const& layer, Ort::ConstValue const& w) {
        int64_t const tokens = layer.tokens, k = layer.k, n = layer.n, rank = layer.rank;
        Memory memory(allocator_);
        float* const pruned = memory.of<float>(tokens * k);
        float* const rest = rank ? memory.of<float>(tokens * k) : nullptr;
        float* const residual = rank ? memory.of<float>(tokens * n) : nullptr;
        Token* const about = memory.of<Token>(tokens);
        parallel(context, tokens, [&](int64_t t) {
            about[t] = choose(layer, t, {0, nullptr, nullptr, pruned + t * k, rank ? rest + t * k : nullptr});
        });
        multiply(context, pruned, tokens, k, w, layer.y, n);
        if (rank) {
            float* const thin = memory.of<float>(tokens * rank);
            multiply(context, rest, tokens, k, input(context, Input::RESIDUAL_IN), thin, rank);
            multiply(context, thin, tokens, rank, input(context, Input::RESIDUAL_OUT), residual, n);
        }
        parallel(context, tokens, [&](int64_t t) {
            epilogue(layer, about[t], layer.y + t * n, rank ? residual + t * n : nullptr, 0, n);
        });
    }

    // out [tokens, n] = x [tokens, k] W, by ONNX Runtime.
    void multiply(Ort::KernelContext const& context, float* x, int64_t tokens, int64_t k, Ort::ConstValue const& w,
                  float* out, int64_t n) {
        Ort::MemoryInfo const where = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        std::array<int64_t, 2> const of_x{tokens, k}, of_y{tokens, n};
        Ort::Value const left = Ort::Value::CreateTensor<float>(where, x, tokens * k, of_x.data(), 2);
        Ort::Value y = Ort::Value::CreateTensor<float>(where, out, tokens * n, of_y.data(), 2);
        std::array<OrtValue const*, 2> const inputs{static_cast<OrtValue const*>(left),
                                                    static_cast<OrtValue const*>(w)};
        std::array<OrtValue*, 1> outputs{static_cast<OrtValue*>(y)};
        matmul_.Invoke(context.GetOrtKernelContext(), inputs.data(), 2, outputs.data(), 1);
    }

    int64_t keep_, group_;
    ShiftMode shift_mode_;
    bool variance_;
    Ort::Op matmul_{nullptr};
    OrtAllocator* allocator_ = nullptr;
};

struct Op : Ort::CustomOpBase<Op, Kernel, true> {
    OrtStatusPtr CreateKernelV2(OrtApi const& api, OrtKernelInfo const* info, void** kernel) const {
        try {
            *kernel = new Kernel(api, info);
        } catch (Ort::Exception const& error) {
            return Ort::Status(error).release();
        } catch (std::exception const& error) {
            return Ort::Status(error.what(), ORT_FAIL).release();
        }
        return nullptr;
    }

    char const* GetName() const { return OP_NAME; }
    size_t GetInputTypeCount() const { return static_cast<size_t>(Input::COUNT); }
    ONNXTensorElementDataType GetInputType(size_t i) const {
        return i == static_cast<size_t>(Input::PERMUTATION) ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
               : i == static_cast<size_t>(Input::SPARSE)    ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL
                                                            : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
        return i < static_cast<size_t>(Input::BIAS) ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

}  // namespace

}  // namespace nmsparse

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               OrtApiBase const* base) {
    OrtApi const* const api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        OrtApi const* const old = base->GetApi(1);
        return old->CreateStatus(ORT_FAIL, "nmsparse: ONNX Runtime must be 1.21 or newer. Upgrade it.");
    }
    Ort::InitApi(api);
    static nmsparse::Op const op;
    try {
        // The options keep the domain, and who made them frees it no earlier.
        static Ort::CustomOpDomain const domain = [] {
            Ort::CustomOpDomain made(nmsparse::DOMAIN_NAME);
            made.Add(&op);
            return made;
        }();
        Ort::UnownedSessionOptions(options).Add(domain);
    } catch (Ort::Exception const& error) {
        return Ort::Status(error).release();
    }
    return nullptr;
}
