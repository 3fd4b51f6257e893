// The part of CUDA that the kernels use, on the CPU: every thread of a block is a fiber, and what a
// warp or a block does together is computed by the last one to arrive. The instructions of ptx.cuh
// and ptx_hopper.cuh are in emulated_ptx.h and emulated_ptx_hopper.h.
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
