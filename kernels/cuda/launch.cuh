// Starting a kernel on a stream, and what becomes of its errors.

#pragma once

#include <stdexcept>
#include <string>

#include "ptx.cuh"

namespace idml::cuda {

#if defined(__CUDACC__)
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// An attribute of the current device.
inline int attribute_of_device(cudaDeviceAttr attribute) {
  int device = 0, found = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&found, attribute, device), "cudaDeviceGetAttribute");
  return found;
}

inline int multiprocessors() {
  return attribute_of_device(cudaDevAttrMultiProcessorCount);
}
inline bool is_hopper() {
  return attribute_of_device(cudaDevAttrComputeCapabilityMajor) == 9;
}
#else
inline int multiprocessors() {
  return emulation::multiprocessors;
}
inline bool is_hopper() {
  return emulation::is_hopper();
}
#endif

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (blocks == 0)
    return;
#if defined(__CUDACC__)
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "shared memory");
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), "launch");
#else
  static_cast<void>(stream);
  emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
#endif
}

}  // namespace idml::cuda
