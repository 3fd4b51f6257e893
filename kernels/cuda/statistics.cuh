// Row statistics of a tile whose scores are in memory: a thread goes along a row, or a column, or a
// part of it.

#pragma once

#include "tile.cuh"

namespace idml::cuda {

// What is looked up for the items of one side of a tile: their labels, and of each statistic the
// bounds, and in the backward what the derivatives need.
struct Table {
  std::int64_t label[TILE];
  struct {
    float threshold[TILE], above[TILE], below[TILE];
    float factor[TILE], top[TILE];
  } of[MOST_STATISTICS];
};

struct Tables {
  Table rows, cols;
};

// Of an item's others, those that one thread looks at.
template <class Team>
constexpr int PART = TILE / HELPERS<Team>;

__device__ __forceinline__ float raised(float x, float power) {
  float found = 1;
  for (; power > 1; power -= 1)
    found *= x;
  return found * (power == 1 ? x : power == 0.5f ? std::sqrt(x) : std::exp2(power * std::log2(x)));
}

// Whether a statistic looks at a pair. No window hides a NaN.
__device__ __forceinline__ bool looks(const Statistic& statistic, float x, bool same, float above,
                                      float below) {
  const bool where = statistic.where == Where::any || same == (statistic.where == Where::same);
  return where && !(statistic.above >= 0 && x <= above) && !(statistic.below >= 0 && x >= below);
}

// The labels of some items, and their bounds if they have any.
template <class Team>
__device__ __forceinline__ void load_table(const Team& team, Table& table,
                                           const Statistics& statistics, const std::int64_t* labels,
                                           std::int64_t first, int count, bool bounded) {
  for (int k = team.thread; k < TILE; k += Team::threads) {
    const std::int64_t item = first + (k < count ? k : count - 1);
    table.label[k] = labels[item];
    for (int s = 0; s < statistics.count; ++s) {
      const Statistic& statistic = statistics.of[s];
      const auto bound = [&](int row) {
        return row < 0 || !bounded ? 0.0f
                                   : statistics.bounds[row * statistics.bounds_stride + item];
      };
      table.of[s].threshold[k] = bound(statistic.threshold);
      table.of[s].above[k] = bound(statistic.above);
      table.of[s].below[k] = bound(statistic.below);
    }
  }
}

template <class View>
__device__ __forceinline__ void load_tables(View& view, Tables& tables,
                                            const Statistics& statistics) {
  const Here& here = view.here;
  load_table(view.team, tables.rows, statistics, statistics.labels, here.first_row, here.rows,
             true);
  load_table(view.team, tables.cols, statistics, statistics.labels2, here.first_col, here.cols,
             view.walk.symmetric);
}

}  // namespace idml::cuda
