// What TensorRT finds in the library: the creator of the plugin, and where it hands its logger over.
#include <NvInferVersion.h>

#include <atomic>
#include <string>

#include "log.h"
#include "plugin.h"

namespace nmsparse {

using namespace nvinfer1;

namespace {

std::atomic<ILoggerFinder*> logger_finder{nullptr};  // TensorRT's own way: one for the library

class Creator : public IPluginCreatorV3One {
public:
    Creator() {
        for (int i = 0; i < Fields::COUNT; ++i) names_[i] = {Fields::NAMES[i], nullptr, PluginFieldType::kINT32, 1};
        collection_ = {Fields::COUNT, names_.data()};
    }

    IPluginV3* createPlugin(char const* name, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
        try {
            Fields fields;
            std::string const wrong = Fields::read(given, fields);
            if (wrong.empty()) return make_plugin(fields).release();
            log_error(std::string(name == nullptr ? "(no name)" : name) + ": " + wrong +
                      ". Convert the model again with this version of nmsparse.");
        } catch (std::exception const& error) {
            log_error(error.what());
        }
        return nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    char const* getPluginName() const noexcept override { return OP_NAME; }
    char const* getPluginVersion() const noexcept override { return OP_VERSION; }
    char const* getPluginNamespace() const noexcept override { return DOMAIN_NAME; }

private:
    std::array<PluginField, Fields::COUNT> names_;
    PluginFieldCollection collection_;
};

}  // namespace

void log_error(std::string const& what) {
    ILoggerFinder* const finder = logger_finder;
    ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr) logger->log(ILogger::Severity::kERROR, ("nmsparse: " + what).c_str());
}

}  // namespace nmsparse

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { nmsparse::logger_finder = finder; }

EXPORTED nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nmsparse::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

// What the library was made for, for `nmsparse doctor`.
EXPORTED char const* nmsparseBuild() {
    static std::string const text = std::string(nmsparse::OP_NAME) + " version " + nmsparse::OP_VERSION +
                                    ", compute capabilities " NMSPARSE_SM ", TensorRT headers " +
                                    std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) +
                                    ", CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                                    std::to_string(CUDART_VERSION % 1000 / 10);
    return text.c_str();
}
