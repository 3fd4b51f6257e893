// The part of CUDA that the kernels use, on the CPU: every thread of a block is a fiber, and what a
// warp or a block does together is computed by the last one to arrive. Instructions are those of
// ptx.cuh, by their definitions in the PTX ISA.
//
// What is asynchronous happens as late as it may: data arrives when it is waited for, and fibers
// run in an order drawn anew each round, so that a wait or a barrier that is missing shows.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
#define __grid_constant__

namespace emulation {

// Few, so that a persistent block has several tiles.
constexpr int multiprocessors = 2;

inline bool is_hopper() {
  const char* capability = std::getenv("IDML_FAST_EMULATED");
  return capability != nullptr && std::string(capability) == "90";
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Some threads that do something together: what each brings, and what each takes away.
struct Meeting {
  std::vector<std::vector<std::uint32_t>> brought, taken;
  std::string what;
  int arrived = 0;
  int times = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;  // the rest of 16 is zero
};

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false, finished = false;
  int thread = 0;
  std::vector<Copy> copies;                  // since the last commit
  std::vector<std::vector<Copy>> committed;  // the oldest first
};

// Bytes on their way to shared memory, and the barrier that waits for them.
struct Box {
  const void* barrier;
  std::function<int()> deliver;
};

// A product that a warpgroup has begun; of each thread its sums.
struct Product {
  std::vector<float*> sums;
  std::function<void(const std::vector<float*>&)> compute;
};

struct Group {
  Meeting meeting;
  std::vector<Product> products;                // since the last commit
  std::vector<std::vector<Product>> committed;  // the oldest first
};

// The stacks of a block's threads, for one block after the other.
constexpr std::size_t STACK = 256 << 10;
inline std::vector<std::unique_ptr<char[]>> stacks;

struct Block {
  Index index, count;
  int threads = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned char> shared;
  Meeting all;
  std::vector<Meeting> warps, named = std::vector<Meeting>(16);
  std::vector<Group> groups;
  std::vector<Box> boxes;
  Fiber* running = nullptr;
  long progress = 0;
  std::function<void()> kernel;
  std::string error;
  jmp_buf scheduler;
};

inline Block* block = nullptr;

inline void yield() {
  if (_setjmp(block->running->place) == 0)
    _longjmp(block->scheduler, 1);
}

inline void fail(const std::string& what) {
  if (block->error.empty())
    block->error = "thread " + std::to_string(block->running->thread) + ": " + what;
  for (;;)
    yield();  // the scheduler ends
}

inline void enter() {
  block->kernel();
  block->running->finished = true;
  ++block->progress;
  for (;;)
    yield();
}

// `count` threads meet; the last to arrive computes `taken` of all from `brought`.
template <class Compute>
std::vector<std::uint32_t> meet(Meeting& meeting, int count, int lane, const std::string& what,
                                std::vector<std::uint32_t> brought, const Compute& compute) {
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.brought.assign(count, {});
  } else if (meeting.what != what) {
    fail(what + " while others do " + meeting.what);
  }
  meeting.brought[lane] = std::move(brought);
  ++block->progress;
  const int times = meeting.times;
  if (++meeting.arrived == count) {
    std::vector<std::vector<std::uint32_t>> taken(count);
    compute(meeting.brought, taken);
    meeting.taken = std::move(taken);
    meeting.arrived = 0;
    ++meeting.times;
  }
  while (meeting.times == times)
    yield();
  return meeting.taken[lane];
}

inline int thread() {
  return block->running->thread;
}

template <class Compute>
std::vector<std::uint32_t> meet_warp(const std::string& what, std::vector<std::uint32_t> brought,
                                     const Compute& compute) {
  return meet(block->warps[thread() / 32], 32, thread() % 32, what, std::move(brought), compute);
}

// Runs all blocks of a kernel, one after the other.
inline void run(int blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  static std::mt19937 random(0);
  while (static_cast<int>(stacks.size()) < threads)
    stacks.emplace_back(new char[STACK]);
  const Index count{static_cast<unsigned>(blocks), 1, 1};
  for (unsigned y = 0; y < count.y; ++y) {
    for (unsigned x = 0; x < count.x; ++x) {
      Block now;
      block = &now;
      now.index = {x, y, 0};
      now.count = count;
      now.threads = threads;
      now.kernel = kernel;
      now.warps.resize((threads + 31) / 32);
      now.groups.resize((threads + 127) / 128);
      now.shared.assign(shared_bytes + 1024, 0xff);  // NaN, whatever the type
      std::vector<int> order;
      for (int k = 0; k < threads; ++k) {
        now.fibers.push_back(std::make_unique<Fiber>());
        now.fibers[k]->thread = k;
        order.push_back(k);
      }
      for (volatile bool running = true; running;) {
        std::shuffle(order.begin(), order.end(), random);
        running = false;
        const long before = now.progress;
        for (const int k : order) {
          Fiber& fiber = *now.fibers[k];
          if (fiber.finished)
            continue;
          running = true;
          now.running = &fiber;
          if (_setjmp(now.scheduler) == 0) {
            if (fiber.started)
              _longjmp(fiber.place, 1);
            fiber.started = true;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = stacks[k].get();
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, enter, 0);
            setcontext(&fiber.context);
          }
          if (!now.error.empty())
            throw std::runtime_error(now.error);
        }
        if (running && now.progress == before)
          throw std::runtime_error("all threads wait for one another");
      }
    }
  }
  block = nullptr;
}

inline Index thread_index() {
  return {static_cast<unsigned>(thread()), 0, 0};
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block->index)
#define gridDim (emulation::block->count)

inline void __syncthreads() {
  emulation::meet(emulation::block->all, emulation::block->threads, emulation::thread(),
                  "__syncthreads", {}, [](auto&, auto&) {});
}

inline unsigned __ballot_sync(unsigned, int value) {
  return emulation::meet_warp("__ballot_sync", {static_cast<std::uint32_t>(value != 0)},
                              [](const auto& brought, auto& out) {
                                std::uint32_t all = 0;
                                for (int lane = 0; lane < 32; ++lane)
                                  all |= brought[lane][0] << lane;
                                for (auto& x : out)
                                  x = {all};
                              })[0];
}

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

inline int __any_sync(unsigned, int value) {
  return emulation::meet_warp("__any_sync", {static_cast<std::uint32_t>(value)},
                              [](const auto& brought, auto& out) {
                                std::uint32_t any = 0;
                                for (const auto& x : brought)
                                  any |= x[0];
                                for (auto& x : out)
                                  x = {any != 0};
                              })[0];
}

inline void __syncwarp() {
  emulation::meet_warp("__syncwarp", {}, [](auto&, auto&) {});
}

// Each lane takes the value of the lane that `from(lane)` names.
template <class T, class From>
T shuffled(const char* what, T value, const From& from) {
  static_assert(sizeof(T) == 4, "");
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto taken = emulation::meet_warp(what, {bits}, [&](const auto& brought, auto& out) {
    for (int lane = 0; lane < 32; ++lane)
      out[lane] = brought[from(lane)];
  });
  std::memcpy(&value, taken.data(), 4);
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  return shuffled("__shfl_xor_sync", value, [=](int lane) { return lane ^ other; });
}

template <class T>
T __shfl_sync(unsigned, T value, int other) {
  return shuffled("__shfl_sync", value, [=](int) { return other; });
}

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

// ------------------------------------------------------------------------------------- Hopper

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
