// The half types as bits, and their conversions, on the host and on the device.

#pragma once

#include <cstdint>
#include <type_traits>

#include "score.h"

namespace idml {

struct Bfloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

IDML_INLINE float to_float(float x) {
  return x;
}

IDML_INLINE float to_float(Bfloat16 x) {
  return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

IDML_INLINE float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float found;
  asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(x.bits));
  return found;
#else
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u)
    return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // A subnormal is a multiple of 2^-24; a normal one has its exponent moved.
  const float magnitude = rest < 0x400u ? static_cast<float>(rest) * 0x1p-24f
                                        : bits_as<float>((rest << 13) + 0x38000000u);
  return sign ? -magnitude : magnitude;
#endif
}

// To the nearest, ties to even.
template <class T>
IDML_INLINE T rounded(float x);

template <>
IDML_INLINE float rounded<float>(float x) {
  return x;
}

template <>
IDML_INLINE Bfloat16 rounded<Bfloat16>(float x) {
#if defined(__CUDA_ARCH__)
  Bfloat16 found;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(found.bits) : "f"(x));
  return found;
#else
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  if (x != x)
    return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
IDML_INLINE Float16 rounded<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 found;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found.bits) : "f"(x));
  return found;
#else
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  std::uint32_t found;
  if (rest > 0x7f800000u) {
    found = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // what rounds to 65536 or more
    found = 0x7c00u;
  } else if (rest >= 0x38800000u) {  // normal
    found = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
  } else {  // adding 1/2 leaves the nearest multiple of 2^-24 in the low bits
    found = bits_as<std::uint32_t>(bits_as<float>(rest) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<std::uint16_t>(sign | found)};
#endif
}

// Two numbers in one register, the first in its low half.
IDML_INLINE std::uint32_t rounded_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
  std::uint32_t found;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(second), "f"(first));
  return found;
#else
  return rounded<Float16>(first).bits | static_cast<std::uint32_t>(rounded<Float16>(second).bits)
                                            << 16;
#endif
}

}  // namespace idml
