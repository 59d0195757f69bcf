// Between torch and a kernel: device, stream, launch and its check. Host code, through torch's stable C ABI alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "../tensors.h"
#include "plan.h"

namespace ups::cuda {

using torch::stable::accelerator::DeviceGuard;

// CUDA's own types for torch's 16-bit floats, which have the same layout.
template <class Storage>
struct DeviceTypeOf {
  using type = Storage;
};
template <>
struct DeviceTypeOf<c10::Half> {
  using type = __half;
};
template <>
struct DeviceTypeOf<c10::BFloat16> {
  using type = __nv_bfloat16;
};
template <class Storage>
using DeviceType = typename DeviceTypeOf<Storage>::type;

// The stream that torch uses at this moment. The function that knows is in libtorch_cuda alone: looked up at the first
// launch, so that this library also loads into a torch without CUDA.
inline cudaStream_t current_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static const GetStream get_stream = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<GetStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  UPS_CHECK(get_stream != nullptr && get_stream(device, &stream) == 0,
            "torch does not tell its current CUDA stream (is libtorch_cuda.so loaded?)");
  return static_cast<cudaStream_t>(stream);
}

// Launches on the current stream of the device that `on` is on, which must be the current device.
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), const LaunchPlan& plan, const Tensor& on, const Args&... args) {
  const cudaStream_t stream = current_stream(on.get_device_index());
  kernel<<<static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.threads), plan.shared, stream>>>(args...);
  const cudaError_t error = cudaGetLastError();
  UPS_CHECK(error == cudaSuccess, op, ": the kernel could not be launched: ", cudaGetErrorString(error));
}

inline void check_beside(const char* name, const Tensor& x, const Tensor& logits) {
  UPS_CHECK(x.is_cuda() && x.get_device_index() == logits.get_device_index(), name, " must be on the logits' device");
}

}  // namespace ups::cuda
