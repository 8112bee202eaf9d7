// Drives every method of the plugin as TensorRT does, on a machine without a GPU: the kernels are walk.cpp's, device
// pointers are host pointers. Prints what fails; the exit status is the number of failures.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../tensorrt/plugin.h"
#include "check.h"

using namespace nmsparse;
using namespace nvinfer1;

namespace nmsparse {
extern int walked_sm;
}

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace {

struct Log : ILogger, ILoggerFinder {
    std::string said;
    void log(Severity severity, char const* message) noexcept override {
        CHECK(severity == Severity::kERROR);
        said = message;
    }
    ILogger* findLogger() override { return this; }
} logger;

constexpr int32_t bit(Input input) { return 1 << int(input); }
constexpr int32_t X_W = bit(Input::X) | bit(Input::W);
constexpr int K = 128, N = 24, TOKENS = 40;

Fields good() {
    Fields fields;
    fields.keep = 2;
    fields.group = 4;
    fields.variance = 1;
    fields.shift_mode = int(ShiftMode::TOKEN_MEAN);
    fields.inputs = X_W | bit(Input::BIAS) | bit(Input::CHANNEL_SCALE) | bit(Input::ROW_SUM) | bit(Input::PERMUTATION);
    fields.gemv_tokens = 4;
    fields.sparse_tokens = 33;
    return fields;
}

IPluginCreatorV3One& creator() {
    int32_t count = 0;
    auto* const* const found = getCreators(count);
    CHECK(count == 1);
    return static_cast<IPluginCreatorV3One&>(**found);
}

using Owned = std::unique_ptr<IPluginV3>;

Owned create(std::vector<PluginField> const& given) {
    PluginFieldCollection const collection{int32_t(given.size()), given.data()};
    return Owned(creator().createPlugin("layer", &collection, TensorRTPhase::kBUILD));
}

std::vector<PluginField> as_vector(std::array<PluginField, Fields::COUNT> const& fields) {
    return {fields.begin(), fields.end()};
}

template <class Interface>
Interface& capability(IPluginV3& plugin, PluginCapabilityType type) {
    return static_cast<Interface&>(*plugin.getCapabilityInterface(type));
}

PluginTensorDesc tensor(std::vector<int> const& dims, DataType type) {
    PluginTensorDesc found{};
    found.dims.nbDims = int(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) found.dims.d[i] = dims[i];
    found.type = type;
    found.format = TensorFormat::kLINEAR;
    return found;
}

DynamicPluginTensorDesc of_profile(PluginTensorDesc const& desc) { return {desc, desc.dims, desc.dims, desc.dims}; }

std::vector<PluginTensorDesc> tensors_of(int tokens, DataType type) {
    auto const floats = DataType::kFLOAT;
    return {tensor({2, tokens / 2, K}, type), tensor({K, N}, type), tensor({N}, floats), tensor({K}, floats),
            tensor({N}, floats), tensor({K}, DataType::kINT32), tensor({2, tokens / 2, N}, type)};
}

std::vector<DynamicPluginTensorDesc> profile_of(std::vector<PluginTensorDesc> const& descs) {
    std::vector<DynamicPluginTensorDesc> found;
    for (PluginTensorDesc const& desc : descs) found.push_back(of_profile(desc));
    return found;
}

void creators_are_listed() {
    CHECK(!std::strcmp(creator().getPluginName(), "SparseLinear"));
    CHECK(!std::strcmp(creator().getPluginVersion(), "1"));
    CHECK(!std::strcmp(creator().getPluginNamespace(), "nmsparse"));
    std::set<std::string> names;
    PluginFieldCollection const* const fields = creator().getFieldNames();
    for (int i = 0; i < fields->nbFields; ++i) {
        names.insert(fields->fields[i].name);
        CHECK(fields->fields[i].type == PluginFieldType::kINT32);
    }
    CHECK(names.size() == Fields::COUNT);
}

void bad_fields_are_refused() {
    struct Case {
        int32_t Fields::*member;
        int32_t value;
        char const* said;
    };
    int32_t const garbage = std::numeric_limits<int32_t>::min();
    for (Case const& bad : {Case{&Fields::keep, 5, "keep must be 1 to group"}, {&Fields::keep, 0, "keep must be 1 to group"},
                            {&Fields::group, 0, "group must be 1 to 1024"}, {&Fields::group, 4096, "group must be 1 to 1024"},
                            {&Fields::group, garbage, "group must be 1 to 1024"},
                            {&Fields::shift_mode, 4, "shift_mode must be 0 to 3"},
                            {&Fields::shift_mode, garbage, "shift_mode must be 0 to 3"},
                            {&Fields::shift_mode, 0, "row_sum must be there"},
                            {&Fields::shift_mode, 1, "shift must be there"},
                            {&Fields::variance, 2, "variance must be 0 or 1"},
                            {&Fields::inputs, X_W, "row_sum must be there"},
                            {&Fields::inputs, 1, "inputs must have X and W"},
                            {&Fields::inputs, garbage, "inputs must be bits"},
                            {&Fields::inputs, X_W | bit(Input::ROW_SUM) | bit(Input::SPARSE), "no kernel has it yet"},
                            {&Fields::inputs, X_W | bit(Input::ROW_SUM) | bit(Input::RESIDUAL_IN), "no kernel has it yet"},
                            {&Fields::gemv_tokens, -1, "gemv_tokens must be 0 to 65535"},
                            {&Fields::gemv_tokens, 65536, "gemv_tokens must be 0 to 65535"},
                            {&Fields::sparse_tokens, -1, "sparse_tokens must not be negative"}}) {
        Fields fields = good();
        fields.*bad.member = bad.value;
        CHECK(create(as_vector(fields.as_fields())) == nullptr);
        if (logger.said.find(bad.said) == std::string::npos) std::printf("said: %s\n", logger.said.c_str());
        CHECK(logger.said.find(bad.said) != std::string::npos);
        CHECK(logger.said.find("layer: ") != std::string::npos);
        CHECK(logger.said.find(", got keep ") != std::string::npos);
    }
    Fields const fields = good();
    auto given = as_vector(fields.as_fields());
    given.pop_back();
    CHECK(create(given) == nullptr && logger.said.find("field sparse_tokens must be given.") != std::string::npos);
    given.push_back(given.front());
    CHECK(create(given) == nullptr && logger.said.find("field keep must be given once") != std::string::npos);
    given.back() = {"prune_n", &fields.keep, PluginFieldType::kINT32, 1};
    CHECK(create(given) == nullptr && logger.said.find("field prune_n must be one of the op's") != std::string::npos);
    for (PluginField const& wrong : {PluginField{"sparse_tokens", &fields.keep, PluginFieldType::kFLOAT32, 1},
                                     {"sparse_tokens", &fields.keep, PluginFieldType::kINT32, 2},
                                     {"sparse_tokens", nullptr, PluginFieldType::kINT32, 1}}) {
        given.back() = wrong;
        CHECK(create(given) == nullptr && logger.said.find("must be one 32-bit integer") != std::string::npos);
    }
    CHECK(creator().createPlugin(nullptr, nullptr, TensorRTPhase::kRUNTIME) == nullptr);
    PluginFieldCollection const none{3, nullptr};
    CHECK(creator().createPlugin("layer", &none, TensorRTPhase::kRUNTIME) == nullptr);
}

// Each by itself, when the profile is set and when a call's shapes are; numbers that an int cuts off, too.
void wrong_shapes_are_refused(IPluginV3& plugin) {
    auto& build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    auto& runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    struct Case {
        int input;
        std::vector<int64_t> dims;
        char const* said;
    };
    int64_t const wraps = int64_t(1) << 32, huge = int64_t(1) << 62;
    for (Case const& bad :
         {Case{0, {}, "X must have 2 or more dimensions and W 2, got 0 and 2"}, {0, {K}, "got 1 and 2"},
          {1, {K}, "got 3 and 1"}, {1, {}, "got 3 and 0"}, {1, {1, K, N}, "got 3 and 3"},
          {0, {2, 3, K / 2}, "a row for each of X's 64 channels"}, {1, {K + 8, N}, "a row for each of X's 128 channels"},
          {0, {2, 3, wraps + K}, "up to 1073741824 tokens and channels"}, {1, {wraps + K, N}, "a row for each"},
          {1, {K, wraps + N}, "up to 1073741824"}, {0, {wraps + 2, K}, "up to 1073741824"},
          {0, {huge, 4, K}, "got X of -1 x 128"}, {0, {huge, huge, K}, "up to 1073741824"}, {0, {-1, K}, "up to 1073741824"},
          {0, {2, 3, 0}, "up to 1073741824"}, {1, {K, 0}, "up to 1073741824"}, {2, {N - 8}, "bias must be a vector of 24"},
          {2, {1, N}, "bias must be a vector"}, {3, {wraps + K}, "channel_scale must be a vector of 128"},
          {4, {}, "row_sum must be a vector of 24"}, {5, {K - 1}, "permutation must be a vector of 128"}}) {
        auto descs = tensors_of(TOKENS, DataType::kHALF);
        Dims& dims = descs[bad.input].dims;
        dims.nbDims = int(bad.dims.size());
        std::copy(bad.dims.begin(), bad.dims.end(), dims.d);
        auto const profile = profile_of(descs);
        for (bool const is_call : {false, true}) {
            logger.said.clear();
            CHECK((is_call ? runtime.onShapeChange(descs.data(), 6, &descs[6], 1)
                           : build.configurePlugin(profile.data(), 6, &profile[6], 1)) != 0);
            if (logger.said.find(bad.said) == std::string::npos) std::printf("said: %s\n", logger.said.c_str());
            CHECK(logger.said.find(bad.said) != std::string::npos);
        }
    }
    auto const profile = profile_of(tensors_of(TOKENS, DataType::kHALF));
    CHECK(!build.supportsFormatCombination(-1, profile.data(), 6, 1));
    CHECK(!build.supportsFormatCombination(7, profile.data(), 6, 1));
}

void shapes_and_formats() {
    Owned const plugin = create(as_vector(good().as_fields()));
    auto& build = capability<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD);
    CHECK(build.getNbOutputs() == 1);
    for (DataType const type : {DataType::kHALF, DataType::kBF16}) {
        auto profile = profile_of(tensors_of(TOKENS, type));
        for (int i = 0; i < 7; ++i) CHECK(build.supportsFormatCombination(i, profile.data(), 6, 1));
        CHECK(build.configurePlugin(profile.data(), 6, &profile[6], 1) == 0);
        CHECK(build.getWorkspaceSize(profile.data(), 6, &profile[6], 1) >= TOKENS * K);
        DataType out{};
        CHECK(build.getOutputDataTypes(&out, 1, &type, 6) == 0 && out == type);
        for (int i = 0; i < 7; ++i) {  // another format or type of any one tensor
            auto other = profile;
            other[i].desc.format = TensorFormat::kCHW4;
            CHECK(!build.supportsFormatCombination(i, other.data(), 6, 1));
            other = profile;
            other[i].desc.type = DataType::kINT8;
            CHECK(!build.supportsFormatCombination(i, other.data(), 6, 1));
        }
        auto mixed = profile;
        mixed[1].desc.type = type == DataType::kHALF ? DataType::kBF16 : DataType::kHALF;
        CHECK(!build.supportsFormatCombination(1, mixed.data(), 6, 1));
        CHECK(build.getOutputDataTypes(&out, 1, &type, 5) != 0);
        CHECK(logger.said.find("a node must have 6 inputs and 1 output, got 5 and 1") != std::string::npos);
        profile[1].max.d[0] = K / 2;
        CHECK(build.configurePlugin(profile.data(), 6, &profile[6], 1) != 0);
        CHECK(logger.said.find("W must have a row for each of X's 128 channels, got W of 64 x 24") != std::string::npos);
        profile[1].max.d[0] = K;
        profile[2].max.d[0] = 1;
        CHECK(build.configurePlugin(profile.data(), 6, &profile[6], 1) != 0);
        CHECK(logger.said.find("bias must be a vector of 24") != std::string::npos);
        profile[2].max.d[0] = profile[4].max.d[0] = profile[1].max.d[1] = 20;
        CHECK(build.configurePlugin(profile.data(), 6, &profile[6], 1) != 0);
        CHECK(logger.said.find("output channels must be divisible by 8") != std::string::npos);
    }
    wrong_shapes_are_refused(*plugin);
    DimsExprs shapes[6]{}, out{};
    shapes[0].nbDims = 3;
    shapes[1].nbDims = 2;
    IDimensionExpr const* const tokens = reinterpret_cast<IDimensionExpr const*>(&shapes[2]);  // compared, never called
    IDimensionExpr const* const n = reinterpret_cast<IDimensionExpr const*>(&shapes[3]);
    shapes[0].d[1] = tokens;
    shapes[1].d[1] = n;
    IExprBuilder* const unused = reinterpret_cast<IExprBuilder*>(&shapes[4]);
    CHECK(build.getOutputShapes(shapes, 6, nullptr, 0, &out, 1, *unused) == 0);
    CHECK(out.nbDims == 3 && out.d[1] == tokens && out.d[2] == n);
    shapes[1].nbDims = 3;
    CHECK(build.getOutputShapes(shapes, 6, nullptr, 0, &out, 1, *unused) != 0);
    int32_t tactics[8];
    CHECK(build.getValidTactics(tactics, 8) != 0 && logger.said.find("room for 3 tactics, got 8") != std::string::npos);
    CHECK(build.getNbTactics() == 3 && build.getValidTactics(tactics, 3) == 0 && tactics[0] == 1 && tactics[2] == 3);
    CHECK(std::string(build.getTimingCacheID()).find("keep 2, group 4") == 0);
    CHECK(std::string(build.getMetadataString()).find("sparse_tokens 33") != std::string::npos);
}

// y by the definition, in double, with what a kernel has in 16 bits rounded.
template <class T>
std::vector<double> expected(std::vector<T> const& x, std::vector<T> const& w, std::vector<float> const& bias,
                             std::vector<float> const& scale, std::vector<float> const& row_sum,
                             std::vector<int32_t> const& permutation, int tokens) {
    std::vector<double> y;
    for (int token = 0; token < tokens; ++token) {
        double eta = 0, mean = 0, mean_kept = 0, squares = 0, squares_kept = 0;
        for (int i = 0; i < K; ++i) eta += double(widen(x[token * K + i])) / K;
        std::vector<double> z(K), kept(K, 0);
        for (int place = 0; place < K; ++place) z[place] = widen(x[token * K + permutation[place]]) - eta;
        for (int place = 0; place < K; ++place) {
            int rank = 0;
            for (int j = place / 4 * 4; j < place / 4 * 4 + 4; ++j) {
                double const a = std::abs(z[j]) * scale[permutation[j]], b = std::abs(z[place]) * scale[permutation[place]];
                rank += a > b || (a == b && j < place);
            }
            if (rank < 2) kept[place] = z[place];
        }
        for (int i = 0; i < K; ++i) {
            mean += z[i] / K;
            mean_kept += kept[i] / K;
        }
        for (int i = 0; i < K; ++i) {
            squares += (z[i] - mean) * (z[i] - mean);
            squares_kept += (kept[i] - mean_kept) * (kept[i] - mean_kept);
        }
        for (int column = 0; column < N; ++column) {
            double sum = 0;
            for (int place = 0; place < K; ++place) {
                T rounded;
                narrow(float(kept[place]), rounded);
                sum += double(widen(rounded)) * widen(w[place * N + column]);
            }
            y.push_back(std::sqrt(squares / squares_kept) * sum + eta * row_sum[column] + bias[column]);
        }
    }
    return y;
}

template <class T>
void runs(DataType type, int tokens) {
    Owned const built = create(as_vector(good().as_fields()));
    auto& first = capability<IPluginV3OneRuntime>(*built, PluginCapabilityType::kRUNTIME);
    // What an engine stores, read back as an engine is read back, cloned, and attached to a context.
    PluginFieldCollection const* const stored = first.getFieldsToSerialize();
    Owned const read(creator().createPlugin("layer", stored, TensorRTPhase::kRUNTIME));
    CHECK(read != nullptr);
    auto& reread = capability<IPluginV3OneRuntime>(*read, PluginCapabilityType::kRUNTIME);
    CHECK(reread.setTactic(2) == 0 && reread.setTactic(4) != 0 && reread.setTactic(0) == 0);
    Owned const clone(read->clone());
    Owned const attached(
        capability<IPluginV3OneRuntime>(*clone, PluginCapabilityType::kRUNTIME).attachToContext(nullptr));
    auto& runtime = capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
    auto& build = capability<IPluginV3OneBuild>(*attached, PluginCapabilityType::kBUILD);

    uint32_t state = 1;
    auto const random = [&] { return float((state = state * 1664525 + 1013904223) >> 8) / float(1 << 23) - 0.8F; };
    std::vector<T> x(tokens * K), w(K * N), y(tokens * N);
    std::vector<float> bias(N), scale(K), row_sum(N);
    std::vector<int32_t> permutation(K);
    for (auto& value : x) narrow(random(), value);
    for (auto& value : w) narrow(random(), value);
    for (auto& value : bias) value = random();
    for (auto& value : scale) value = 1.5F + random();
    for (auto& value : row_sum) value = random();
    for (int i = 0; i < K; ++i) permutation[i] = (i * 37 + 5) % K;

    auto const descs = tensors_of(tokens, type);
    auto const profile = profile_of(descs);
    // Exactly so large: the address sanitizer sees what is written beyond it.
    size_t const bytes = build.getWorkspaceSize(profile.data(), 6, &profile[6], 1);
    std::unique_ptr<void, decltype(&std::free)> const workspace(std::aligned_alloc(256, bytes), &std::free);
    std::memset(workspace.get(), 0x77, bytes);
    void const* const inputs[] = {x.data(), w.data(), bias.data(), scale.data(), row_sum.data(), permutation.data()};
    void* const outputs[] = {y.data()};
    CHECK(runtime.onShapeChange(descs.data(), 6, &descs[6], 1) == 0);
    CHECK(runtime.enqueue(descs.data(), &descs[6], inputs, outputs, workspace.get(), nullptr) == 0);
    auto const wanted = expected(x, w, bias, scale, row_sum, permutation, tokens);
    double worst = 0;
    for (size_t i = 0; i < wanted.size(); ++i)
        worst = std::max(worst, std::abs(widen(y[i]) - wanted[i]) / (1 + std::abs(wanted[i])));
    double const limit = type == DataType::kHALF ? 1.0 / 1024 : 1.0 / 128;
    if (!(worst < limit)) std::printf("type %d, %d tokens: %g\n", int(type), tokens, worst);
    CHECK(worst < limit);
}

}  // namespace

int main() {
    setLoggerFinder(&logger);
    creators_are_listed();
    bad_fields_are_refused();
    shapes_and_formats();
    for (int const sm : {80, 90})
        for (int const tokens : {2, 4, 6, 32, 34, TOKENS, 130}) {  // both sides of each threshold
            walked_sm = sm;
            runs<__half>(DataType::kHALF, tokens);
            runs<__nv_bfloat16>(DataType::kBF16, tokens);
        }
    setLoggerFinder(nullptr);
    Fields wrong = good();
    wrong.keep = 0;
    CHECK(create(as_vector(wrong.as_fields())) == nullptr);  // and no crash without a logger
    std::printf("%d failed\n", failures);
    return failures;
}
