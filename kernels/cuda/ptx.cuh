// The PTX instructions that the kernels use, a function each; section numbers are those of the PTX
// ISA, version 9.0. Without nvcc they come from an emulation, with which the tests run the kernels.

#pragma once

#include "numbers.h"

#if defined(__CUDACC__)

namespace idml::ptx {

// Dynamic shared memory; TMA needs lines of 128 bytes that repeat every 1024 aligned to those.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ std::uint32_t address_of(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

// 9.7.9.25.3.1, cp.async: 16 bytes, of which all but the first `bytes` are zero; past the L1 cache.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address_of(to)),
               "l"(from), "r"(bytes)
               : "memory");
}

// 9.7.9.25.3.2
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// 9.7.9.25.3.3: until no more than the last PENDING groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 9.7.15.5.15, ldmatrix: four matrices of 8 rows of 16 bytes; lane 8 k + r names row r of matrix k.
__device__ __forceinline__ void load_matrices(std::uint32_t (&found)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
               : "r"(address_of(row))
               : "memory");
}

// 9.7.9.22, cvt: float32 rounded to the nearest tf32.
__device__ __forceinline__ std::uint32_t round_to_tf32(std::uint32_t bits) {
  std::uint32_t found;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(found) : "f"(__uint_as_float(bits)));
  return found;
}

// 9.7.15.5.14, mma: 16 rows times 8 columns, 32 bytes of features of each.
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[4], const std::uint32_t (&a)[4],
                                         std::uint32_t b0, std::uint32_t b1) {
#define IDML_MULTIPLY(shape, type)                                           \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, Bfloat16>) {
    IDML_MULTIPLY("m16n8k16", "bf16");
  } else if constexpr (std::is_same_v<T, Float16>) {
    IDML_MULTIPLY("m16n8k16", "f16");
  } else {
    IDML_MULTIPLY("m16n8k8", "tf32");
  }
#undef IDML_MULTIPLY
}

}  // namespace idml::ptx

#else
#include "emulated_ptx.h"
#endif
