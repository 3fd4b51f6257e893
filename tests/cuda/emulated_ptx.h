// The instructions of ptx.cuh in the emulation, by their definitions in the PTX ISA.

#pragma once

#include "emulation.h"

namespace idml::ptx {

inline unsigned char* shared_memory() {
  const auto start = reinterpret_cast<std::uintptr_t>(emulation::block->shared.data());
  return reinterpret_cast<unsigned char*>((start + 1023) / 1024 * 1024);
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(to) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16)
    emulation::fail("cp.async of 16 bytes that are not aligned");
  emulation::block->running->copies.push_back({to, from, bytes});
}

inline void commit_copies() {
  auto& fiber = *emulation::block->running;
  fiber.committed.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

template <int PENDING>
void wait_for_copies() {
  auto& fiber = *emulation::block->running;
  while (static_cast<int>(fiber.committed.size()) > PENDING) {
    for (const auto& copy : fiber.committed.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    fiber.committed.erase(fiber.committed.begin());
  }
}

inline void load_matrices(std::uint32_t (&found)[4], const void* row) {
  const auto address = reinterpret_cast<std::uintptr_t>(row);
  if (address % 16)
    emulation::fail("ldmatrix of a row that is not aligned");
  const auto taken = emulation::meet_warp(
      "ldmatrix", {static_cast<std::uint32_t>(address), static_cast<std::uint32_t>(address >> 32)},
      [](const auto& brought, auto& out) {
        for (int lane = 0; lane < 32; ++lane) {
          out[lane].resize(4);
          for (int k = 0; k < 4; ++k) {
            const auto& from = brought[8 * k + lane / 4];
            const auto* source = reinterpret_cast<const unsigned char*>(
                from[0] | static_cast<std::uintptr_t>(from[1]) << 32);
            std::memcpy(&out[lane][k], source + 4 * (lane % 4), 4);
          }
        }
      });
  std::memcpy(found, taken.data(), 16);
}

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// What a register holds: so many numbers of a type, from the low bits on.
template <class T>
struct Held;

template <>
struct Held<Bfloat16> {
  static constexpr int count = 2;
  static float at(std::uint32_t bits, int k) {
    return as_float(k ? bits & 0xffff0000u : bits << 16);
  }
};

template <>
struct Held<Float16> {
  static constexpr int count = 2;
  static float at(std::uint32_t bits, int k) {
    return to_float(Float16{static_cast<std::uint16_t>(k ? bits >> 16 : bits)});
  }
};

template <>
struct Held<float> {  // as tf32
  static constexpr int count = 1;
  static float at(std::uint32_t bits, int) { return as_float(bits & 0xffffe000u); }
};

inline std::uint32_t round_to_tf32(std::uint32_t bits) {
  return (bits + 0x1000u) & 0xffffe000u;
}

// m16n8k16, and m16n8k8 of tf32: the ISA's figures for the fragments of `mma`.
template <class T>
void multiply(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t b0,
              const std::uint32_t b1) {
  constexpr int count = Held<T>::count, depth = 8 * count;
  const auto taken = emulation::meet_warp(
      "mma",
      {a[0], a[1], a[2], a[3], b0, b1, as_bits(sums[0]), as_bits(sums[1]), as_bits(sums[2]),
       as_bits(sums[3])},
      [](const auto& brought, auto& out) {
        float left[16][depth], right[depth][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int group = lane / 4, in_group = lane % 4;
          for (int k = 0; k < count; ++k) {
            const int feature = in_group * count + k, half = depth / 2;
            for (int r = 0; r < 4; ++r)
              left[group + 8 * (r % 2)][feature + half * (r / 2)] =
                  Held<T>::at(brought[lane][r], k);
            for (int r = 0; r < 2; ++r)
              right[feature + half * r][group] = Held<T>::at(brought[lane][4 + r], k);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + 8 * (r / 2), col = lane % 4 * 2 + r % 2;
            double sum = as_float(brought[lane][6 + r]);
            for (int k = 0; k < depth; ++k)
              sum += double(left[row][k]) * right[k][col];
            out[lane].push_back(as_bits(static_cast<float>(sum)));
          }
        }
      });
  for (int r = 0; r < 4; ++r)
    sums[r] = as_float(taken[r]);
}

}  // namespace idml::ptx
