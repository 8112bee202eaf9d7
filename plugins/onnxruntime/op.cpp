// The op SparseLinear for ONNX Runtime's CPU provider, in float32, with W in that or in fewer bits. What it means is in
// docs/format.md.
//
// A call is run by `run_layer` of kernels/cpu, with ONNX Runtime's threads and memory.
//
// Nothing of a node is trusted that is an index, a count or a shape: `Kernel` checks what is constant when the session
// is made, and every call the rest, before anything is written.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "../kernels/cpu/layer.h"
#include "huge_pages.h"

namespace nmsparse {

namespace {

using cpu::Layer;

using Shape = std::vector<int64_t>;
// What a node has of each input; null where it has none.
using Values = std::array<Ort::ConstValue, static_cast<size_t>(Input::COUNT)>;

constexpr int64_t MOST_CHANNELS = 1 << 30;  // whose numbers are 32-bit integers, with room for the last vector

[[noreturn]] void refuse(std::string const& what) {
    throw Ort::Exception("nmsparse::SparseLinear: " + what, ORT_INVALID_ARGUMENT);
}

// Runs `body` for ONNX Runtime, which is C: whatever is thrown becomes a status.
template <class Body>
OrtStatusPtr status_of(Body const& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (Ort::Exception const& error) {
        return Ort::Status(error).release();
    } catch (std::bad_alloc const&) {
        return Ort::Status("nmsparse::SparseLinear: there must be memory for the call, got none.", ORT_FAIL).release();
    } catch (std::exception const& error) {
        return Ort::Status(error.what(), ORT_FAIL).release();
    }
}

char const* name_of(Input which) { return INPUT_NAMES[static_cast<size_t>(which)]; }

Shape shape_of(Ort::ConstValue const& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }
int64_t count_of(Ort::ConstValue const& value) { return value.GetTensorTypeAndShapeInfo().GetElementCount(); }

std::string text(Shape const& shape) {
    std::string found;
    for (int64_t const size : shape) found += (found.empty() ? "" : ", ") + std::to_string(size);
    return "[" + found + "]";
}

// A user's bytes, as a C string and UTF-8 can hold them.
std::string text(std::string const& bytes) {
    std::string found;
    for (unsigned char const byte : bytes) {
        char escaped[5];
        std::snprintf(escaped, sizeof escaped, byte < ' ' || byte > '~' ? "\\x%02x" : "%c", byte);
        found += escaped;
    }
    return "\"" + found + "\"";
}

template <class T>
T attribute(Ort::ConstKernelInfo const& info, char const* name, char const* type) {
    try {
        return info.GetAttribute<T>(name);
    } catch (Ort::Exception const& error) {
        refuse(std::string(name) + " must be " + type + ", got: " + error.what());
    }
}

// Memory of one call or one node, from the allocator of the session.
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

// ONNX Runtime's memory and threads for one call.
class OfCall final : public cpu::Host {
public:
    OfCall(Ort::KernelContext const& context, Memory& memory) : context_(context), memory_(memory) {}

    void* memory(int64_t bytes) override { return memory_.of<char>(bytes); }

    // Of what several threads throw, which ONNX Runtime's must not see, one is thrown on.
    void parallel(int64_t count, bool worth, cpu::Body const& body) override {
        if (count == 1 || !worth) {
            for (int64_t i = 0; i < count; ++i) body(i);
            return;
        }
        struct Work {
            cpu::Body const& body;
            std::mutex mutex;
            std::exception_ptr error;
        } work{body, {}, nullptr};
        auto const call = [](void* data, size_t i) {
            Work& work = *static_cast<Work*>(data);
            try {
                work.body(static_cast<int64_t>(i));
            } catch (...) {
                std::lock_guard<std::mutex> const lock(work.mutex);
                work.error = std::current_exception();
            }
        };
        context_.ParallelFor(call, count, 0, &work);
        if (work.error != nullptr) std::rethrow_exception(work.error);
    }

private:
    Ort::KernelContext const& context_;
    Memory& memory_;
};

// Refuses what does not hold every number from 0 to `count` - 1 once.
void check_permutation(int64_t const* entries, int64_t count, OrtAllocator* allocator) {
    Memory memory(allocator);
    bool* const found = memory.of<bool>(count);
    std::fill(found, found + count, false);
    for (int64_t i = 0; i < count; ++i) {
        int64_t const entry = entries[i];
        bool const is_channel = 0 <= entry && entry < count;
        if (!is_channel || found[entry])
            refuse("permutation must hold every channel from 0 to " + std::to_string(count - 1) + " once, got " +
                   std::to_string(entry) + (is_channel ? " again" : "") + " at place " + std::to_string(i) + ".");
        found[entry] = true;
    }
}

class Kernel {
public:
    explicit Kernel(OrtKernelInfo const* raw) : allocator_(allocator_of(raw)), copies_(allocator_.get()) {
        Ort::ConstKernelInfo const info(raw);
        keep_ = attribute<int64_t>(info, "keep", "an integer");
        group_ = attribute<int64_t>(info, "group", "an integer");
        if (!(0 < keep_ && keep_ <= group_))
            refuse("keep must be from 1 to group, got " + std::to_string(keep_) + ":" + std::to_string(group_) + ".");
        int64_t const variance = attribute<int64_t>(info, "variance", "an integer");
        if (variance != 0 && variance != 1) refuse("variance must be 0 or 1, got " + std::to_string(variance) + ".");
        variance_ = variance != 0;
        std::string const mode = attribute<std::string>(info, "shift_mode", "a string");
        auto const end = std::end(SHIFT_MODE_NAMES), found = std::find(SHIFT_MODE_NAMES, end, mode);
        if (found == end)
            refuse("shift_mode must be none, static, token_mean or token_median, got " + text(mode) + ".");
        shift_mode_ = static_cast<ShiftMode>(found - SHIFT_MODE_NAMES);
        Values constants{};
        for (size_t i = 0; i < std::min(info.GetInputCount(), has_.size()); ++i) {
            has_[i] = !info.GetInputName(i).empty();
            int constant = 0;
            Ort::ConstValue const value = has_[i] ? info.GetTensorConstantInput(i, &constant) : Ort::ConstValue{};
            if (constant) constants[i] = value;
            if (constant && i != static_cast<size_t>(Input::W)) kept_[i] = placed(static_cast<Input>(i), value, copies_);
        }
        expect(Input::SHIFT, shift_mode_ == ShiftMode::STATIC, "shift_mode is static");
        expect(Input::ROW_SUM, shift_mode_ == ShiftMode::TOKEN_MEAN || shift_mode_ == ShiftMode::TOKEN_MEDIAN,
               "shift_mode is token_mean or token_median");
        expect(Input::RESIDUAL_OUT, has(Input::RESIDUAL_IN), "residual_in is");
        if (Ort::ConstValue const w = of(constants, Input::W)) {
            described(constants, copies_);
            w_ = in_huge_pages(w.GetTensorRawData(), cpu::bytes(kind(w), count_of(w)));
            kept_[static_cast<size_t>(Input::W)] = w_ == nullptr ? placed(Input::W, w, copies_) : w_.get();
        }
        if (Ort::ConstValue const order = of(constants, Input::PERMUTATION))
            check_permutation(numbers_of<int64_t>(constants, Input::PERMUTATION, copies_), count_of(order), allocator_.get());
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
        return status_of([&] { compute(Ort::KernelContext(raw)); });
    }

private:
    static Ort::ConstValue of(Values const& values, Input which) { return values[static_cast<size_t>(which)]; }

    bool has(Input which) const { return has_[static_cast<size_t>(which)]; }

    void expect(Input which, bool wanted, std::string const& where) const {
        if (has(which) != wanted)
            refuse(std::string(name_of(which)) + " must be there where " + where + ", and nowhere else, got " +
                   (wanted ? "none" : "one") + ".");
    }

    // Where the numbers of an input are: in a copy where they do not lie as their type must, which no file sees to.
    static void const* placed(Input which, Ort::ConstValue const& value, Memory& memory) {
        void const* const data = value.GetTensorRawData();
        int64_t const count = count_of(value);
        size_t const width = which == Input::PERMUTATION ? sizeof(int64_t)
                             : which == Input::SPARSE    ? 1
                             : which == Input::W         ? std::max<size_t>(cpu::bytes(kind(value), 1), 1)
                                                         : sizeof(float);
        if (reinterpret_cast<uintptr_t>(data) % width == 0) return data;
        void* const copy = memory.of<char>(width * count);
        return std::memcpy(copy, data, width * count);
    }

    template <class T>
    T const* numbers_of(Values const& values, Input which, Memory& memory) const {
        void const* const kept = kept_[static_cast<size_t>(which)];
        return static_cast<T const*>(kept == nullptr ? placed(which, of(values, which), memory) : kept);
    }

    // The numbers of an input, or null where there are none; `shape` is what they must be.
    template <class T = float>
    T const* given(Values const& values, Input which, Shape const& shape, Memory& memory) const {
        Ort::ConstValue const value = of(values, which);
        if (!value) return nullptr;
        if (Shape const found = shape_of(value); found != shape)
            refuse(std::string(name_of(which)) + " must be of shape " + text(shape) + ", got " + text(found) + ".");
        return numbers_of<T>(values, which, memory);
    }

    // The layer that the inputs but X make, without W's numbers. When the session is made, those are there that are
    // constant, W among them.
    Layer described(Values const& values, Memory& memory) const {
        Ort::ConstValue const w = of(values, Input::W), thin = of(values, Input::RESIDUAL_IN);
        Shape const of_w = shape_of(w);
        if (of_w.size() != 2) refuse("W must be of shape [K, N], got " + text(of_w) + ".");
        Layer layer{};
        layer.k = of_w[0], layer.n = of_w[1];
        if (layer.k < 1 || layer.k > MOST_CHANNELS)
            refuse("K must be from 1 to " + std::to_string(MOST_CHANNELS) + ", got " + std::to_string(layer.k) + ".");
        if (layer.k % group_ != 0)
            refuse("K must be a multiple of group, got " + std::to_string(layer.k) + " and " + std::to_string(group_) +
                   ".");
        layer.keep = keep_, layer.group = group_, layer.shift_mode = shift_mode_, layer.variance = variance_;
        layer.w = weight(values, layer.k, layer.n, memory);
        layer.bias = given(values, Input::BIAS, {layer.n}, memory);
        layer.channel_scale = given(values, Input::CHANNEL_SCALE, {layer.k}, memory);
        layer.shift = given(values, Input::SHIFT, {layer.k}, memory);
        layer.row_sum = given(values, Input::ROW_SUM, {layer.n}, memory);
        layer.permutation = given<int64_t>(values, Input::PERMUTATION, {layer.k}, memory);
        if (!thin) return layer;
        Shape const of_thin = shape_of(thin);
        layer.rank = of_thin.size() == 2 ? of_thin[1] : 0;
        if (layer.rank > MOST_CHANNELS)
            refuse("r must be at most " + std::to_string(MOST_CHANNELS) + ", got " + std::to_string(layer.rank) + ".");
        layer.residual_in = given(values, Input::RESIDUAL_IN, {layer.k, layer.rank}, memory);
        layer.residual_out = given(values, Input::RESIDUAL_OUT, {layer.rank, layer.n}, memory);
        return layer;
    }

    void compute(Ort::KernelContext const& context) {
        Values values{};
        for (size_t i = 0; i < values.size(); ++i) {
            if (has_[i]) values[i] = context.GetInput(i);
            if (has_[i] && !values[i]) refuse(std::string(INPUT_NAMES[i]) + " must be there, got none.");
        }
        Memory memory(allocator_.get());
        Layer layer = described(values, memory);
        layer.w.data = numbers_of<void>(values, Input::W, memory);
        Ort::ConstValue const x = of(values, Input::X);
        Shape shape = shape_of(x);
        if (shape.empty() || shape.back() != layer.k)
            refuse("X must be of shape [..., " + std::to_string(layer.k) + "], got " + text(shape) + ".");
        if (layer.permutation != nullptr && kept_[static_cast<size_t>(Input::PERMUTATION)] == nullptr)
            check_permutation(layer.permutation, layer.k, allocator_.get());
        layer.tokens = count_of(x) / layer.k;
        layer.x = numbers_of<float>(values, Input::X, memory);
        // A byte, because a bool that is neither 0 nor 1 is none.
        auto const* const sparse = given<uint8_t>(values, Input::SPARSE, {}, memory);
        layer.sparse = sparse == nullptr || *sparse != 0;
        shape.back() = layer.n;
        layer.y = context.GetOutput(0, shape).GetTensorMutableData<float>();
        if (layer.tokens == 0 || layer.n == 0) return;
        if (!layer.sparse) layer.rank = 0;
        OfCall host(context, memory);
        run_layer(layer, host);
    }

    static cpu::Kind kind(Ort::ConstValue const& w) {
        switch (w.GetTensorTypeAndShapeInfo().GetElementType()) {
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return cpu::Kind::FLOAT;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return cpu::Kind::FLOAT16;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return cpu::Kind::BFLOAT16;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return cpu::Kind::INT8;
            case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4: return cpu::Kind::INT4;
            default: refuse("W must be of float32, float16, bfloat16, int8 or int4, got another type.");
        }
    }

    cpu::Weight weight(Values const& values, int64_t k, int64_t n, Memory& memory) const {
        Ort::ConstValue const w = of(values, Input::W), scale = of(values, Input::WEIGHT_SCALE);
        cpu::Weight found{kind(w), nullptr, n, nullptr, k};
        expect(Input::WEIGHT_SCALE, found.kind == cpu::Kind::INT8 || found.kind == cpu::Kind::INT4, "W is of integers");
        if (found.kind == cpu::Kind::INT4 && n % 2 != 0) refuse("W of int4 must have an even N, got " + std::to_string(n) + ".");
        if (!scale) return found;
        Shape const shape = shape_of(scale);
        if (shape.size() != 2 || shape[0] < 1 || shape[1] != n || k % shape[0] != 0)
            refuse("weight_scale must be of shape [B, " + std::to_string(n) + "], with B a divisor of " + std::to_string(k) +
                   ", got " + text(shape) + ".");
        found.scale = numbers_of<float>(values, Input::WEIGHT_SCALE, memory), found.rows = k / shape[0];
        if (found.rows != k && found.rows % 16 != 0)
            refuse("K / B must be K or a multiple of 16, got " + std::to_string(found.rows) + ".");
        return found;
    }

    struct Release {
        void operator()(OrtAllocator* allocator) const { Ort::GetApi().ReleaseAllocator(allocator); }
    };

    static OrtAllocator* allocator_of(OrtKernelInfo const* info) {
        OrtAllocator* found = nullptr;
        Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAllocator(info, OrtMemTypeDefault, &found));
        return found;
    }

    int64_t keep_, group_;
    ShiftMode shift_mode_;
    bool variance_;
    std::array<bool, static_cast<size_t>(Input::COUNT)> has_{};          // whether the node has an input
    std::array<void const*, static_cast<size_t>(Input::COUNT)> kept_{};  // its numbers where it is constant; then checked
    std::unique_ptr<OrtAllocator, Release> allocator_;
    Memory copies_;
    std::shared_ptr<void const> w_;  // in huge pages; null where W is read from where it is
};

struct Op : Ort::CustomOpBase<Op, Kernel, true> {
    OrtStatusPtr CreateKernelV2(OrtApi const&, OrtKernelInfo const* info, void** kernel) const {
        return status_of([&] { *kernel = new Kernel(info); });
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
    return nmsparse::status_of([&] {
        // The options keep the domain, and who made them frees it no earlier.
        static Ort::CustomOpDomain const domain = [] {
            Ort::CustomOpDomain made(nmsparse::DOMAIN_NAME);
            made.Add(&op);
            return made;
        }();
        Ort::UnownedSessionOptions(options).Add(domain);
    });
}
