// The instructions of ptx_hopper.cuh in the emulation, by their definitions in the PTX ISA.

#pragma once

#include "emulated_ptx.h"

namespace idml::ptx {

// A matrix as TMA knows it: its features side by side, boxes of lines of 128 bytes.
struct TensorMap {
  const unsigned char* data;
  std::int64_t items, width, stride;  // the width in features, the stride in bytes
  int size;                           // bytes of a feature
  int box;                            // items
};

template <class T>
TensorMap map_of(const void* data, std::int64_t count, int width, std::int64_t stride, int items) {
  if (reinterpret_cast<std::uintptr_t>(data) % 16 || stride * sizeof(T) % 16)
    throw std::runtime_error("a matrix that is not aligned");
  return {static_cast<const unsigned char*>(data),       count,     width,
          static_cast<std::int64_t>(stride * sizeof(T)), sizeof(T), items};
}

// The phase's parity, how many arrivals it takes and still lacks, and the bytes that it lacks.
struct Barrier {
  std::uint8_t parity, arrivals, lacking, unused;
  std::int32_t bytes;
};

inline void end_phase(Barrier& barrier) {
  if (barrier.lacking != 0 || barrier.bytes != 0)
    return;
  barrier.parity ^= 1;
  barrier.lacking = barrier.arrivals;
  ++emulation::block->progress;
}

inline void start_barrier(Barrier& barrier, int arrivals) {
  const auto count = static_cast<std::uint8_t>(arrivals);
  barrier = {0, count, count, 0, 0};
}

inline void fence_barriers() {}

inline void arrive_and_expect(Barrier& barrier, int bytes) {
  if (barrier.lacking == 0)
    emulation::fail("an arrival too many at a barrier");
  --barrier.lacking;
  barrier.bytes += bytes;
  end_phase(barrier);
}

inline void arrive(Barrier& barrier) {
  arrive_and_expect(barrier, 0);
}

inline void wait(Barrier& barrier, int parity) {
  auto& boxes = emulation::block->boxes;
  while (barrier.parity == parity) {
    for (std::size_t k = 0; k < boxes.size();) {
      if (boxes[k].barrier == &barrier) {
        barrier.bytes -= boxes[k].deliver();
        boxes.erase(boxes.begin() + static_cast<long>(k));
        end_phase(barrier);
      } else {
        ++k;
      }
    }
    if (barrier.parity == parity)
      emulation::yield();
  }
}

inline std::size_t swizzled(std::size_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

inline void load_box(void* to, const TensorMap& map, int feature, int item, Barrier& barrier) {
  if (reinterpret_cast<std::uintptr_t>(to) % 1024)
    emulation::fail("a box that is not aligned");
  emulation::block->boxes.push_back(
      {&barrier, [=] {
         auto* lines = static_cast<unsigned char*>(to);
         const int first = feature * map.size;
         for (int k = 0; k < map.box; ++k) {
           for (int byte = 0; byte < 128; ++byte) {
             const bool there =
                 item + k >= 0 && item + k < map.items && first + byte < map.width * map.size;
             lines[swizzled(static_cast<std::size_t>(k * 128 + byte))] =
                 there ? map.data[(item + k) * map.stride + first + byte] : 0;
           }
         }
         if (map.size == 4)
           for (int k = 0; k < map.box * 32; ++k) {
             std::uint32_t bits;
             std::memcpy(&bits, lines + 4 * k, 4);
             bits = round_to_tf32(bits);
             std::memcpy(lines + 4 * k, &bits, 4);
           }
         return map.box * 128;
       }});
}

inline void begin_products() {}

inline void hold(float (&)[16][4]) {}

inline emulation::Group& group() {
  return emulation::block->groups[emulation::thread() / 128];
}

inline void commit_products() {
  auto& own = group();
  emulation::meet(own.meeting, 128, emulation::thread() % 128, "wgmma.commit_group", {},
                  [&](auto&, auto&) {
                    own.committed.push_back(std::move(own.products));
                    own.products.clear();
                  });
}

template <int PENDING>
void wait_for_products() {
  auto& own = group();
  emulation::meet(own.meeting, 128, emulation::thread() % 128, "wgmma.wait_group", {},
                  [&](auto&, auto&) {
                    while (static_cast<int>(own.committed.size()) > PENDING) {
                      for (const auto& product : own.committed.front())
                        product.compute(product.sums);
                      own.committed.erase(own.committed.begin());
                    }
                  });
}

// Here a descriptor is the address; the swizzle is of its low bits, as in shared memory.
inline std::uint64_t described(const void* lines) {
  return reinterpret_cast<std::uint64_t>(lines) >> 4;
}

// m64n128k16, and m64n128k8 of tf32: the ISA's figures for the fragments of `wgmma`.
template <class T>
void multiply_group(float (&sums)[16][4], std::uint64_t rows, std::uint64_t cols, bool add) {
  auto& own = group();
  const auto address = reinterpret_cast<std::uintptr_t>(&sums[0][0]);
  const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  emulation::meet(
      own.meeting, 128, emulation::thread() % 128, "wgmma",
      {low(address), low(address >> 32), low(rows), low(rows >> 32), low(cols), low(cols >> 32)},
      [&](const auto& brought, auto&) {
        emulation::Product product;
        for (const auto& x : brought) {
          product.sums.push_back(
              reinterpret_cast<float*>(x[0] | static_cast<std::uint64_t>(x[1]) << 32));
          if (x[2] != brought[0][2] || x[4] != brought[0][4])
            emulation::fail("wgmma of different matrices");
        }
        product.compute = [rows, cols, add](const std::vector<float*>& all) {
          constexpr int count = Held<T>::count, depth = 8 * count;
          const auto at = [](std::uint64_t lines, int item, int k) {
            const std::size_t place = (lines << 4) + item * 128 + k / count * 4;
            std::uint32_t bits;
            std::memcpy(&bits, reinterpret_cast<const void*>(swizzled(place)), 4);
            return Held<T>::at(bits, k % count);
          };
          std::vector<float> left(64 * depth), right(128 * depth);
          for (int k = 0; k < depth; ++k) {
            for (int row = 0; row < 64; ++row)
              left[row * depth + k] = at(rows, row, k);
            for (int col = 0; col < 128; ++col)
              right[col * depth + k] = at(cols, col, k);
          }
          for (int thread = 0; thread < 128; ++thread) {
            for (int r = 0; r < 64; ++r) {
              const int row = thread / 32 * 16 + thread % 32 / 4 + r / 2 % 2 * 8;
              const int col = r / 4 * 8 + thread % 4 * 2 + r % 2;
              double sum = add ? all[thread][r] : 0;
              for (int k = 0; k < depth; ++k)
                sum += double(left[row * depth + k]) * right[col * depth + k];
              all[thread][r] = static_cast<float>(sum);
            }
          }
        };
        own.products.push_back(std::move(product));
      });
}

template <int REGISTERS>
void take_registers() {}

template <int REGISTERS>
void give_registers() {}

inline void meet(int barrier, int threads) {
  auto& meeting = emulation::block->named[barrier];
  emulation::meet(meeting, threads, meeting.arrived, "bar.sync", {}, [](auto&, auto&) {});
}

}  // namespace idml::ptx
