// The score of a pair and its derivatives: the one definition that every native kernel inlines.
//
//   alpha = ||s_i - s_j||   beta = ||u_i + u_j||   versine = 1 - cos(s_i, s_j)
//
//   distance  D = alpha * exp(-r)          r = (beta + gamma) / (tau * alpha)
//   cosine    C = 1 - versine * exp(-r)    r as above
//   official  C = 1 - versine * exp(-r)    r = (beta^2 + gamma) / (tau * alpha^2)
//
// Source: Wang et al., Introspective Deep Metric Learning, TPAMI 2023 (eq. 6 of arXiv 2205.04449); `official` is the
// expression of the authors' released code. tau = infinity is passed as inverse_tau = 0.

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

// What a pair's gradients are made of, for an upstream gradient of one:
//   grad s_i += diagonal_row * s_i + product * s_j     grad s_j += diagonal_col * s_j + product * s_i
//   grad u_i += sum * (u_i + u_j)                      grad u_j += sum * (u_i + u_j)
template <class T>
struct Weights {
  T product;
  T diagonal_row;
  T diagonal_col;
  T sum;
};

// exp(-r) for r >= 0, NaN for NaN, zero where the result would be subnormal. The float version is a polynomial because a
// call into the mathematics library would keep the loop around it from being vectorised; its error is below 1.5 ulp.
IDML_INLINE float exp_negative(float r) {
#if defined(__CUDA_ARCH__)
  return expf(-r);
#else
  const float largest = 87.0f;
  const float x = r > largest ? -largest : -r;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, the constant in two parts
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return r > largest ? 0.0f : p * power;
#endif
}

IDML_INLINE double exp_negative(double r) { return std::exp(-r); }

// The exponent r. A zero alpha stands for its limit: r is then huge (or zero, when there is no uncertainty at all), never
// 0/0, and it stays finite so that exp(-r) * r is 0 and not NaN. NaN passes through every comparison below.
template <Form form, class T>
IDML_INLINE T exponent(T alpha2, T alpha, T beta2, T beta, Metric<T> metric) {
  const T tiny = std::numeric_limits<T>::min();
  const T huge = T(1e30);
  const T length = form == Form::official ? alpha2 : alpha;
  const T uncertainty = (form == Form::official ? beta2 : beta) + metric.gamma;
  const T r = uncertainty * metric.inverse_tau / (length < tiny ? tiny : length);
  return r > huge ? huge : r;
}

template <Form form, class T>
IDML_INLINE T score(T alpha2, T beta2, T versine, Metric<T> metric) {
  const T alpha = std::sqrt(alpha2);
  const T r = exponent<form>(alpha2, alpha, beta2, std::sqrt(beta2), metric);
  const T decay = exp_negative(r);
  return form == Form::distance ? alpha * decay : T(1) - versine * decay;
}

// ln x to about 0.03 from the bits of a float: the start of an iteration needs no more.
IDML_INLINE float rough_log(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (static_cast<float>(bits) * 1.1920929e-7f - 126.957f) * 0.69314718f;
}

IDML_INLINE double rough_log(double x) { return std::log(x); }

// Lambert's W(z) to 6 %, z >= 0: a Pade approximant at 0 and, from 1 on, the bound of Iacono and Boyd (2017).
template <class T>
IDML_INLINE T lambert_start(T z) {
  const T low = z < T(1) ? z : T(1);  // keeps the branch that is not taken from overflowing
  const T near_zero = low * (T(1) + T(4.0 / 3) * low) / (T(1) + (T(7.0 / 3) + T(5.0 / 6) * low) * low);
  const T log = rough_log(T(1) + z);
  const T beyond = log * (T(1) - rough_log(T(1) + log) / (T(2) + log));
  return z < T(1) ? near_zero : beyond;
}

// The alpha of a pair whose distance-form score is D: the score inverted, so that the backward needs no semantic product.
//
//   alpha exp(-c / alpha) = D,  c = (beta + gamma) / tau    <=>    r exp(r) = z,  r = c / alpha,  z = c / D
//
// r = W(z) is Lambert's function; it is contractive (dr / r = dz / z / (1 + r)), so no digit of D is lost. Two steps of
// Halley's method on r - z exp(-r) (three for double) end at rounding from a start that is within 6 %.
template <class T>
IDML_INLINE T alpha_of_distance(T distance, T beta, Metric<T> metric) {
  const T c = (beta + metric.gamma) * metric.inverse_tau;
  const T largest = std::numeric_limits<T>::max();
  const T ratio = c / distance;
  const T z = ratio > largest ? largest : ratio;
  T r = lambert_start(z);
  for (int step = 0; step < (sizeof(T) == sizeof(float) ? 2 : 3); ++step) {
    const T f = r - z * exp_negative(r);
    const T next = r + T(1);
    r -= T(2) * next * f / (T(2) * next * next - (next + T(1)) * f);
  }
  // Without uncertainty D is alpha. Where D is zero, alpha is, or exp(-r) has underflowed: no gradient either way.
  return distance == T(0) || !(r > std::numeric_limits<T>::min()) ? distance : c / r;
}

// What a pair's gradients are made of. `inverse_row` and `inverse_col` are 1/||s_i|| and 1/||s_j||, zero for a zero
// vector; only the cosine forms read them and `versine`.
template <Form form, class T>
IDML_INLINE Weights<T> weights(T alpha, T beta, T versine, T inverse_row, T inverse_col, Metric<T> metric) {
  const T r = exponent<form>(alpha * alpha, alpha, beta * beta, beta, metric);
  // Identical items exchange no gradient; an unguarded 1/0 must not turn that into NaN.
  const T decay = alpha == T(0) ? T(0) : exp_negative(r);
  const T inverse_alpha = alpha == T(0) ? T(0) : T(1) / alpha;
  const T inverse_beta = beta == T(0) ? T(0) : T(1) / beta;
  if (form == Form::distance) {
    const T a = decay * (T(1) + r) * inverse_alpha;
    return {-a, a, a, -decay * metric.inverse_tau * inverse_beta};
  }
  const T pull = versine * decay;
  const T power = form == Form::official ? T(2) : T(1);
  const T a = -power * pull * r * inverse_alpha * inverse_alpha;
  const T b = form == Form::official ? T(2) * pull * metric.inverse_tau * inverse_alpha * inverse_alpha
                                     : pull * metric.inverse_tau * inverse_alpha * inverse_beta;
  const T along = decay * (T(1) - versine);  // the part of dC/dcos that only changes a vector's length
  return {decay * inverse_row * inverse_col - a, a - along * inverse_row * inverse_row,
          a - along * inverse_col * inverse_col, b};
}

}  // namespace idml
