#include "plugin.h"

#include <algorithm>

#include "log.h"

namespace nmsparse {

using namespace nvinfer1;

namespace {

constexpr int REFUSED = -1;

// The sizes of a call, which TensorRT counts in 64 bits.
struct Sizes {
    int64_t tokens = 1, k = 0, n = 0;

    Sizes(Dims const& x, Dims const& w) : k(x.d[x.nbDims - 1]), n(w.d[1]) {
        for (int i = 0; i + 1 < x.nbDims; ++i)
            if (__builtin_mul_overflow(tokens, x.d[i], &tokens)) tokens = -1;
    }

    bool fit() const { return 0 <= tokens && tokens <= MOST && 0 < k && k <= MOST && 0 < n && n <= MOST; }
};

class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit Plugin(Fields const& fields) : fields_(fields), stored_(fields_.as_fields()), text_(fields_.text()) {
        collection_ = {Fields::COUNT, stored_.data()};
    }

    Plugin(Plugin const& other) : Plugin(other.fields_) { tile_ = other.tile_; }
    Plugin& operator=(Plugin const&) = delete;

    // IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override {
        try {
            return new Plugin(*this);
        } catch (std::exception const& error) {
            log_error(error.what());
            return nullptr;
        }
    }

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override { return OP_NAME; }
    char const* getPluginVersion() const noexcept override { return OP_VERSION; }
    char const* getPluginNamespace() const noexcept override { return DOMAIN_NAME; }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return 1; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t output_count, DataType const* inputs,
                               int32_t input_count) const noexcept override {
        if (!counted(input_count, output_count)) return REFUSED;
        outputs[0] = inputs[0];
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t, DimsExprs* outputs,
                            int32_t output_count, IExprBuilder&) noexcept override {
        if (!counted(input_count, output_count)) return REFUSED;
        if (inputs[0].nbDims < 2 || inputs[1].nbDims != 2)
            return refuse("X must have 2 or more dimensions and W 2, got " + std::to_string(inputs[0].nbDims) + " and " +
                          std::to_string(inputs[1].nbDims));
        outputs[0] = inputs[0];
        outputs[0].d[outputs[0].nbDims - 1] = inputs[1].d[1];
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t input_count,
                                   int32_t output_count) noexcept override {
        if (!counted(input_count, output_count) || position < 0 || position > input_count) return false;
        PluginTensorDesc const& tensor = tensors[position].desc;
        if (tensor.format != TensorFormat::kLINEAR) return false;
        if (position == 0) return tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
        if (position == fields_.index_of(Input::W) || position == input_count) return tensor.type == tensors[0].desc.type;
        return tensor.type == (position == fields_.index_of(Input::PERMUTATION) ? DataType::kINT32 : DataType::kFLOAT);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count, DynamicPluginTensorDesc const*,
                            int32_t output_count) noexcept override {
        if (!counted(input_count, output_count)) return REFUSED;
        std::string const wrong = fault([&](int i) -> Dims const& { return inputs[i].max; });
        return wrong.empty() ? 0 : refuse(wrong);
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        Sizes const sizes(inputs[0].max, inputs[1].max);
        return workspace_bytes(layer(sizes), int(sizes.tokens));
    }

    // TensorRT numbers the tactics of a plugin from 1 on.
    int32_t getNbTactics() noexcept override { return int32_t(Tile::COUNT); }

    int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override {
        if (count != getNbTactics()) return refuse("there must be room for 3 tactics, got " + std::to_string(count));
        for (int32_t i = 0; i < count; ++i) tactics[i] = i + 1;
        return 0;
    }

    char const* getTimingCacheID() noexcept override { return text_.c_str(); }
    char const* getMetadataString() noexcept override { return text_.c_str(); }

    // IPluginV3OneRuntime
    int32_t setTactic(int32_t tactic) noexcept override {
        if (tactic < 0 || tactic > int32_t(Tile::COUNT)) return refuse("tactic must be 0 to 3, got " + std::to_string(tactic));
        tile_ = tactic == 0 ? Tile::WIDE : Tile(tactic - 1);
        return 0;
    }

    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t input_count, PluginTensorDesc const*,
                          int32_t output_count) noexcept override {
        if (!counted(input_count, output_count)) return REFUSED;
        std::string const wrong = fault([&](int i) -> Dims const& { return inputs[i].dims; });
        return wrong.empty() ? 0 : refuse(wrong);
    }

    int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*, void const* const* input, void* const* output,
                    void* workspace, cudaStream_t stream) noexcept override {
        auto const at = [&](Input which) { return fields_.index_of(which) < 0 ? nullptr : input[fields_.index_of(which)]; };
        auto const floats = [&](Input which) { return static_cast<float const*>(at(which)); };
        Tensors const tensors{at(Input::X),          at(Input::W),         floats(Input::BIAS), floats(Input::CHANNEL_SCALE),
                              floats(Input::SHIFT),  floats(Input::ROW_SUM),
                              static_cast<int32_t const*>(at(Input::PERMUTATION)), output[0]};
        Sizes const sizes(inputs[0].dims, inputs[1].dims);  // onShapeChange has seen them
        Layer const described = layer(sizes);
        int const tokens = int(sizes.tokens);
        cudaError_t const error = inputs[0].type == DataType::kHALF
                                      ? run_layer<__half>(described, tensors, tokens, tile_, workspace, stream)
                                      : run_layer<__nv_bfloat16>(described, tensors, tokens, tile_, workspace, stream);
        return error == cudaSuccess ? 0 : refuse("a kernel did not start, CUDA error " + std::to_string(int(error)));
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

private:
    Layer layer(Sizes const& sizes) const { return fields_.layer(int(sizes.k), int(sizes.n), sm_); }

    // What is wrong with the inputs, whose shapes are dims(0), dims(1), ..., or nothing.
    template <class DimsOf>
    std::string fault(DimsOf const& dims) const {
        Dims const &x = dims(0), &w = dims(1);
        if (x.nbDims < 2 || w.nbDims != 2)
            return "X must have 2 or more dimensions and W 2, got " + std::to_string(x.nbDims) + " and " +
                   std::to_string(w.nbDims);
        Sizes const sizes(x, w);
        std::string const of_w = std::to_string(w.d[0]) + " x " + std::to_string(sizes.n);
        if (!sizes.fit())
            return "X and W must have up to " + std::to_string(MOST) + " tokens and channels, got X of " +
                   std::to_string(sizes.tokens) + " x " + std::to_string(sizes.k) + " and W of " + of_w;
        if (w.d[0] != sizes.k)
            return "W must have a row for each of X's " + std::to_string(sizes.k) + " channels, got W of " + of_w;
        for (int i = int(Input::BIAS); i <= int(Input::PERMUTATION); ++i) {
            int const at = fields_.index_of(Input(i));
            int64_t const wanted = Input(i) == Input::BIAS || Input(i) == Input::ROW_SUM ? sizes.n : sizes.k;
            if (at >= 0 && (dims(at).nbDims != 1 || dims(at).d[0] != wanted))
                return std::string(INPUT_NAMES[i]) + " must be a vector of " + std::to_string(wanted);
        }
        char const* const wrong = refusal(layer(sizes));
        return wrong == nullptr ? "" : wrong + std::string(", got W of ") + of_w;
    }

    bool counted(int32_t inputs, int32_t outputs) const {
        if (inputs == fields_.input_count() && outputs == 1) return true;
        refuse("a node must have " + std::to_string(fields_.input_count()) + " inputs and 1 output, got " +
               std::to_string(inputs) + " and " + std::to_string(outputs));
        return false;
    }

    int32_t refuse(std::string const& what) const {
        log_error(what + " (" + text_ + ").");
        return REFUSED;
    }

    Fields fields_;
    std::array<PluginField, Fields::COUNT> stored_;  // point into fields_
    PluginFieldCollection collection_;
    std::string text_;
    Tile tile_ = Tile::WIDE;
    int sm_ = compute_capability();  // of the device that TensorRT builds for, or reads the engine for
};

}  // namespace

std::unique_ptr<IPluginV3> make_plugin(Fields const& fields) { return std::make_unique<Plugin>(fields); }

}  // namespace nmsparse
