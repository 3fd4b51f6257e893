// Random numbers that belong to a pair: a function of the seed, the row and the column alone, so
// that tiles, threads, blocks and devices all draw the same.
//
// The generator is Philox4x32 with ten rounds: Salmon et al., Parallel Random Numbers: As Easy as
// 1, 2, 3, SC 2011. The number of the pair (i, j) is
//
//   philox(counter = (low(j / 4), high(j / 4), low(i), high(i)), key = (low(seed), high(seed)))[j %
//   4]
//
// with `low` and `high` the 32-bit halves of a 64-bit number.

#pragma once

#include <cstdint>

#include "score.h"

namespace idml {

struct Words {
  std::uint32_t word[4];
};

IDML_INLINE std::uint32_t low_half(std::uint64_t x) {
  return static_cast<std::uint32_t>(x);
}

IDML_INLINE std::uint32_t high_half(std::uint64_t x) {
  return static_cast<std::uint32_t>(x >> 32);
}

IDML_INLINE Words philox(Words counter, std::uint64_t key) {
  std::uint32_t a = counter.word[0], b = counter.word[1], c = counter.word[2], d = counter.word[3];
  std::uint32_t key0 = low_half(key), key1 = high_half(key);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t(0xd2511f53u) * a;
    const std::uint64_t second = std::uint64_t(0xcd9e8d57u) * c;
    a = high_half(second) ^ b ^ key0;
    b = low_half(second);
    c = high_half(first) ^ d ^ key1;
    d = low_half(first);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return {{a, b, c, d}};
}

// The numbers of row `row` and the columns 4 group ... 4 group + 3.
IDML_INLINE Words random_words(std::uint64_t seed, std::uint64_t row, std::uint64_t group) {
  return philox({{low_half(group), high_half(group), low_half(row), high_half(row)}}, seed);
}

// ln x of a positive normal number, NaN for NaN; below 1 ulp. Like `exp_negative` it is written out
// so that loops around it can be vectorised.
IDML_INLINE float natural_log(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const std::int32_t bits = bits_as<std::int32_t>(x);
  const std::int32_t power =
      (bits - 0x3f3504f3) >> 23;  // x = 2^power (1 + f), f from sqrt(1/2) - 1
  const float f = bits_as<float>(bits - power * 0x800000) - 1.0f;
  const float n = static_cast<float>(power);
  const float s = f / (2.0f + f);  // ln (1 + f) = 2 artanh(s)
  const float z = s * s;
  float p = 0.24279078841f;
  p = p * z + 0.28498786688f;
  p = p * z + 0.40000972152f;
  p = p * z + 0.66666662693f;
  const float half = 0.5f * f * f;
  const float log =
      n * 6.9313812256e-1f - ((half - (s * (half + p * z) + n * 9.0580006145e-6f)) - f);
  return x != x ? x : log;
#endif
}

IDML_INLINE double natural_log(double x) {
#if defined(__CUDA_ARCH__)
  return log(x);
#else
  const std::int64_t bits = bits_as<std::int64_t>(x);
  const std::int64_t power = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const double f = bits_as<double>(bits - power * 0x10000000000000) - 1.0;
  const double n = static_cast<double>(static_cast<std::int32_t>(power));
  const double s = f / (2.0 + f);
  const double z = s * s;
  double p = 1.479819860511658591e-1;
  p = p * z + 1.531383769920937332e-1;
  p = p * z + 1.818357216161805012e-1;
  p = p * z + 2.222219843214978396e-1;
  p = p * z + 2.857142874366239149e-1;
  p = p * z + 3.999999999940941908e-1;
  p = p * z + 6.666666666666735130e-1;
  const double half = 0.5 * f * f;
  const double log = n * 6.93147180369123816490e-1 -
                     ((half - (s * (half + p * z) + n * 1.90821492927058770002e-10)) - f);
  return x != x ? x : log;
#endif
}

// ln E of the exponentially distributed E = -ln(1 - u) that a random word stands for, with
// u = (word + 1/2) / 2^32. The small ones win a race, so u and not 1 - u keeps its digits.
template <class T>
IDML_INLINE T log_exponential(std::uint32_t word) {
  const T largest = T(1) - std::numeric_limits<T>::epsilon() / T(2);
  const T exact = static_cast<T>(word) * T(0x1p-32) + T(0x1p-33);
  const T u = exact > largest ? largest : exact;
  // 1 - u is rounded to `rest`; what is lost is added to its logarithm.
  const T rest = T(1) - u;
  const T lost = (T(1) - rest) - u;
  return natural_log(-(natural_log(rest) + lost / rest));
}

}  // namespace idml
