// The score of a pair and its derivatives: the one definition that every native kernel inlines.
//
//   alpha = ||s_i - s_j||   beta = ||u_i + u_j||   versine = 1 - cos(s_i, s_j)
//
//   distance  D = alpha * exp(-r)          r = (beta + gamma) / (tau * alpha)
//   cosine    C = 1 - versine * exp(-r)    r as above
//   official  C = 1 - versine * exp(-r)    r = (beta^2 + gamma) / (tau * alpha^2)
//
// Source: Wang et al., Introspective Deep Metric Learning, TPAMI 2023 (eq. 6 of arXiv 2205.04449);
// `official` is the expression of the authors' released code. tau = infinity is passed as
// inverse_tau = 0.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define IDML_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define IDML_INLINE inline __attribute__((always_inline))
#else
#define IDML_INLINE inline
#endif

// The same for a lambda, between its parameters and its body.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define IDML_INLINE_LAMBDA __attribute__((always_inline))
#else
#define IDML_INLINE_LAMBDA
#endif

namespace idml {

enum class Form { distance, cosine, official };

template <class T>
struct Metric {
  T inverse_tau;
  T gamma;
};

// A metric as it comes from outside, of no form or type in particular yet.
struct AnyMetric {
  Form form;
  double tau;
  double gamma;

  template <class T>
  Metric<T> as() const {
    return {static_cast<T>(1.0 / tau), static_cast<T>(gamma)};
  }
};

// What a pair's gradients are made of, for an upstream gradient of one:
//
//   grad s_i += diagonal_row * s_i + product * s_j     grad u_i += sum * (u_i + u_j)
//   grad s_j += diagonal_col * s_j + product * s_i     grad u_j += sum * (u_i + u_j)
//   grad gamma += of_gamma                             grad tau -= of_gamma * (b + gamma) / tau
//
// with b = beta, or beta^2 in the official form.
template <class T>
struct Weights {
  T product;
  T diagonal_row;
  T diagonal_col;
  T sum;
  T of_gamma;
  T inverse_alpha;  // 0 for identical items
};

// A value's bits, and back.
template <class To, class From>
IDML_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// exp(-r) for r >= 0, NaN for NaN, zero where the result would be subnormal; below 1.5 ulp. These
// are polynomials because a call into the mathematics library would keep the loop around it from
// being vectorised.
IDML_INLINE float exp_negative(float r) {
#if defined(__CUDA_ARCH__)
  return expf(-r);
#else
  const float largest = 87.0f;
  const float x = r > largest ? -largest : -r;
  const float shifter =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  const float f =
      (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, the constant in two parts
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const float power = bits_as<float>((bits_as<std::uint32_t>(shifted) << 23) + 0x3f800000u);  // 2^n
  return r > largest ? 0.0f : p * power;
#endif
}

IDML_INLINE double exp_negative(double r) {
#if defined(__CUDA_ARCH__)
  return exp(-r);
#else
  const double largest = 708.0;
  const double x = r > largest ? -largest : -r;
  const double shifter = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634074 + shifter;
  const double n = shifted - shifter;
  const double f = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;  // Taylor's series to f^13: |f| is at most ln 2 / 2
  p = p * f + 1.0 / 479001600.0;
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * f * f + f + 1.0;
  const double power =
      bits_as<double>((bits_as<std::uint64_t>(shifted) << 52) + 0x3ff0000000000000u);
  return r > largest ? 0.0 : p * power;
#endif
}

// What r has above its fraction line: (beta + gamma) / tau, or with beta^2 in the official form.
template <Form form, class T>
IDML_INLINE T numerator(T beta2, T beta, Metric<T> metric) {
  const T measured = form == Form::official ? beta2 : beta;
  // An infinite uncertainty is a fault in the input and must not come out as a score: inf - inf.
  return (measured + metric.gamma + (measured - measured)) * metric.inverse_tau;
}

// r stays finite, so that exp(-r) * r is 0 and not NaN. NaN passes through the comparison.
template <class T>
IDML_INLINE T finite(T r) {
  const T huge = T(1e30);
  return r > huge ? huge : r;
}

// A zero alpha stands for its limit: r is then huge (or zero, when there is no uncertainty at all),
// never 0/0.
template <Form form, class T>
IDML_INLINE T score(T alpha2, T beta2, T versine, Metric<T> metric) {
  const T tiny = std::numeric_limits<T>::min();
  const T alpha = std::sqrt(alpha2);
  const T length = form == Form::official ? alpha2 : alpha;
  const T above = numerator<form>(beta2, std::sqrt(beta2), metric);
  const T decay = exp_negative(finite(above / (length < tiny ? tiny : length)));
  return form == Form::distance ? alpha * decay : T(1) - versine * decay;
}

// ln x to about 0.03, from the bits: the start of an iteration needs no more.
IDML_INLINE float rough_log(float x) {
  return (static_cast<float>(bits_as<std::int32_t>(x)) * 0x1p-23f - 126.957f) * 0.69314718f;
}

IDML_INLINE double rough_log(double x) {
  return (static_cast<double>(bits_as<std::int64_t>(x)) * 0x1p-52 - 1022.957) * 0.69314718055994531;
}

// Lambert's function, the r >= 0 with r exp(r) = z, for z >= 0. It starts within 6 %, from a Pade
// approximant at 0 or the bound of Iacono and Boyd (2017) from 1 on; each step of Halley's method
// on r - z exp(-r) then triples the digits.
template <class T>
IDML_INLINE T lambert_w(T z) {
  const T low = z < T(1) ? z : T(1);  // keeps the branch that is not taken from overflowing
  const T log = rough_log(T(1) + z);
  const T numerator =
      z < T(1) ? low * (T(1) + T(4.0 / 3) * low) : log * (T(2) + log - rough_log(T(1) + log));
  const T denominator = z < T(1) ? T(1) + (T(7.0 / 3) + T(5.0 / 6) * low) * low : T(2) + log;
  T r = numerator / denominator;
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 3  // a loop within keeps the one around it from being vectorised
#endif
  for (int step = 0; step < (sizeof(T) == sizeof(float) ? 2 : 3); ++step) {
    const T f = r - z * exp_negative(r);
    const T next = r + T(1);
    r -= T(2) * next * f / (T(2) * next * next - (next + T(1)) * f);
  }
  return r;
}

// What a pair's gradients are made of, for the distance form, from its score D: the score is
// inverted, so that a backward needs no semantic product.
//
//   alpha exp(-r) = D,  r = c / alpha,  c = (beta + gamma) / tau    <=>    r exp(r) = c / D
//
// No digit is lost: dr / r = dz / z / (1 + r).
template <class T>
IDML_INLINE Weights<T> distance_weights(T distance, T beta, Metric<T> metric) {
  const T c = (beta + metric.gamma) * metric.inverse_tau;
  const T ratio = c / distance;
  const T r =
      lambert_w(ratio > std::numeric_limits<T>::max() ? std::numeric_limits<T>::max() : ratio);
  // Without uncertainty D is alpha. Where D is zero, so is alpha, or exp(-r) has underflowed: no
  // gradient either way.
  const bool certain = !(r > std::numeric_limits<T>::min());
  const T quotient = (certain ? T(1) : r) / (certain ? distance : c);
  const T inverse_alpha = distance == T(0) ? T(0) : quotient;
  const T decay = distance * inverse_alpha;  // exp(-r)
  const T a = distance == T(0) ? T(0) : decay * (T(1) + r) * inverse_alpha;
  const T of_gamma = -decay * metric.inverse_tau;
  const T b = beta == T(0) ? T(0) : of_gamma / beta;
  return {-a, a, a, b, of_gamma, inverse_alpha};
}

// The same from alpha and beta, in any form. `versine`, `inverse_row` and `inverse_col` (1/||s_i||
// and 1/||s_j||, zero for a zero vector) are read by the cosine forms only.
template <Form form, class T>
IDML_INLINE Weights<T> weights(T alpha2, T beta2, T versine, T inverse_row, T inverse_col,
                               Metric<T> metric) {
  const T alpha = std::sqrt(alpha2);
  const T beta = std::sqrt(beta2);
  // Identical items exchange no gradient; an unguarded 1/0 must not turn that into NaN.
  const T inverse_alpha = alpha2 == T(0) ? T(0) : T(1) / alpha;
  const T inverse_length =
      form == Form::official ? finite(inverse_alpha * inverse_alpha) : inverse_alpha;
  const T r = finite(numerator<form>(beta2, beta, metric) * inverse_length);
  const T decay = alpha2 == T(0) ? T(0) : exp_negative(r);
  if constexpr (form == Form::distance) {
    const T a = decay * (T(1) + r) * inverse_alpha;
    const T of_gamma = -decay * metric.inverse_tau;
    const T b = beta2 == T(0) ? T(0) : of_gamma / beta;
    return {-a, a, a, b, of_gamma, inverse_alpha};
  }
  const T pull = versine * decay;
  const T power = form == Form::official ? T(2) : T(1);
  const T a = -power * pull * r * inverse_alpha * inverse_alpha;
  const T of_gamma = pull * metric.inverse_tau * inverse_length;
  const T inverse_beta = form == Form::official ? T(2) : T(1) / beta;
  const T b = beta2 == T(0) ? T(0) : of_gamma * inverse_beta;
  // The part of dC/dcos that only changes a vector's length.
  const T along = decay * (T(1) - versine);
  return {decay * inverse_row * inverse_col - a,
          a - along * inverse_row * inverse_row,
          a - along * inverse_col * inverse_col,
          b,
          of_gamma,
          inverse_alpha};
}

}  // namespace idml
