// What the GEMMs of an H100 ask of CUDA, on a machine without one: the objects that are shipped are linked with a runtime
// that only looks. All of them: the linker once took a template of another GEMM's object for the sparse one's. Their
// copies in and out of shared memory are described by maps: each must end where its tensor ends, y after the last token.
// Prints what fails; the exit status is the number of failures.
#include <cuda.h>

#include <cstring>

#include "../kernels/cuda/launch.h"
#include "check.h"

using namespace nmsparse;

namespace {

int maps = 0, launches = 0;

struct Size {
    int tokens, k, n;
};

struct Tensor {
    void const* at;
    uint64_t bytes;
} tensors[4];
Gemm asked;

CUresult encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* at, cuuint64_t const* sizes,
                cuuint64_t const* strides, cuuint32_t const*, cuuint32_t const*, CUtensorMapInterleave, CUtensorMapSwizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    ++maps;
    uint64_t const element = type == CU_TENSOR_MAP_DATA_TYPE_UINT64 ? 8 : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    uint64_t end = sizes[0] * element;
    for (cuuint32_t i = 1; i < rank; ++i) {
        end += (sizes[i] - 1) * strides[i - 1];
        CHECK(strides[i - 1] % 16 == 0);
    }
    int found = 0;
    for (Tensor const& tensor : tensors)
        if (tensor.at == at) {
            ++found;
            CHECK(end == tensor.bytes);
        }
    CHECK(found == 1);
    if (at == asked.y) CHECK(sizes[0] == uint64_t(asked.n) && sizes[1] == uint64_t(asked.tokens));
    return CUDA_SUCCESS;
}

template <class T>
void runs(Tile tile, int tokens, int k, int n) {
    alignas(16) static char memory[4][16];
    auto const up = [](int value, int to) { return (value + to - 1) / to * to; };
    int const padded = up(tokens, WGMMA_TOKENS);
    asked = {memory[0], reinterpret_cast<uint32_t*>(memory[1]), memory[2], nullptr, nullptr, nullptr, nullptr, memory[3],
             tokens, padded, k, n};
    tensors[0] = {asked.a, uint64_t(tokens) * k / 2 * sizeof(T)};
    tensors[1] = {asked.metadata, uint64_t(padded) * up(k, WGMMA_CHANNELS) / 32 * sizeof(uint32_t)};
    tensors[2] = {asked.w, uint64_t(k) * n * sizeof(T)};
    tensors[3] = {asked.y, uint64_t(tokens) * n * sizeof(T)};
    maps = launches = 0;
    CHECK(sparse_gemm_sm90<T>(tile, asked, nullptr) == cudaSuccess);
    CHECK(maps == 4 && launches == 1);
    asked.n = n - 4;  // no multiple of 16 bytes
    CHECK(sparse_gemm_sm90<T>(tile, asked, nullptr) == cudaErrorInvalidValue);
    CHECK(maps == 4 && launches == 1);
    asked.n = n;
    tensors[0].bytes *= 2;
    tensors[1] = {};
    maps = launches = 0;
    CHECK(dense_gemm_sm90<T>(tile, asked, nullptr) == cudaSuccess);
    CHECK(maps == 3 && launches == 1);
    asked.y = nullptr;
    asked.partial = reinterpret_cast<float*>(memory[3]);
    asked.splits = k % 192 == 0 ? 3 : 1;
    tensors[3].bytes = uint64_t(tokens) * asked.splits * n * sizeof(float);
    maps = launches = 0;
    CHECK(skinny_gemm_sm90<T>(asked, nullptr) == cudaSuccess);
    CHECK(maps == 3 && launches == 1);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(char const* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    CHECK(std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0);
    *function = reinterpret_cast<void*>(encode);
    *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }  // SMs
cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) CHECK(value <= 227 << 10);
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void const*, int, size_t, unsigned) {
    return *blocks = 1, cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const*, void const*, void**) { return ++launches, cudaSuccess; }
cudaError_t cudaLaunchKernel(void const*, dim3, dim3, void**, size_t, cudaStream_t) { return ++launches, cudaSuccess; }

// What a compiled object calls of itself.
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return ++launches, cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, void const*) { return cudaSuccess; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, char const*, char*, char const*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char const*, char const*, int, size_t, int, int) {}

}  // extern "C"

int main() {
    for (Tile const tile : {Tile::WIDE, Tile::TALL, Tile::SMALL})
        for (auto const [tokens, k, n] : {Size{1, 64, 8}, {65, 320, 40}, {1000, 576, 1536}, {4096, 14336, 4096}}) {
            runs<__half>(tile, tokens, k, n);
            runs<__nv_bfloat16>(tile, tokens, k, n);
        }
    std::printf("%d failed\n", failures);
    return failures;
}
