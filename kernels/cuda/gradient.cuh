// The epilogue of every backward: the weights of a tile's pairs and their sums; matrix products do
// the rest, see kernels/triton/gradient.py.

#pragma once

#include "tile.cuh"

namespace idml::cuda {

// A pair in registers is named in the code, once for every pair of a thread. The weights would be
// far too much code for that, and take too many registers beside. So the pairs of half a tile go
// through shared memory, and threads take them from there in a loop, a row each.
//
// `upstream` knows the upstream gradient of scores: `load_tile(view, memory)` and, for the strip of
// columns from `first` on, `load_strip(view, memory, first)` put into memory what
// `of_pair(view, memory, row, col, pair)` has to look up.
template <class T, class Upstream>
struct Weigh {
  WeightsTo to;
  Upstream upstream;

  static constexpr int HALF = TILE / 2;

  // What an item's own embeddings are multiplied by.
  struct Diagonal {
    float sem, unc;
  };

  // Beside the numbers of half a tile: `sem` in its columns, `unc` in HALF columns more.
  template <class Team>
  struct Memory {
    typename Upstream::Memory upstream;
    // Of each item, what the threads and the warps have that share it.
    Diagonal rows[HELPERS<Team>][TILE];
    Diagonal cols[HELPERS<Team> * TILE / 32][HALF];
  };

  template <class View>
  __device__ __forceinline__ void operator()(View& view) const {
    using Team = typename View::Team;
    const Team& team = view.team;
    const Here& here = view.here;
    auto& memory = view.memory.template beside<Memory<Team>>();
    upstream.load_tile(view, memory.upstream);
    Diagonal of_row{0, 0};
    weigh_half<0>(view, memory, of_row);
    weigh_half<HALF>(view, memory, of_row);
    if (team.thread < HELPERS<Team> * TILE)
      memory.rows[team.thread / TILE][team.thread % TILE] = of_row;
    team.sync();
    add_up(team, memory.rows, to.sem_rows, to.unc_rows,
           here.tile_col * to.rows_stride + std::int64_t{here.tile_row} * TILE, here.rows);
  }

  // The weights of the columns from FIRST on.
  template <int FIRST, class View, class Memory>
  __device__ __forceinline__ void weigh_half(View& view, Memory& memory, Diagonal& of_row) const {
    using Team = typename View::Team;
    const Team& team = view.team;
    const Here& here = view.here;
    team.sync();  // all have left the half before
    constexpr int BEGIN = FIRST * Team::COLS / TILE;
#pragma unroll
    for (int j = BEGIN; j < BEGIN + Team::COLS / 2; ++j) {
#pragma unroll
      for (int i = 0; i < Team::ROWS; ++i) {
        view.number(team.row(i), team.col(j) - FIRST) = cuda::of_pair(view.sem, i, j);
        view.number(team.row(i), team.col(j) - FIRST + HALF) = view.unc.at(i, j);
      }
    }
#pragma unroll 1
    for (int strip = 0; strip < HALF; strip += STRIP) {
      upstream.load_strip(view, memory.upstream, FIRST + strip);
      team.sync();
      weigh_strip<FIRST>(view, memory, strip, of_row);
    }
    team.sync();
    const std::int64_t row = std::int64_t{here.tile_row} * TILE;
    const std::int64_t col = std::int64_t{here.tile_col} * TILE;
    if (!(view.walk.symmetric && here.on_diagonal))  // there, these are rows of the same tiles
      add_up(team, memory.cols, to.sem_cols, to.unc_cols,
             here.tile_row * to.cols_stride + col + FIRST, here.cols - FIRST);
    const auto store = [&](void* matrix, int number) {
      if (matrix != nullptr)
        store_tile(view, Strips<HALF / STRIP>{FIRST, number}, static_cast<T*>(matrix), to.stride,
                   row, col, to.mirrored);
    };
    store(to.sem, 0);
    store(to.unc, HALF);
  }

  // Leaves the weights of a strip in place of the products. At every step all lanes of a warp have
  // another row and another column.
  template <int FIRST, class View, class Memory>
  __device__ __forceinline__ void weigh_strip(View& view, Memory& memory, int strip,
                                              Diagonal& of_row) const {
    using Team = typename View::Team;
    constexpr int STEPS = STRIP / HELPERS<Team>;
    const Metric<float> metric{view.walk.inverse_tau, view.walk.gamma};
    const int helper = view.team.thread / TILE, row = view.team.thread % TILE;
    if (helper >= HELPERS<Team>)
      return;
    const int first = (helper * STEPS) ^ view.team.lane;
    Diagonal of_col{0, 0};
#pragma unroll 4
    for (int step = 0; step < STEPS; ++step) {
      const int at = strip + (first ^ step), col = FIRST + at;
      float &product = view.number(row, at), &sum = view.number(row, at + HALF);
      const Pair pair = view.pair(row, col, product, sum);
      const float incoming = upstream.of_pair(view, memory.upstream, row, col, pair);
      const auto found = weights<View::form>(pair.alpha2, pair.beta2, pair.versine,
                                             pair.inverse_row, pair.inverse_col, metric);
      const auto share = [&](float weight) { return pair.there ? incoming * weight : 0.0f; };
      // Rounded before they are summed, so that what two near items do to each other cancels.
      product = to_float(rounded<T>(share(found.product)));
      sum = to_float(rounded<T>(share(found.sum)));
      constexpr bool distance = View::form == Form::distance;
      of_row.sem += distance ? -product : share(found.diagonal_row);
      of_row.unc += sum;
      of_col.sem += distance ? -product : share(found.diagonal_col);
      of_col.unc += sum;
      // On to the lane that has the column next; in the end, to the one that has had it first.
      const int next = (step ^ (step + 1)) % STEPS;
      of_col.sem = __shfl_xor_sync(0xffffffffu, of_col.sem, next);
      of_col.unc = __shfl_xor_sync(0xffffffffu, of_col.unc, next);
    }
    memory.cols[view.team.thread / 32][strip + first] = of_col;
  }

  template <class Team, class OfItems>
  static __device__ __forceinline__ void add_up(const Team& team, const OfItems& shares, float* sem,
                                                float* unc, std::int64_t first, int count) {
    constexpr int ITEMS = sizeof(shares[0]) / sizeof(Diagonal);
    for (int k = team.thread; k < ITEMS && k < count; k += Team::threads) {
      Diagonal sum{0, 0};
      for (const auto& of_items : shares) {
        sum.sem += of_items[k].sem;
        sum.unc += of_items[k].unc;
      }
      if (sem != nullptr)
        sem[first + k] = sum.sem;
      if (unc != nullptr)
        unc[first + k] = sum.unc;
    }
  }
};

}  // namespace idml::cuda
