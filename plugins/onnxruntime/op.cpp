// The op SparseLinear for ONNX Runtime's CPU provider, in float32, with W in that or in fewer bits. What it means is in
// docs/format.md.
//
// A call of tokens goes, in chunks, through `choose` (parallel over tokens), `product` (over tiles of columns and parts
// of the rows) and `epilogue` (at once where a tile has one part). Threads and memory are ONNX Runtime's.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../kernels/cpu/layer.h"
#include "huge_pages.h"

namespace nmsparse {

namespace {

using cpu::ceil_div;
using cpu::Layer;
using cpu::Lists;
using cpu::Token;

constexpr int64_t WORTH_WAKING = 1 << 15;  // numbers: to choose among fewer takes less time than to wake a thread

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
void parallel(Ort::KernelContext const& context, int64_t count, bool worth, Body const& body) {
    if (count == 1 || !worth) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    auto const call = [](void* data, size_t i) { (*static_cast<Body const*>(data))(static_cast<int64_t>(i)); };
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
        int constant = 0;
        Ort::ConstValue const w = info.GetTensorConstantInput(static_cast<size_t>(Input::W), &constant);
        if (constant)
            w_ = in_huge_pages(w.GetTensorRawData(), cpu::bytes(kind(w), w.GetTensorTypeAndShapeInfo().GetElementCount()));
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
        layer.w = weight(context, w, layer.k, layer.n);
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
        multiply(context, layer);
    }

    static cpu::Kind kind(Ort::ConstValue const& w) {
        switch (w.GetTensorTypeAndShapeInfo().GetElementType()) {
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return cpu::Kind::FLOAT;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return cpu::Kind::FLOAT16;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return cpu::Kind::BFLOAT16;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return cpu::Kind::INT8;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4: return cpu::Kind::INT4;
            default: refuse("W must be of float32, float16, bfloat16, int8 or int4.");
        }
    }

    cpu::Weight weight(Ort::KernelContext const& context, Ort::ConstValue const& w, int64_t k, int64_t n) const {
        cpu::Weight found{kind(w), w_ == nullptr ? w.GetTensorRawData() : w_.get(), n, nullptr, k};
        Ort::ConstValue const scale = input(context, Input::WEIGHT_SCALE);
        bool const integers = found.kind == cpu::Kind::INT8 || found.kind == cpu::Kind::INT4;
        if (integers != static_cast<bool>(scale))
            refuse("weight_scale must be there where W is of integers, and nowhere else.");
        if (found.kind == cpu::Kind::INT4 && n % 2 != 0) refuse("W of int4 must have an even N, got " + std::to_string(n) + ".");
        if (!scale) return found;
        std::vector<int64_t> const shape = scale.GetTensorTypeAndShapeInfo().GetShape();
        if (shape.size() != 2 || shape[0] < 1 || shape[1] != n || k % shape[0] != 0)
            refuse("weight_scale must be of shape [B, N], with B a divisor of K.");
        found.scale = scale.GetTensorData<float>(), found.rows = k / shape[0];
        if (found.rows != k && found.rows % 16 != 0)
            refuse("K / B must be K or a multiple of 16, got " + std::to_string(found.rows) + ".");
        return found;
    }

    void multiply(Ort::KernelContext const& context, Layer const& layer) const {
        int64_t const k = layer.k, n = layer.n, rank = layer.rank;
        // As many tokens in each chunk.
        int64_t const most = ceil_div(layer.tokens, ceil_div(layer.tokens, cpu::CHUNK));
        Memory memory(allocator_);
        auto const lists = [&](int64_t rows, int64_t block, bool listed) {
            int64_t const capacity = cpu::round_up(rows, cpu::STEP);
            Lists found{rows, capacity, block, nullptr, memory.of<float>(most * capacity), nullptr};
            if (!listed) return found;
            found.rows = memory.of<int32_t>(most * capacity);
            found.ends = memory.of<int32_t>(most * found.blocks());
            return found;
        };
        cpu::Way const way = cpu::way(layer, most);
        bool const listed = way != cpu::Way::HELD;
        Lists const kept = lists(k, cpu::block_rows(layer), listed);
        Lists const dropped = rank ? lists(k, cpu::MOST_ROWS, true) : Lists{};
        Lists const thin = rank ? lists(rank, cpu::MOST_ROWS, listed) : Lists{};
        Token* const about = memory.of<Token>(most);
        cpu::Cut const cut = cpu::cut(way, kept, most, layer.w);
        float* const partial = cut.parts > 1 ? memory.of<float>(cut.parts * most * n) : nullptr;
        float* const residual = rank ? memory.of<float>(most * n) : nullptr;
        for (int64_t first = 0; first < layer.tokens; first += most) {
            int64_t const tokens = std::min(most, layer.tokens - first);
            parallel(context, tokens, tokens * k >= WORTH_WAKING, [&](int64_t t) {
                about[t] = choose(layer, first + t, {t, &kept, rank ? &dropped : nullptr});
                if (rank) list_thin(layer, dropped, thin, t);
            });
            int64_t const tiles = ceil_div(n, cut.columns), size = tokens * n;
            float* const parts = cut.parts > 1 ? partial : layer.y + first * n;
            auto const piece = [&](int64_t i) {
                int64_t const column = i % tiles * cut.columns;
                return cpu::Piece{column, std::min(cut.columns, n - column), i / tiles};
            };
            auto const end = [&](int64_t i) {
                cpu::Piece const p = piece(i);
                float* const extra = rank ? residual + p.column : nullptr;
                if (rank) product(way, thin, tokens, numbers(layer.residual_out, n), {cut.columns, 1}, p, extra, n);
                for (int64_t t = 0; t < tokens; ++t)
                    epilogue(layer, about[t], parts + t * n + p.column, cut.parts, size, rank ? extra + t * n : nullptr,
                             p.column, p.columns, layer.y + (first + t) * n + p.column);
            };
            parallel(context, tiles * cut.parts, true, [&](int64_t i) {
                cpu::Piece const p = piece(i);
                product(way, kept, tokens, layer.w, cut, p, parts + p.part * size + p.column, n);
                if (cut.parts == 1) end(i);
            });
            if (cut.parts > 1) parallel(context, tiles, rank || size >= WORTH_WAKING, end);
        }
    }

    static cpu::Weight numbers(float const* w, int64_t n) { return {cpu::Kind::FLOAT, w, n, nullptr, 0}; }

    // (z - zs) residual_in of token t, as the list of the next product.
    static void list_thin(Layer const& layer, Lists const& dropped, Lists const& thin, int64_t t) {
        int64_t const rank = layer.rank;
        Lists one = dropped;
        one.rows += t * dropped.capacity, one.values += t * dropped.capacity, one.ends += t * dropped.blocks();
        float* const values = thin.values + t * thin.capacity;
        cpu::Cut const cut{1024, 1};
        for (int64_t c = 0; c < rank; c += cut.columns)
            product(cpu::Way::STREAMED, one, 1, numbers(layer.residual_in, rank), cut,
                    {c, std::min(cut.columns, rank - c), 0}, values + c, rank);
        std::fill(values + rank, values + thin.capacity, 0.0F);
        if (thin.rows == nullptr) return;
        for (int64_t i = 0; i < rank; ++i) thin.rows[t * thin.capacity + i] = static_cast<int32_t>(i);
        for (int64_t b = 0; b < thin.blocks(); ++b)
            thin.ends[t * thin.blocks() + b] = static_cast<int32_t>(std::min((b + 1) * thin.block, rank));
    }

    int64_t keep_, group_;
    ShiftMode shift_mode_;
    bool variance_;
    OrtAllocator* allocator_ = nullptr;
    std::shared_ptr<void const> w_;  // null where W is read from where it is
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
               : i == static_cast<size_t>(Input::W)         ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED  // any
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
