// The epilogue of every backward: the weights of a tile's pairs and their sums; matrix products do
// the rest, see kernels/triton/gradient.py.

#pragma once

#include "tile.cuh"

namespace idml::cuda {

// `upstream(view)` puts the upstream gradient of a tile's scores into memory, with that of their
// mirror image where the tile stands for it.
template <class T, class Upstream>
struct Weigh {
  WeightsTo to;
  Upstream upstream;

  // Of each item, what the warps have that share its pairs.
  template <class Team>
  struct OfWarps {
    float sem_rows[Team::warps_across][TILE], unc_rows[Team::warps_across][TILE];
    float sem_cols[Team::warps_down][TILE], unc_cols[Team::warps_down][TILE];
  };

  template <class View>
  __device__ __forceinline__ void operator()(View& view) const {
    using Team = typename View::Team;
    upstream(view);
    view.team.sync();
    view.begin_again();
    weigh(view);
    view.team.sync();
    const Here& here = view.here;
    const auto& sums = view.memory.template beside<OfWarps<Team>>();
    const std::int64_t row = static_cast<std::int64_t>(here.tile_row) * TILE;
    const std::int64_t col = static_cast<std::int64_t>(here.tile_col) * TILE;
    const auto add_up = [&](const auto& of_warps, float* memory, std::int64_t first, int count) {
      if (memory == nullptr)
        return;
      for (int k = view.team.thread; k < count; k += Team::threads) {
        float sum = 0;
        for (const auto& of_items : of_warps)
          sum += of_items[k];
        memory[first + k] = sum;
      }
    };
    add_up(sums.sem_rows, to.sem_rows, here.tile_col * to.rows_stride + row, here.rows);
    add_up(sums.unc_rows, to.unc_rows, here.tile_col * to.rows_stride + row, here.rows);
    if (!(view.walk.symmetric && here.on_diagonal)) {  // there, these are rows of the same tiles
      add_up(sums.sem_cols, to.sem_cols, here.tile_row * to.cols_stride + col, here.cols);
      add_up(sums.unc_cols, to.unc_cols, here.tile_row * to.cols_stride + col, here.cols);
    }
    if (to.unc != nullptr)
      store_tile(view, static_cast<T*>(to.unc), to.stride, row, col, to.mirrored);
    if (to.sem == nullptr)
      return;
    view.team.sync();
    view.begin_again();
    for_pairs<Team>([&](int i, int j) {
      view.number(view.team.row(i), view.team.col(j)) = of_pair(view.sem, i, j);
    });
    view.team.sync();
    store_tile(view, static_cast<T*>(to.sem), to.stride, row, col, to.mirrored);
  }

  // Leaves the weights of `unc` in memory, those of `sem` in place of the products.
  template <class View>
  __device__ __forceinline__ void weigh(View& view) const {
    using Team = typename View::Team;
    const Team& team = view.team;
    const Metric<float> metric{view.walk.inverse_tau, view.walk.gamma};
    auto& sums = view.memory.template beside<OfWarps<Team>>();
    float sem_rows[Team::ROWS] = {}, unc_rows[Team::ROWS] = {};
#pragma unroll
    for (int j = 0; j < Team::COLS; ++j) {
      float sem_col = 0, unc_col = 0;
#pragma unroll
      for (int i = 0; i < Team::ROWS; ++i) {
        const Pair pair = view.pair(i, j);
        float& number = view.number(team.row(i), team.col(j));
        const float incoming = number;
        const auto found = weights<View::form>(pair.alpha2, pair.beta2, pair.versine,
                                               pair.inverse_row, pair.inverse_col, metric);
        const auto share = [&](float weight) { return pair.there ? incoming * weight : 0.0f; };
        // Rounded before they are summed, so that what two near items do to each other cancels.
        const float product = to_float(rounded<T>(share(found.product)));
        const float sum = to_float(rounded<T>(share(found.sum)));
        constexpr bool distance = View::form == Form::distance;
        of_pair(view.sem, i, j) = product;
        number = sum;
        sem_rows[i] += distance ? -product : share(found.diagonal_row);
        sem_col += distance ? -product : share(found.diagonal_col);
        unc_rows[i] += sum;
        unc_col += sum;
      }
      // All lanes with the same column write the same: a branch would be taken once for all
      // columns, whose sums would have to be kept till then.
      sums.sem_cols[team.down][team.col(j)] = sum_of_lanes<4, 32>(sem_col);
      sums.unc_cols[team.down][team.col(j)] = sum_of_lanes<4, 32>(unc_col);
    }
#pragma unroll
    for (int i = 0; i < Team::ROWS; ++i) {
      sums.sem_rows[team.across][team.row(i)] = sum_of_lanes<1, 4>(sem_rows[i]);
      sums.unc_rows[team.across][team.row(i)] = sum_of_lanes<1, 4>(unc_rows[i]);
    }
  }

  // The sum of the lanes whose numbers differ in the bits from FIRST up to LAST only.
  template <int FIRST, int LAST>
  static __device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int other = FIRST; other < LAST; other *= 2)
      x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
  }
};

}  // namespace idml::cuda
