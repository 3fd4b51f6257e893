// The walk from Ampere on: a tile a block. Features come by cp.async into a ring of stages, the
// matrix units take both Gram products one after the other into registers, an epilogue does the
// rest where the products are.

#pragma once

#include <algorithm>

#include "launch.cuh"
#include "tile.cuh"

namespace idml::cuda::ampere {

constexpr int STAGES = 3;
// Blocks that look for the tiles to be taken again.
constexpr int LOOKING = 264;

// All threads of a block share a tile.
struct Block : Share<2, 4, 16, 64> {
  static constexpr int NEXT_COLS = 2 * 8 * warps_across;
  using Share::Share;
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  // The item whose address a lane gives: of 16 rows, and of two blocks of 8 columns.
  IDML_INLINE int loaded_row() const { return row(0) - lane / 4 + lane % 16; }
  IDML_INLINE int loaded_col() const { return (lane / 16 * warps_across + across) * 8 + lane % 8; }
};

// Those that take a tile again are as many as can be: there are no products to be shared.
struct LargeBlock : Share<8, 4, 16, 16> {
  using Share::Share;
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// The memory of the stages is the epilogue's once the products are there.
struct Memory {
  union {
    unsigned char lines[STAGES][2][TILE * LINE];  // of rows and of columns
    Workspace workspace;
  };
  Norms rows, cols;
};

static_assert(sizeof(Memory) <= 99 << 10, "");  // what Ada has

// beta^2 of a thread's pairs.
template <class Team>
struct Squares {
  Accumulators<Team> of;
  __device__ __forceinline__ float at(int i, int j) const { return of_pair(of, i, j); }
};

template <class T>
__device__ __forceinline__ const unsigned char* item_of(const Items& items, std::int64_t item) {
  return static_cast<const unsigned char*>(items.data) + item * items.stride * sizeof(T);
}

// One step's features of a tile's items, by all threads. Beyond the edge the last item stands in,
// so that no product needs a mask; beyond the width there are zeros.
template <class T>
__device__ __forceinline__ void load_lines(const Block& team, unsigned char* lines,
                                           const Items& items, std::int64_t first, int count,
                                           int step) {
  const int bytes = items.width * static_cast<int>(sizeof(T)) - step * LINE;
#pragma unroll
  for (int k = team.thread; k < TILE * PIECES; k += Block::threads) {
    const int item = k / PIECES, piece = k % PIECES;
    // Of a width that is no multiple of 16 bytes the last piece is shorter.
    const int left = bytes - piece * PIECE, taken = left < 0 ? 0 : left < PIECE ? left : PIECE;
    const int clamped = item < count ? item : count - 1;
    const unsigned char* from =
        item_of<T>(items, first + clamped) + (taken > 0 ? step * LINE + piece * PIECE : 0);
    ptx::copy_async(lines + place_of_piece(item, piece), from, taken);
  }
}

// sums += x . y over the features of one stage, 32 bytes at a time.
template <class T>
__device__ __forceinline__ void multiply_lines(const Block& team, Accumulators<Block>& sums,
                                               const unsigned char* rows,
                                               const unsigned char* cols) {
  // The item and the piece whose address this lane gives: of 16 rows and two pieces, of 16 columns
  // and two pieces, in the order in which `mma` wants the matrices.
  const int row = team.loaded_row(), col = team.loaded_col();
#pragma unroll
  for (int piece = 0; piece < PIECES; piece += 2) {
    std::uint32_t a[Block::ROWS / 2][4], b[Block::COLS / 4][4];
#pragma unroll
    for (int i = 0; i < Block::ROWS / 2; ++i)
      ptx::load_matrices(a[i], rows + place_of_piece(row + 16 * i, piece + team.lane / 16));
#pragma unroll
    for (int j = 0; j < Block::COLS / 4; ++j)
      ptx::load_matrices(
          b[j], cols + place_of_piece(col + Block::NEXT_COLS * j, piece + team.lane / 8 % 2));
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < Block::ROWS / 2; ++i)
          a[i][r] = ptx::round_to_tf32(a[i][r]);
#pragma unroll
        for (int j = 0; j < Block::COLS / 4; ++j)
          b[j][r] = ptx::round_to_tf32(b[j][r]);
      }
    }
#pragma unroll
    for (int i = 0; i < Block::ROWS / 2; ++i) {
#pragma unroll
      for (int j = 0; j < Block::COLS / 2; ++j)
        ptx::multiply<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// The products of `unc`, then those of `sem`, in one run of stages.
template <class T>
__device__ __forceinline__ void take_products(const Block& team, Accumulators<Block>& unc,
                                              Accumulators<Block>& sem, const Walk& walk,
                                              Memory& memory, const Here& here) {
  const int unc_steps = steps_of<T>(walk.unc, walk.unc2);
  const int steps = unc_steps + steps_of<T>(walk.sem, walk.sem2);
  const auto load = [&](int step) {
    if (step < steps) {
      auto& stage = memory.lines[step % STAGES];
      const bool of_unc = step < unc_steps;
      const int part = of_unc ? step : step - unc_steps;
      const Items &rows = of_unc ? walk.unc : walk.sem, &cols = of_unc ? walk.unc2 : walk.sem2;
      load_lines<T>(team, stage[0], rows, here.first_row, here.rows, part);
      load_lines<T>(team, stage[1], cols, here.first_col, here.cols, part);
    }
    ptx::commit_copies();
  };
  for (int step = 0; step < STAGES - 1; ++step)
    load(step);
  const auto take = [&](Accumulators<Block>& sums, int first, int last) {
    for (int step = first; step < last; ++step) {
      ptx::wait_for_copies<STAGES - 2>();
      team.sync();  // all have this stage's lines, and have left the one that is filled next
      load(step + STAGES - 1);
      const auto& stage = memory.lines[step % STAGES];
      multiply_lines<T>(team, sums, stage[0], stage[1]);
    }
  };
  take(unc, 0, unc_steps);
  take(sem, unc_steps, steps);
  ptx::wait_for_copies<0>();
}

// The squares of differences themselves, for tiles in which products have cancelled.
template <class T, class Team>
__device__ __forceinline__ void take_differences(const Team& team, Accumulators<Team>& squares,
                                                 const Items& rows, const Items& cols, float sign,
                                                 const Here& here) {
  for (int feature = 0; feature < rows.width; ++feature) {
    float y[Team::COLS];
#pragma unroll
    for (int j = 0; j < Team::COLS; ++j) {
      const int col = team.col(j) < here.cols ? team.col(j) : here.cols - 1;
      y[j] = to_float(reinterpret_cast<const T*>(item_of<T>(cols, here.first_col + col))[feature]);
    }
#pragma unroll
    for (int i = 0; i < Team::ROWS; ++i) {
      const int row = team.row(i) < here.rows ? team.row(i) : here.rows - 1;
      const float x =
          to_float(reinterpret_cast<const T*>(item_of<T>(rows, here.first_row + row))[feature]);
#pragma unroll
      for (int j = 0; j < Team::COLS; ++j) {
        const float difference = x + sign * y[j];
        of_pair(squares, i, j) += difference * difference;
      }
    }
  }
}

template <class T, Form FORM, bool AGAIN, class Epilogue>
__device__ __forceinline__ void take_tile(const Walk& walk, const Epilogue& epilogue, int program) {
  using Team = std::conditional_t<AGAIN, LargeBlock, Block>;
  const Team team(threadIdx.x);
  if (!AGAIN && team.thread == 0)
    walk.flags[program] = 0;
  const Here here = here_of(walk, program);
  if (!here.there)
    return;
  Memory& memory = *reinterpret_cast<Memory*>(ptx::shared_memory());
  load_norms(team, memory.rows, walk.sem, walk.unc, here.first_row, here.rows);
  load_norms(team, memory.cols, walk.sem2, walk.unc2, here.first_col, here.cols);
  Accumulators<Team> sem = {};
  Squares<Team> unc = {};
  const bool both = steps_of<T>(walk.unc, walk.unc2) > 0;
  if constexpr (AGAIN) {
    take_differences<T>(team, sem, walk.sem, walk.sem2, -1.0f, here);
    if (both)
      take_differences<T>(team, unc.of, walk.unc, walk.unc2, 1.0f, here);
  } else {
    take_products<T>(team, unc.of, sem, walk, memory, here);
  }
  team.sync();  // the norms are there, and the stages are free for the epilogue
  View<Team, Squares<Team>, FORM, AGAIN> view{
      walk, here, team, memory.rows, memory.cols, memory.workspace, sem, unc, false};
  if (!(AGAIN && both)) {
    for_pairs<Team>([&](int i, int j) {
      float& square = of_pair(unc.of, i, j);
      const float scale = memory.rows.unc[team.row(i)] + memory.cols.unc[team.col(j)];
      square = square_of_sum(square, scale, walk.limit, view.near);
    });
  }
  epilogue(view);
  if constexpr (!AGAIN)
    flag_near(view);
}

// A tile a block; Hopper has a walk of its own.
template <class T, Form FORM, class Epilogue>
__global__ void __launch_bounds__(Block::threads, 1)
    walk_tiles(const Walk walk, const Epilogue epilogue) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  take_tile<T, FORM, false>(walk, epilogue, blockIdx.x);
#endif
}

// The flagged tiles of all, some blocks sharing them.
template <class T, Form FORM, class Epilogue>
__global__ void __launch_bounds__(LargeBlock::threads, 1)
    walk_again(const Walk walk, const Epilogue epilogue) {
  // Every warp looks at the same flags, as many at a time as leave all blocks something to do.
  const int lane = threadIdx.x % 32, each = (walk.programs + gridDim.x - 1) / gridDim.x;
  const int together = each < 32 ? each : 32;
  for (int first = blockIdx.x * together; first < walk.programs; first += gridDim.x * together) {
    const int own = first + lane;
    const bool flagged = lane < together && own < walk.programs && walk.flags[own] != 0;
    for (unsigned left = __ballot_sync(0xffffffffu, flagged); left != 0; left &= left - 1) {
      __syncthreads();  // all have left the memory of the tile before
      take_tile<T, FORM, true>(walk, epilogue, first + __ffs(static_cast<int>(left)) - 1);
    }
  }
}

template <class T, Form FORM, class Epilogue>
void walk_all_tiles(const Walk& walk, const Epilogue& epilogue, void* stream) {
  launch(walk_tiles<T, FORM, Epilogue>, walk.programs, Block::threads, sizeof(Memory), stream, walk,
         epilogue);
}

template <class T, Form FORM, class Epilogue>
void walk_flagged_tiles(const Walk& walk, const Epilogue& epilogue, void* stream) {
  launch(walk_again<T, FORM, Epilogue>, std::min(walk.programs, LOOKING), LargeBlock::threads,
         sizeof(Memory), stream, walk, epilogue);
}

}  // namespace idml::cuda::ampere
