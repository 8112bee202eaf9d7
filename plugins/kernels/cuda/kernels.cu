// The kernels of ours, for a GPU.
#include "launch.h"

namespace nmsparse {

template <class Kernel, int PHASE = 0>
__device__ __forceinline__ void run_phases(typename Kernel::Args const& args, typename Kernel::Shared& shared,
                                           Place place) {
    Kernel::template phase<PHASE>(args, shared, place);
    if constexpr (PHASE + 1 < Kernel::PHASES) {
        __syncthreads();
        run_phases<Kernel, PHASE + 1>(args, shared, place);
    }
}

// Two blocks on an SM hide what one waits for; none of the kernels needs stack for that.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::THREADS, 2) run(typename Kernel::Args args) {
    // Raw, because what a block shares may not be constructed.
    __shared__ alignas(16) unsigned char raw[sizeof(typename Kernel::Shared)];
    run_phases<Kernel>(args, reinterpret_cast<typename Kernel::Shared&>(raw),
                       {int(blockIdx.x), int(blockIdx.y), int(threadIdx.x)});
}

template <class Kernel>
cudaError_t launch(typename Kernel::Args const& args, cudaStream_t stream) {
    run<Kernel><<<dim3(Kernel::blocks_x(args), Kernel::blocks_y(args)), Kernel::THREADS, 0, stream>>>(args);
    return cudaGetLastError();
}

int compute_capability() {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
}

#define INSTANCE(...) template cudaError_t launch<__VA_ARGS__>(__VA_ARGS__::Args const&, cudaStream_t);
NMSPARSE_KERNELS(INSTANCE)

}  // namespace nmsparse
