#include "gradient.cuh"
#include "launch.h"
#include "statistics.cuh"
#include "walk.cuh"

namespace idml::cuda {
namespace {

// What part of a tile knows of an item, of one statistic. For an extremum `b` has the bits of one
// more than where it is, 0 for nowhere.
struct State {
  float a, b;
};

// The epilogue of the forward: what a tile knows of its rows, and of its columns if it stands for
// its mirror image.
struct Reduce {
  Statistics statistics;
  OfTiles rows, cols;

  template <class View>
  __device__ __forceinline__ void operator()(View& view) const {
    put_scores(view);
    Tables& tables = view.memory.template beside<Tables>();
    load_tables(view, tables, statistics);
    view.team.sync();
    reduce<false>(view, tables.rows, tables.cols);
    if (view.walk.symmetric && !view.here.on_diagonal)
      reduce<true>(view, tables.cols, tables.rows);
  }

  // Along the rows, or along the columns.
  template <bool OF_COLS, class View>
  __device__ __forceinline__ void reduce(View& view, Table& items, const Table& others) const {
    using Team = typename View::Team;
    const Here& here = view.here;
    const int count = OF_COLS ? here.cols : here.rows;
    const int other_count = OF_COLS ? here.rows : here.cols;
    const std::int64_t first_other = OF_COLS ? here.first_row : here.first_col;
    const int item = view.team.thread % TILE, part = view.team.thread / TILE;
    // An item is not its own other.
    const int own = !view.walk.symmetric ? -1 : OF_COLS ? item + here.own : item - here.own;
    const int begin = part * PART<Team>;
    const int end = begin + PART<Team> < other_count ? begin + PART<Team> : other_count;
    for (int s = 0; s < statistics.count; ++s) {
      const Statistic& statistic = statistics.of[s];
      const float above = items.of[s].above[item], below = items.of[s].below[item];
      const std::int64_t label = items.label[item];
      // Calls `call(x, other)` for what the statistic looks at.
      const auto for_looked = [&](const auto& call) {
        for (int other = begin; other < end; ++other) {
          const float score = OF_COLS ? view.number(other, item) : view.number(item, other);
          const float x = raised(score, statistic.power);
          if (other != own && looks(statistic, x, label == others.label[other], above, below))
            call(x, other);
        }
      };
      State found = reduce_part(statistic, items.of[s].threshold[item], first_other, for_looked);
      if constexpr (HELPERS<Team> == 2) {  // the second part's goes through shared memory
        if (part == 1) {
          items.of[s].factor[item] = found.a;
          items.of[s].top[item] = found.b;
        }
        view.team.sync();
        if (part == 0)
          found = together(statistic, found, {items.of[s].factor[item], items.of[s].top[item]});
      }
      if (part == 0 && item < count) {
        const OfTiles& to = OF_COLS ? cols : rows;
        float* memory = to.data + (OF_COLS ? here.tile_row : here.tile_col) * to.tile_stride +
                        statistic.state * to.state_stride +
                        static_cast<std::int64_t>(OF_COLS ? here.tile_col : here.tile_row) * TILE +
                        item;
        *memory = found.a;
        if (has_two(statistic.reduction))
          memory[to.state_stride] = found.b;
      }
    }
  }

  static __device__ __forceinline__ bool has_two(Reduction reduction) {
    return reduction != Reduction::sum && reduction != Reduction::count;
  }

  template <class ForLooked>
  static __device__ __forceinline__ State reduce_part(const Statistic& statistic, float threshold,
                                                      std::int64_t first_other,
                                                      const ForLooked& for_looked) {
    const float scale = statistic.scale;
    State found{0, 0};
    switch (statistic.reduction) {
      case Reduction::log_sum_exp: {
        // The x of the largest term and not that term: it is exact, and so are differences.
        const float sign = scale < 0 ? -1.0f : 1.0f;
        float top = -std::numeric_limits<float>::infinity();
        for_looked([&](float x, int) { top = sign * x > top ? sign * x : top; });
        found.a = sign * top;
        for_looked([&](float x, int) {
          found.b += x == found.a ? 1.0f : std::exp(scale * (x - found.a));
        });
        if (found.b == 0)
          found.a = 0;
        break;
      }
      case Reduction::sum:
        for_looked([&](float x, int) { found.a += x; });
        break;
      case Reduction::count:
        for_looked([&](float, int) { found.a += 1; });
        break;
      case Reduction::hinge:
        for_looked([&](float x, int) {
          const float excess = scale * (x - threshold);
          found.a += excess < 0 ? 0.0f : excess;
          found.b += excess > 0 ? 1.0f : 0.0f;
        });
        break;
      case Reduction::extremum: {
        int column = 0;
        for_looked([&](float x, int other) {
          if (is_better(scale, x, found.a, column != 0)) {
            found.a = x;
            column = static_cast<int>(first_other) + other + 1;
          }
        });
        found.b = bits_as<float>(column);
        break;
      }
    }
    return found;
  }

  // Whether an extremum takes the place of an earlier one: a NaN stays, and comes before numbers.
  static __device__ __forceinline__ bool is_better(float scale, float x, float before, bool any) {
    return !any || (before == before && !(scale * x <= scale * before));
  }

  static __device__ __forceinline__ State together(const Statistic& statistic, State first,
                                                   State second) {
    const float scale = statistic.scale;
    if (statistic.reduction == Reduction::log_sum_exp) {
      if (second.b == 0)
        return first;
      if (first.b == 0)
        return second;
      const bool is_first = scale < 0 ? first.a <= second.a : first.a >= second.a;
      const float most = is_first ? first.a : second.a, least = is_first ? second.a : first.a;
      const float fade = least == most ? 1.0f : std::exp(scale * (least - most));
      return {most, is_first ? first.b + second.b * fade : second.b + first.b * fade};
    }
    if (statistic.reduction == Reduction::extremum) {
      const bool any = bits_as<std::int32_t>(first.b) != 0;
      const bool another = bits_as<std::int32_t>(second.b) != 0;
      return another && is_better(scale, second.a, first.a, any) ? second : first;
    }
    return {first.a + second.a, first.b + second.b};
  }
};

// The upstream gradient of scores: of the statistics of their rows, and of those of their columns
// if these are items as well.
struct Differentiate {
  Statistics statistics;
  Learned learned;

  using Memory = Tables;

  template <class View>
  __device__ __forceinline__ void load_tile(View& view, Tables& tables) const {
    load_tables(view, tables, statistics);
    load_learned(view.team, tables.rows, view.here.first_row, view.here.rows);
    if (view.walk.symmetric)
      load_learned(view.team, tables.cols, view.here.first_col, view.here.cols);
  }

  template <class View>
  __device__ __forceinline__ void load_strip(View&, Tables&, int) const {}

  template <class View>
  __device__ __forceinline__ float of_pair(View& view, const Tables& tables, int row, int col,
                                           const Pair& pair) const {
    const bool symmetric = view.walk.symmetric;
    if (symmetric && row - col == view.here.own)
      return 0;
    const Metric<float> metric{view.walk.inverse_tau, view.walk.gamma};
    const float found = score<View::form>(pair.alpha2, pair.beta2, pair.versine, metric);
    const bool same = tables.rows.label[row] == tables.cols.label[col];
    float sum = 0;
    for (int s = 0; s < statistics.count; ++s) {
      const Statistic& statistic = statistics.of[s];
      if (statistic.value < 0)
        continue;
      const float x = raised(found, statistic.power);
      float slope = derivative(statistic, s, tables.rows, row, x, same, view.here.first_col + col);
      if (symmetric)
        slope += derivative(statistic, s, tables.cols, col, x, same, view.here.first_row + row);
      if (statistic.power != 1)  // nothing for identical items
        slope = found == 0 ? 0.0f : slope * statistic.power * raised(found, statistic.power - 1);
      sum += slope;
    }
    return sum;
  }

  template <class Team>
  __device__ __forceinline__ void load_learned(const Team& team, Table& table, std::int64_t first,
                                               int count) const {
    for (int k = team.thread; k < TILE; k += Team::threads) {
      const std::int64_t item = first + (k < count ? k : count - 1);
      for (int s = 0; s < statistics.count; ++s) {
        const Statistic& statistic = statistics.of[s];
        if (statistic.value < 0)
          continue;
        const double* state = learned.state + statistic.state * learned.count + item;
        float factor = learned.upstream[statistic.value * learned.count + item];
        float top = 0;
        if (statistic.reduction == Reduction::log_sum_exp) {
          top = static_cast<float>(state[0]);
          factor *= statistic.scale / static_cast<float>(state[learned.count]);
        } else if (statistic.reduction == Reduction::hinge) {
          factor *= statistic.scale;
        } else if (statistic.reduction == Reduction::extremum) {
          top = bits_as<float>(static_cast<std::int32_t>(state[learned.count]) - 1);
        }
        table.of[s].factor[k] = factor;
        table.of[s].top[k] = top;
      }
    }
  }

  static __device__ __forceinline__ float derivative(const Statistic& statistic, int s,
                                                     const Table& table, int item, float x,
                                                     bool same, std::int64_t other) {
    const auto& of = table.of[s];
    if (!looks(statistic, x, same, of.above[item], of.below[item]))
      return 0;
    const float factor = of.factor[item], top = of.top[item];
    switch (statistic.reduction) {
      case Reduction::log_sum_exp:
        return factor * (x == top ? 1.0f : std::exp(statistic.scale * (x - top)));
      case Reduction::hinge: {
        const float excess = statistic.scale * (x - of.threshold[item]);
        return excess > 0 ? factor : excess <= 0 ? 0.0f : excess;  // a NaN comes out
      }
      case Reduction::extremum:
        return other == bits_as<std::int32_t>(top) ? factor : 0.0f;
      default:
        return factor;
    }
  }
};

}  // namespace

void rowstats(const Walk& walk, const Statistics& statistics, const OfTiles& rows,
              const OfTiles& cols, void* stream) {
  walk_all(walk, [&](auto) { return Reduce{statistics, rows, cols}; }, stream);
}

void weigh_rowstats(const Walk& walk, const WeightsTo& to, const Statistics& statistics,
                    const Learned& learned, void* stream) {
  walk_all(
      walk,
      [&](auto number) {
        return Weigh<decltype(number), Differentiate>{to, {statistics, learned}};
      },
      stream);
}

}  // namespace idml::cuda
