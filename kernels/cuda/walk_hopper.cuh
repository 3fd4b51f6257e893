// The walk on Hopper: blocks that stay, each with a producer, which loads by TMA, and two
// warpgroups that take tiles in turn. While the matrix units are at one's products, the other is at
// its epilogue.

#pragma once

#include <algorithm>

#include "launch.cuh"
#include "ptx_hopper.cuh"
#include "tile.cuh"

namespace idml::cuda::hopper {

constexpr int STAGES = 4;
constexpr int WARPGROUPS = 2;
constexpr int WARPGROUP_THREADS = 128;
constexpr int THREADS = (1 + WARPGROUPS) * WARPGROUP_THREADS;
// Of a thread, once the producer's have given theirs up: 128 (24 + 2 x 240) <= 65536.
constexpr int PRODUCER_REGISTERS = 24, WARPGROUP_REGISTERS = 240;

// Four warps share a tile: `wgmma` takes 64 rows at a time, 16 of them in each warp.
struct Warpgroup : Share<4, 1, 64, 16> {
  static constexpr int HALVES = ROWS / 2;
  int number;

  __device__ __forceinline__ Warpgroup(int thread, int number) : Share(thread), number(number) {}
  __device__ __forceinline__ void sync() const { ptx::meet(1 + number, threads); }
};

struct Memory {
  unsigned char lines[STAGES][2][TILE * LINE];  // of rows and of columns
  Workspace workspace;                          // the warpgroups', in turn
  struct OfWarpgroup {
    Norms rows, cols;
    Here here;                             // not in registers while the products are taken
    float largest[Warpgroup::warps_down];  // finite ||u||^2 of what a warp has loaded
  } warpgroups[WARPGROUPS];
  ptx::Barrier filled[STAGES], emptied[STAGES];
  ptx::Barrier multiplied, finished;  // of tiles, one after the other
};

static_assert(sizeof(Memory) <= 227 << 10, "");

struct Maps {
  ptx::TensorMap sem, unc, sem2, unc2;
};

// beta^2 of a thread's pairs, in 16 bits each: both products would not fit the registers. In units
// of 2^-12 of the largest ||u||^2 of the tile's items, made a power of two, it is a float16 of 2^15
// at most, and keeps 11 bits down to 2^-26 of that.
struct Squares {
  std::uint32_t of[Warpgroup::ROWS / 2][Warpgroup::COLS / 2][2];
  float unit;

  static __device__ __forceinline__ float unit_of(const Memory::OfWarpgroup& memory) {
    float largest = 0;
    for (const float x : memory.largest)
      largest = x > largest ? x : largest;
    return bits_as<float>(bits_as<std::uint32_t>(largest) & 0x7f800000u) * 0x1p-12f;
  }

  __device__ __forceinline__ float at(int i, int j) const {
    const auto bits = static_cast<std::uint16_t>(of[i / 2][j / 2][i % 2] >> j % 2 * 16);
    return to_float(Float16{bits}) * unit;
  }
};

// The steps of a tile's products; those of `unc` first.
struct Steps {
  int unc, all;
};

template <class T>
__device__ __forceinline__ Steps steps_of(const Walk& walk) {
  const int unc = cuda::steps_of<T>(walk.unc, walk.unc2);
  return {unc, unc + cuda::steps_of<T>(walk.sem, walk.sem2)};
}

// Calls `call(here, turn)` for a block's tiles, `turn` of which have been before.
template <class Call>
__device__ __forceinline__ void for_tiles(const Walk& walk, const Call& call) {
  int turn = 0;
  for (int program = blockIdx.x; program < walk.programs; program += gridDim.x) {
    const Here here = here_of(walk, program);
    if (here.there)
      call(here, turn++);
  }
}

// Fills one stage after the other, as soon as it has been emptied.
template <class T>
__device__ __forceinline__ void produce(const Maps& maps, const Walk& walk, Memory& memory) {
  const Steps steps = steps_of<T>(walk);
  int filling = 0;
  for_tiles(walk, [&](const Here& here, int) {
    for (int step = 0; step < steps.all; ++step, ++filling) {
      const int stage = filling % STAGES, round = filling / STAGES;
      if (round > 0)
        ptx::wait(memory.emptied[stage], (round - 1) % 2);
      ptx::arrive_and_expect(memory.filled[stage], 2 * TILE * LINE);
      const bool of_unc = step < steps.unc;
      const int part = of_unc ? step : step - steps.unc;
      const int feature = part * (LINE / static_cast<int>(sizeof(T)));
      ptx::load_box(memory.lines[stage][0], of_unc ? maps.unc : maps.sem, feature,
                    static_cast<int>(here.first_row), memory.filled[stage]);
      ptx::load_box(memory.lines[stage][1], of_unc ? maps.unc2 : maps.sem2, feature,
                    static_cast<int>(here.first_col), memory.filled[stage]);
    }
  });
}

// Both products of a tile, 64 rows in turn with the other 64: while those of one half are under
// way, the squares of the other are packed.
template <class T>
__device__ __forceinline__ void take_products(const Warpgroup& team, Squares& unc,
                                              Accumulators<Warpgroup>& sem, const Walk& walk,
                                              Memory& memory, int turn, bool& near) {
  const Steps steps = steps_of<T>(walk);
  const auto& of_warpgroup = memory.warpgroups[team.number];
  const auto pack = [&](int half) {
    const float unit = Squares::unit_of(of_warpgroup);
    const float inverse = unit < 1e-30f ? 0.0f : 1.0f / unit;
#pragma unroll
    for (int j = 0; j < Warpgroup::COLS; j += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto square = [&](int j) {
          const float scale =
              of_warpgroup.rows.unc[team.row(2 * half + i)] + of_warpgroup.cols.unc[team.col(j)];
          const float product = of_pair(sem, 2 * half + i, j);
          return square_of_sum(product, scale, walk.limit, near) * inverse;
        };
        unc.of[half][j / 2][i] = rounded_pair(square(j), square(j + 1));
      }
    }
  };
  const auto empty = [&](int taken) {
    if (team.lane == 0)
      ptx::arrive(memory.emptied[taken % STAGES]);
  };
  // A barrier tells one round from the next only, so that nobody may be further ahead.
  static_assert(WARPGROUPS == 2 && STAGES > 1, "");
  if (turn > 0)
    ptx::wait(memory.multiplied, (turn - 1) % 2);
  // Whether a step adds to the sums, if it is not the first. The compiler must not know of the
  // first step either: it would take new registers for its sums, beside those that are being
  // packed.
  const bool adds_first = steps.all < 0;
  int taking = turn * steps.all;
  const auto take = [&](int first, int last, bool packs, bool adds) {
    for (int step = first; step < last; ++step, ++taking) {
      ptx::wait(memory.filled[taking % STAGES], taking / STAGES % 2);
      const auto& stage = memory.lines[taking % STAGES];
#pragma unroll
      for (int half = 0; half < Warpgroup::HALVES; ++half) {
        if (packs) {
          ptx::wait_for_products<1>();  // this half's
          ptx::hold(sem[half]);
          pack(half);
        }
        ptx::hold(sem[half]);
        ptx::begin_products();
        const std::uint64_t rows = ptx::described(stage[0] + half * (TILE / 2) * LINE);
        const std::uint64_t cols = ptx::described(stage[1]);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece += 2)
          ptx::multiply_group<T>(sem[half], rows + piece, cols + piece, piece > 0 || adds);
        ptx::commit_products();
      }
      // After an instruction of whole warps: all lanes have left the barriers that they waited at.
      if (step + 1 == steps.all && team.lane == 0)
        ptx::arrive(memory.multiplied);
      if (step > 0) {
        ptx::wait_for_products<Warpgroup::HALVES>();  // all but this step's
        empty(taking - 1);
      }
    }
  };
  take(0, steps.unc, false, true);
  take(steps.unc, steps.unc + 1, true, adds_first);
  take(steps.unc + 1, steps.all, false, true);
  ptx::wait_for_products<0>();
  for (auto& half : sem)
    ptx::hold(half);
  empty(taking - 1);
}

// What a warpgroup has to know of a tile.
__device__ __forceinline__ void prepare(const Warpgroup& team, Memory::OfWarpgroup& memory,
                                        const Walk& walk, const Here& here) {
  team.sync();  // all have left the tile before, and have arrived at its barriers
  if (team.thread == 0) {
    memory.here = here;
    walk.flags[here.program] = 0;
  }
  load_norms(team, memory.rows, walk.sem, walk.unc, here.first_row, here.rows);
  load_norms(team, memory.cols, walk.sem2, walk.unc2, here.first_col, here.cols);
  float largest = 0;
  for (const float x : {memory.rows.unc[team.thread], memory.cols.unc[team.thread]})  // its own
    if (x > largest && x <= std::numeric_limits<float>::max())
      largest = x;
#pragma unroll
  for (int other = 1; other < 32; other *= 2) {
    const float theirs = __shfl_xor_sync(0xffffffffu, largest, other);
    largest = theirs > largest ? theirs : largest;
  }
  if (team.lane == 0)
    memory.largest[team.down] = largest;
  team.sync();
}

template <class T, Form FORM, class Epilogue>
__device__ __forceinline__ void consume(const Warpgroup& team, const Walk& walk, Memory& memory,
                                        const Epilogue& epilogue) {
  for_tiles(walk, [&](const Here& next, int turn) {
    if (turn % WARPGROUPS != team.number)
      return;
    auto& of_warpgroup = memory.warpgroups[team.number];
    prepare(team, of_warpgroup, walk, next);
    Accumulators<Warpgroup> sem = {};
    Squares unc;
    bool near = false;
    take_products<T>(team, unc, sem, walk, memory, turn, near);
    unc.unit = Squares::unit_of(of_warpgroup);
    if (turn > 0)
      ptx::wait(memory.finished, (turn - 1) % 2);
    const Here here = of_warpgroup.here;
    View<Warpgroup, Squares, FORM, false> view{
        walk, here, team, of_warpgroup.rows, of_warpgroup.cols, memory.workspace, sem, unc, near};
    epilogue(view);
    flag_near(view);
    ptx::arrive(memory.finished);
  });
}

template <class T, Form FORM, class Epilogue>
__global__ void __launch_bounds__(THREADS, 1)
    walk_tiles(const __grid_constant__ Maps maps, const Walk walk, const Epilogue epilogue) {
#if defined(IDML_FAST_HOPPER_CODE)
  Memory& memory = *reinterpret_cast<Memory*>(ptx::shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::start_barrier(memory.filled[stage], 1);
      ptx::start_barrier(memory.emptied[stage], Warpgroup::warps_down);
    }
    ptx::start_barrier(memory.multiplied, Warpgroup::warps_down);
    ptx::start_barrier(memory.finished, WARPGROUP_THREADS);
    ptx::fence_barriers();
  }
  __syncthreads();
  // The same for all lanes, which the compiler has to know before it lets products overlap.
  const int role = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP_THREADS, 0);
  if (role == WARPGROUPS) {
    ptx::give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x % WARPGROUP_THREADS == 0)
      produce<T>(maps, walk, memory);
  } else {
    ptx::take_registers<WARPGROUP_REGISTERS>();
    consume<T, FORM>(Warpgroup(threadIdx.x % WARPGROUP_THREADS, role), walk, memory, epilogue);
  }
#endif
}

template <class T, Form FORM, class Epilogue>
void walk_all_tiles(const Walk& walk, const Epilogue& epilogue, void* stream) {
  const auto map = [&](const Items& items, std::int64_t count) {
    if (items.data == nullptr)
      return ptx::TensorMap{};
    return ptx::map_of<T>(items.data, count, items.width, items.stride, TILE);
  };
  const Maps maps{map(walk.sem, walk.last_row), map(walk.unc, walk.last_row),
                  map(walk.sem2, walk.last_col), map(walk.unc2, walk.last_col)};
  launch(walk_tiles<T, FORM, Epilogue>, std::min(walk.programs, multiprocessors()), THREADS,
         sizeof(Memory), stream, maps, walk, epilogue);
}

}  // namespace idml::cuda::hopper
