// The instructions of Hopper that the kernels use, a function each; section numbers are those of
// the PTX ISA, version 9.0.

#pragma once

#include "ptx.cuh"

// Where code for Hopper can be compiled: for sm_90a, and in the emulation.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define IDML_FAST_HOPPER_CODE
#endif

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace idml::ptx {

using TensorMap = CUtensorMap;
using Barrier = std::uint64_t;

// A matrix [count, width] as TMA knows it, in boxes of a line of so many items. It rounds float32
// to the nearest tf32; numbers of 16 bits stay as they are. What is beyond the matrix is zero.
template <class T>
TensorMap map_of(const void* data, std::int64_t count, int width, std::int64_t stride, int items) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || found == nullptr)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled (CUDA 12.0)");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(count)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * sizeof(T)};
  const cuuint32_t box[] = {128 / sizeof(T), static_cast<cuuint32_t>(items)}, steps[] = {1, 1};
  TensorMap map;
  const CUresult result = encode(
      &map, sizeof(T) == 4 ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

// 9.7.13.15.9, mbarrier.init: a phase ends with so many arrivals and all bytes that are expected.
__device__ __forceinline__ void start_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&barrier)),
               "r"(arrivals));
}

// 9.7.13.4, fence: makes barriers that have been started known to TMA.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// 9.7.13.15.13, mbarrier.arrive
__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(&barrier)) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(&barrier)),
               "r"(bytes)
               : "memory");
}

// 9.7.13.15.16, mbarrier.try_wait: until the phase of this parity has ended.
__device__ __forceinline__ void wait(Barrier& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}" ::"r"(address_of(&barrier)),
      "r"(parity)
      : "memory");
}

// 9.7.9.27.1.2, cp.async.bulk.tensor: a box of a matrix, from its first feature and item on.
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, int feature, int item,
                                         Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(address_of(to)),
      "l"(&map), "r"(feature), "r"(item), "r"(address_of(&barrier))
      : "memory");
}

// 9.7.16.7, wgmma.fence, .commit_group and .wait_group
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// 9.7.16.5.1, the matrix descriptor: lines of 128 bytes, swizzled, eight of them 1024 bytes.
__device__ __forceinline__ std::uint64_t described(const void* lines) {
  const std::uint64_t start = (address_of(lines) & 0x3ffffu) >> 4;
  return start | std::uint64_t{1} << 16 | std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

#define IDML_8(f, n) f(n), f(n + 1), f(n + 2), f(n + 3), f(n + 4), f(n + 5), f(n + 6), f(n + 7)
#define IDML_64(f)                                                                        \
  IDML_8(f, 0), IDML_8(f, 8), IDML_8(f, 16), IDML_8(f, 24), IDML_8(f, 32), IDML_8(f, 40), \
      IDML_8(f, 48), IDML_8(f, 56)
#define IDML_SUM(k) "+f"(d[k])

// No instruction: the compiler reads no sum before this that it may read after it, and vice versa.
__device__ __forceinline__ void hold(float (&sums)[16][4]) {
  float* d = &sums[0][0];
  asm volatile("" : IDML_64(IDML_SUM)::"memory");
}

// 9.7.16.5.2, wgmma: 64 rows times 128 columns, 32 bytes of features of each; added to the sums, or
// in their place.
template <class T>
__device__ __forceinline__ void multiply_group(float (&sums)[16][4], std::uint64_t rows,
                                               std::uint64_t cols, bool add) {
  float* d = &sums[0][0];
#define IDML_MULTIPLY(shape, type, transposes)                                                  \
  asm volatile(                                                                                 \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned." shape ".f32." type "." type                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "   \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "   \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, add, 1, 1" transposes  \
      ";\n}"                                                                                    \
      : IDML_64(IDML_SUM)                                                                       \
      : "l"(rows), "l"(cols), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, Bfloat16>) {
    IDML_MULTIPLY("m64n128k16", "bf16", ", 0, 0");
  } else if constexpr (std::is_same_v<T, Float16>) {
    IDML_MULTIPLY("m64n128k16", "f16", ", 0, 0");
  } else {
    IDML_MULTIPLY("m64n128k8", "tf32", "");
  }
#undef IDML_MULTIPLY
}

#undef IDML_SUM
#undef IDML_64
#undef IDML_8

// 9.7.20.5, setmaxnreg: a warpgroup takes more registers, or gives some back.
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// 9.7.13.1, barrier: for some of the threads of a block.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace idml::ptx

#else
#include "emulated_ptx_hopper.h"
#endif
