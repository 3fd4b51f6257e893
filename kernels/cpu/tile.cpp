#include "tile.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <string>

namespace idml::cpu {

namespace {

Isa detect() {
  Isa widest = Isa::baseline;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  widest = avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#endif
  const char* wanted = std::getenv("IDML_FAST_CPU_ISA");
  if (!wanted)
    return widest;
  const Isa limit = std::string(wanted) == "avx512" ? Isa::avx512
                    : std::string(wanted) == "avx2" ? Isa::avx2
                                                    : Isa::baseline;
  return std::min(widest, limit);
}

template <class S>
IDML_INLINE double squared_norm(const Matrix& x, std::int64_t i) {
  const S* row = x.row<S>(i);
  double total = 0;
  if (x.col_stride == 1) {
#pragma omp simd reduction(+ : total)
    for (std::int64_t k = 0; k < x.cols; ++k)
      total += static_cast<double>(row[k]) * static_cast<double>(row[k]);
    return total;
  }
  for (std::int64_t k = 0; k < x.cols; ++k) {
    const double value = row[k * x.col_stride];
    total += value * value;
  }
  return total;
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

bool has_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_threads() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

void advise_huge_pages(const Matrix& matrix) {
#if defined(__linux__)
  constexpr std::uintptr_t page = std::uintptr_t(1) << 21;
  const std::uintptr_t begin = (matrix.data + page - 1) / page * page;
  const std::uintptr_t end =
      (matrix.data + matrix.rows * matrix.cols * matrix.itemsize) / page * page;
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)matrix;
#endif
}

template <class T>
void squared_norms(const Matrix& x, const Matrix& out, int threads) {
  parallel(block_count(x.rows), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
    const std::int64_t end = std::min((block + 1) * block_rows, x.rows);
    for (std::int64_t i = block * block_rows; i < end; ++i)
      out.row<T>(0)[i] =
          static_cast<T>(is_bfloat16<T>(x) ? squared_norm<BFloat16>(x, i) : squared_norm<T>(x, i));
  });
}

template void squared_norms<float>(const Matrix&, const Matrix&, int);
template void squared_norms<double>(const Matrix&, const Matrix&, int);

}  // namespace idml::cpu
