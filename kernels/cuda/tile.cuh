// A tile of pairs, as an epilogue sees it, and what epilogues have in common. They are written for
// any team of threads that shares a tile: a block of the portable walk, or a warpgroup on Hopper.

#pragma once

#include <limits>

#include "launch.h"
#include "layout.h"
#include "ptx.cuh"

namespace idml::cuda {

// One number for every pair of a thread, where the matrix units leave their sums.
template <class Team>
using Accumulators = float[Team::ROWS / 2][Team::COLS / 2][4];

template <class Block>
__device__ __forceinline__ auto& of_pair(Block& sums, int i, int j) {
  return sums[i / 2][j / 2][i % 2 * 2 + j % 2];
}

// The squared norms of some items, and 1 / ||s||.
struct Norms {
  float sem[TILE], unc[TILE], inverse[TILE];
};

// An epilogue's memory: a number for every pair, by which threads see other pairs than their own,
// and some more.
struct Workspace {
  float numbers[TILE * TILE];
  alignas(PIECE) unsigned char more[28 << 10];

  template <class T>
  __device__ __forceinline__ T& beside() {
    static_assert(sizeof(T) <= sizeof(more), "");
    return *reinterpret_cast<T*>(more);
  }
};

// Threads of an item, where a thread has a row, or a part of it; of a large team some have none.
template <class Team>
constexpr int HELPERS = Team::threads > TILE ? 2 : 1;

// Where a tile is.
struct Here {
  std::int64_t first_row, first_col;  // in the problem
  int rows, cols;                     // how many there are
  int tile_row, tile_col;             // among the tiles of the launch
  int program;
  bool there;
  bool on_diagonal;
  int own;  // row - column of an item with itself
};

constexpr int GROUP = 8;

__device__ __forceinline__ Here here_of(const Walk& walk, int program) {
  const int row_tiles = static_cast<int>((walk.last_row - walk.first_row + TILE - 1) / TILE);
  const int col_tiles = static_cast<int>((walk.last_col - walk.first_col + TILE - 1) / TILE);
  const TilePlace place = place_of_tile(program, row_tiles, col_tiles, walk.triangle, GROUP);
  const auto least = [](std::int64_t x) { return static_cast<int>(x < TILE ? x : TILE); };
  Here here;
  here.first_row = walk.first_row + static_cast<std::int64_t>(place.row) * TILE;
  here.first_col = walk.first_col + static_cast<std::int64_t>(place.col) * TILE;
  here.rows = least(walk.last_row - here.first_row);
  here.cols = least(walk.last_col - here.first_col);
  here.tile_row = place.row;
  here.tile_col = place.col;
  here.program = program;
  here.there = place.there;
  here.on_diagonal = here.first_row == here.first_col;
  const std::int64_t apart = here.first_col - here.first_row;
  here.own = walk.own && apart > -TILE && apart < TILE ? static_cast<int>(apart) : TILE;
  return here;
}

// Steps that an embedding's features take, a line each.
template <class T>
__device__ __forceinline__ int steps_of(const Items& rows, const Items& cols) {
  const bool both = rows.data != nullptr && cols.data != nullptr;
  return both ? (rows.width * static_cast<int>(sizeof(T)) + LINE - 1) / LINE : 0;
}

__device__ __forceinline__ float inverse_root(float square) {
  return square < std::numeric_limits<float>::min() ? 0.0f : 1.0f / std::sqrt(square);
}

// Beyond the edge the last item stands in.
template <class Team>
__device__ __forceinline__ void load_norms(const Team& team, Norms& norms, const Items& sem,
                                           const Items& unc, std::int64_t first, int count) {
  for (int k = team.thread; k < TILE; k += Team::threads) {
    const std::int64_t item = first + (k < count ? k : count - 1);
    norms.sem[k] = sem.squares[item];
    norms.inverse[k] = inverse_root(norms.sem[k]);
    norms.unc[k] = unc.squares == nullptr ? 0.0f : unc.squares[item];
  }
}

// A pair, as an epilogue sees it.
struct Pair {
  bool there;  // else the last row or column stands in for one beyond the edge
  float alpha2, beta2, versine, inverse_row, inverse_col;
};

// What a thread of a team knows of a tile. `sem` are products, or if AGAIN squares of differences;
// `unc` are beta^2.
template <class Team_, class Squares, Form FORM, bool AGAIN>
struct View {
  using Team = Team_;
  static constexpr Form form = FORM;
  const Walk& walk;
  const Here& here;
  Team team;
  const Norms& rows;
  const Norms& cols;
  Workspace& memory;
  Accumulators<Team>& sem;
  const Squares& unc;
  bool near;  // a pair has cancelled

  // The pair of the thread's row i and column j.
  __device__ __forceinline__ Pair pair(int i, int j) {
    return pair(team.row(i), team.col(j), of_pair(sem, i, j), unc.at(i, j));
  }

  // A pair that has this product of `sem`. `versine` and what follows it are for the cosine forms
  // only.
  __device__ __forceinline__ Pair pair(int row, int col, float product, float beta2) {
    const float row_sem = rows.sem[row], col_sem = cols.sem[col];
    const float scale = row_sem + col_sem;
    const bool own = row - col == here.own;
    Pair found;
    found.there = row < here.rows && col < here.cols;
    found.beta2 = beta2;
    found.inverse_row = rows.inverse[row];
    found.inverse_col = cols.inverse[col];
    const float inverses = found.inverse_row * found.inverse_col;
    if constexpr (AGAIN) {
      found.alpha2 = product;
      const float difference = row_sem * found.inverse_row - col_sem * found.inverse_col;
      found.versine =
          inverses == 0 ? 1.0f : (found.alpha2 - difference * difference) * inverses * 0.5f;
    } else {
      found.alpha2 = scale - 2 * product;
      near |= found.there && found.alpha2 < walk.limit * scale && !own;
      found.versine = 1 - product * inverses;
    }
    if (own)
      found.alpha2 = scale - scale;  // 0, unless the item has a NaN or an infinity
    found.alpha2 = found.alpha2 < 0 ? 0.0f : found.alpha2;
    found.versine = found.versine < 0 || found.alpha2 == 0 ? 0.0f : found.versine;
    return found;
  }

  // The number of a pair in memory.
  __device__ __forceinline__ float& number(int row, int col) const {
    return memory.numbers[place_of_number(row, col)];
  }
};

// beta^2 from a product; and whether it has cancelled.
__device__ __forceinline__ float square_of_sum(float product, float scale, float limit,
                                               bool& near) {
  const float found = scale + 2 * product;
  near |= found < limit * scale;
  return found < 0 ? 0.0f : found;
}

// Calls `call(i, j)` for all pairs of a thread, one column after the other.
template <class Team, class Call>
__device__ __forceinline__ void for_pairs(const Call& call) {
#pragma unroll
  for (int j = 0; j < Team::COLS; ++j) {
#pragma unroll
    for (int i = 0; i < Team::ROWS; ++i)
      call(i, j);
  }
}

// The score of every pair to memory.
template <class View>
__device__ __forceinline__ void put_scores(View& view) {
  const Metric<float> metric{view.walk.inverse_tau, view.walk.gamma};
  for_pairs<typename View::Team>([&](int i, int j) {
    const Pair pair = view.pair(i, j);
    view.number(view.team.row(i), view.team.col(j)) =
        score<View::form>(pair.alpha2, pair.beta2, pair.versine, metric);
  });
}

// Whether a tile has to be taken again, from differences. Its flag was 0 before.
template <class View>
__device__ __forceinline__ void flag_near(const View& view) {
  if (__any_sync(0xffffffffu, view.near) && view.team.lane == 0)
    view.walk.flags[view.here.program] = 1;
}

struct alignas(PIECE) Piece {
  std::uint32_t words[4];
};

// Some of a tile's columns, STRIPS of them from `first` on, whose numbers in memory are in the
// columns from `number` on.
template <int STRIPS>
struct Strips {
  int first, number;
};
constexpr Strips<TILE / STRIP> WHOLE{0, 0};

// Writes numbers in memory to a matrix that begins at the tile.
template <bool TRANSPOSED, class T, int STRIPS, class View>
__device__ __forceinline__ void store_numbers(View& view, Strips<STRIPS> strips, T* to,
                                              std::int64_t stride) {
  constexpr int WIDE = PIECE / static_cast<int>(sizeof(T));
  struct Wide {
    T of[WIDE];
  };
  const int rows = TRANSPOSED ? view.here.cols - strips.first : view.here.rows;
  const int cols = TRANSPOSED ? view.here.rows : view.here.cols - strips.first;
  to += strips.first * (TRANSPOSED ? stride : 1);
  const bool aligned = reinterpret_cast<std::uintptr_t>(to) % PIECE == 0 && stride % WIDE == 0;
  const int parts = STRIPS * PARTS<WIDE>;
  for (int part = view.team.thread / 32; part < parts; part += View::Team::threads / 32) {
    Begin begin = begin_of_part<WIDE, TRANSPOSED>(part / STRIPS, view.team.lane);
    (TRANSPOSED ? begin.row : begin.col) += part % STRIPS * STRIP;
    if (begin.row >= rows)
      continue;
    Wide found;
#pragma unroll
    for (int k = 0; k < WIDE; ++k) {
      const int col = begin.col + k;
      found.of[k] = rounded<T>(TRANSPOSED ? view.number(col, strips.number + begin.row)
                                          : view.number(begin.row, strips.number + col));
    }
    T* line = to + begin.row * stride + begin.col;
    if (aligned && begin.col + WIDE <= cols) {
      *reinterpret_cast<Piece*>(line) = bits_as<Piece>(found);
    } else {
#pragma unroll
      for (int k = 0; k < WIDE; ++k)
        if (begin.col + k < cols)
          line[k] = found.of[k];
    }
  }
}

// The same for a matrix that begins at the launch's first pair; and the mirror image.
template <class T, int STRIPS, class View>
__device__ __forceinline__ void store_tile(View& view, Strips<STRIPS> strips, T* matrix,
                                           std::int64_t stride, std::int64_t row, std::int64_t col,
                                           bool mirrored) {
  store_numbers<false>(view, strips, matrix + row * stride + col, stride);
  if (mirrored && !view.here.on_diagonal)
    store_numbers<true>(view, strips, matrix + col * stride + row, stride);
}

}  // namespace idml::cuda
