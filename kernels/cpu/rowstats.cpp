#include "rowstats.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "tile.h"

namespace idml::cpu {

namespace {

// Memory for one row at a time.
template <class T>
struct Scratch {
  explicit Scratch(std::int64_t count)
      : raised(count), terms(count), group(count), looked_at(count) {}

  std::vector<T> raised, terms;
  std::vector<std::int32_t> group;      // one bit of Where for each column, 0 for the row itself
  std::vector<std::int32_t> looked_at;  // by the statistic at hand: 1 or 0
};

// One number of each item: of the row at hand, or of every column.
template <bool of_columns, class T>
struct OfItem {
  const T* data;

  IDML_INLINE T operator[](std::int64_t j) const { return data[j]; }
};

template <class T>
struct OfItem<false, T> {
  T value;

  IDML_INLINE T operator[](std::int64_t) const { return value; }
};

template <bool of_columns, class T>
IDML_INLINE OfItem<of_columns, T> of_item(const Matrix& numbers, std::int64_t row, std::int64_t i) {
  if constexpr (of_columns)
    return {numbers.row<T>(row)};
  else
    return {numbers.row<T>(row)[i]};
}

// Which condition each column meets; returns those that any of them meets, as bits. `own` is where
// the row itself stands among the columns, if it does.
IDML_INLINE std::int32_t group_columns(const Items& cols, std::int64_t label, std::int64_t own,
                                       std::int32_t* group) {
  const std::int64_t count = cols.labels.cols;
  const std::int64_t* labels = cols.labels.row<std::int64_t>(0);
  for (std::int64_t j = 0; j < count; ++j)
    group[j] = labels[j] == label ? same : different;
  if (own >= 0 && own < count)
    group[own] = 0;
  std::int32_t present = 0;
#pragma omp simd reduction(| : present)
  for (std::int64_t j = 0; j < count; ++j)
    present |= group[j];
  return present;
}

// x^power, in `out` unless it is x.
template <class T>
IDML_INLINE const T* raise(const T* x, std::int64_t count, double power, T* out) {
  if (power == 1)
    return x;
  if (power == 2) {
    for (std::int64_t j = 0; j < count; ++j)
      out[j] = x[j] * x[j];
  } else {
    for (std::int64_t j = 0; j < count; ++j)
      out[j] = std::pow(x[j], static_cast<T>(power));
  }
  return out;
}

// Multiplies terms by the derivative of x^power, which is nothing for identical items.
template <class T>
IDML_INLINE void chain(const T* x, std::int64_t count, double power, T* terms) {
  const T p = static_cast<T>(power);
  if (power == 1)
    return;
  if (power == 2) {
    for (std::int64_t j = 0; j < count; ++j)
      terms[j] *= T(2) * x[j];
  } else {
    for (std::int64_t j = 0; j < count; ++j)
      terms[j] = x[j] == T(0) ? T(0) : terms[j] * p * std::pow(x[j], p - T(1));
  }
}

// A NaN is looked at whatever the window.
template <bool of_columns, class T>
IDML_INLINE void look(const Statistic& statistic, const Items& items, std::int64_t i, const T* x,
                      std::int64_t count, const std::int32_t* group, std::int32_t* looked_at) {
  const std::int32_t where = statistic.where;
  for (std::int64_t j = 0; j < count; ++j)
    looked_at[j] = (group[j] & where) != 0;
  if (statistic.above >= 0) {
    const auto above = of_item<of_columns, T>(items.bounds, statistic.above, i);
    for (std::int64_t j = 0; j < count; ++j)
      looked_at[j] = x[j] <= above[j] ? 0 : looked_at[j];
  }
  if (statistic.below >= 0) {
    const auto below = of_item<of_columns, T>(items.bounds, statistic.below, i);
    for (std::int64_t j = 0; j < count; ++j)
      looked_at[j] = x[j] >= below[j] ? 0 : looked_at[j];
  }
}

// Where a statistic of one row is kept between tiles.
struct State {
  const Matrix& all;
  std::int64_t first, item;

  IDML_INLINE double& operator[](std::int64_t k) const { return all.row<double>(first + k)[item]; }
};

// scale (x - shift), rounded: were it contracted with the difference from its maximum, the maximum
// would not be 0 below itself, and a large exponent would lose its digits.
template <class T>
IDML_INLINE void scale_terms(const Statistic& statistic, const T* x, std::int64_t count, T* terms) {
  const T scale = static_cast<T>(statistic.scale);
  const T shift = static_cast<T>(statistic.shift);
  for (std::int64_t j = 0; j < count; ++j)
    terms[j] = scale * (x[j] - shift);
}

template <class T>
IDML_INLINE void add_log_sum_exp(const Statistic& statistic, const T* x, std::int64_t count,
                                 const std::int32_t* looked_at, T* terms, const State& state) {
  const T lowest = -std::numeric_limits<T>::infinity();
  T top = lowest;
  int any_nan = 0;
  scale_terms(statistic, x, count, terms);
#pragma omp simd reduction(max : top) reduction(| : any_nan)
  for (std::int64_t j = 0; j < count; ++j) {
    const T term = looked_at[j] ? terms[j] : lowest;
    terms[j] = term;
    any_nan |= term != term;
    top = term > top ? term : top;
  }
  if (any_nan)
    state[1] = std::numeric_limits<double>::quiet_NaN();
  if (top == lowest)
    return;
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < count; ++j)
    // An infinite top minus itself would be NaN.
    total += exp_negative(terms[j] == top ? T(0) : top - terms[j]);
  const double before = state[0];
  if (top > before) {
    state[1] = state[1] * std::exp(before - top) + total;
    state[0] = top;
  } else {
    state[1] += total * (before == top ? 1.0 : std::exp(top - before));
  }
}

template <class T>
IDML_INLINE void add_sum(const T* x, std::int64_t count, const std::int32_t* looked_at,
                         const State& state) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < count; ++j)
    total += looked_at[j] ? x[j] : T(0);
  state[0] += total;
}

// Looks and counts in one go: there may be many of these, each with another window.
template <class T>
IDML_INLINE void add_count(const Statistic& statistic, const Items& items, std::int64_t i,
                           const T* x, std::int64_t count, const std::int32_t* group,
                           const State& state) {
  const auto bound = [&](std::int64_t row) {  // without one, NaN: no number is beyond it
    return row < 0 ? std::numeric_limits<T>::quiet_NaN() : items.bounds.row<T>(row)[i];
  };
  const T above = bound(statistic.above), below = bound(statistic.below);
  const std::int32_t where = statistic.where;
  std::int32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < count; ++j)
    total += ((group[j] & where) != 0) & !(x[j] <= above) & !(x[j] >= below);
  state[0] += static_cast<double>(total);
}

template <class T>
IDML_INLINE void add_hinge(const Statistic& statistic, T threshold, const T* x, std::int64_t count,
                           const std::int32_t* looked_at, const State& state) {
  const T scale = static_cast<T>(statistic.scale);
  double total = 0;
  std::int64_t positive = 0;
#pragma omp simd reduction(+ : total, positive)
  for (std::int64_t j = 0; j < count; ++j) {
    const T excess = looked_at[j] ? scale * (x[j] - threshold) : T(0);
    total += excess < T(0) ? T(0) : excess;
    positive += excess > T(0) ? 1 : 0;
  }
  state[0] += total;
  state[1] += static_cast<double>(positive);
}

template <class T>
IDML_INLINE void add_histogram(const Statistic& statistic, const T* x, std::int64_t count,
                               const std::int32_t* looked_at, const State& state) {
  const T inverse_width = static_cast<T>(1 / statistic.width);
  for (int b = 0; b <= statistic.bins; ++b) {
    const T centre = static_cast<T>(statistic.low + b * statistic.width);
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (std::int64_t j = 0; j < count; ++j) {
      const T share = T(1) - std::abs(x[j] - centre) * inverse_width;
      total += share < T(0) || !looked_at[j] ? T(0) : share;
    }
    state[b] += total;
  }
}

template <class T>
IDML_INLINE void take_extremum(const Statistic& statistic, const T* x, std::int64_t count,
                               const std::int32_t* looked_at, std::int64_t first_column,
                               const State& state) {
  const T scale = static_cast<T>(statistic.scale);
  const T lowest = -std::numeric_limits<T>::infinity();
  T top = lowest;
  int any = 0, any_nan = 0;
#pragma omp simd reduction(max : top) reduction(| : any, any_nan)
  for (std::int64_t j = 0; j < count; ++j) {
    const T value = looked_at[j] ? scale * x[j] : lowest;
    any |= looked_at[j];
    any_nan |= value != value;
    top = value > top ? value : top;
  }
  // Tiles come in the order of their columns, so the first of equal scores is there already.
  const bool better = top > state[0] || state[1] < 0;
  if (!any || state[0] != state[0] || !(better || any_nan))
    return;
  std::int64_t j = 0;
  while (!looked_at[j] || (any_nan ? x[j] == x[j] : scale * x[j] != top))
    ++j;
  state[0] = scale * x[j];
  state[1] = static_cast<double>(first_column + j);
}

// Takes one row's scores into its statistics. Not inlined: it is the same code for every form.
template <class T>
void reduce_row(const std::vector<Statistic>& statistics, const Items& rows, std::int64_t i,
                const Items& cols, std::int64_t own, const T* scores, Scratch<T>& scratch) {
  const auto body = [&](std::int64_t) IDML_INLINE_LAMBDA {
    const std::int64_t count = cols.labels.cols;
    std::int32_t* group = scratch.group.data();
    std::int32_t* looked_at = scratch.looked_at.data();
    const std::int64_t label = rows.labels.row<std::int64_t>(0)[i];
    const std::int32_t present = group_columns(cols, label, own, group);
    for (const Statistic& statistic : statistics) {
      if (!(present & statistic.where))
        continue;
      const T* x = raise(scores, count, statistic.power, scratch.raised.data());
      const State state{rows.state, statistic.state, i};
      if (statistic.reduction == Reduction::count) {
        add_count(statistic, rows, i, x, count, group, state);
        continue;
      }
      look<false>(statistic, rows, i, x, count, group, looked_at);
      switch (statistic.reduction) {
        case Reduction::log_sum_exp:
          add_log_sum_exp(statistic, x, count, looked_at, scratch.terms.data(), state);
          break;
        case Reduction::sum:
          add_sum(x, count, looked_at, state);
          break;
        case Reduction::count:
          break;
        case Reduction::hinge:
          add_hinge(statistic, rows.bounds.row<T>(statistic.threshold)[i], x, count, looked_at,
                    state);
          break;
        case Reduction::histogram:
          add_histogram(statistic, x, count, looked_at, state);
          break;
        case Reduction::extremum:
          take_extremum(statistic, x, count, looked_at, cols.first, state);
          break;
      }
    }
  };
  run(isa(), body, i);
}

// The derivative of a histogram with respect to x, for an upstream gradient of its bins: the slope
// between the two centres that x lies between, and none on a centre.
template <class T>
IDML_INLINE T slope_at(const Statistic& statistic, const Matrix& upstream, std::int64_t item, T x) {
  const T position = (x - static_cast<T>(statistic.low)) / static_cast<T>(statistic.width);
  const T floor = std::floor(position);
  if (!(floor >= T(-1) && floor <= T(statistic.bins)) || floor == position)
    return position != position ? position : T(0);
  const int b = static_cast<int>(floor);
  const T left = b < 0 ? T(0) : upstream.row<T>(statistic.value + b)[item];
  const T right = b == statistic.bins ? T(0) : upstream.row<T>(statistic.value + b + 1)[item];
  return (right - left) / static_cast<T>(statistic.width);
}

// gradient[j] += the upstream gradient of the row's statistics times their derivatives with respect
// to its scores; `of_columns`: of every column's statistics, with respect to the same scores.
template <bool of_columns, class T>
IDML_INLINE void differentiate(const std::vector<Statistic>& statistics, const Items& items,
                               std::int64_t i, std::int64_t first_other, const T* scores,
                               std::int64_t count, std::int32_t present, Scratch<T>& scratch,
                               T* gradient) {
  T* terms = scratch.terms.data();
  std::int32_t* looked_at = scratch.looked_at.data();
  for (const Statistic& statistic : statistics) {
    if (statistic.value < 0 || !(present & statistic.where))
      continue;
    const T* x = raise(scores, count, statistic.power, scratch.raised.data());
    look<of_columns>(statistic, items, i, x, count, scratch.group.data(), looked_at);
    const auto upstream = of_item<of_columns, T>(items.upstream, statistic.value, i);
    const T scale = static_cast<T>(statistic.scale);
    switch (statistic.reduction) {
      case Reduction::log_sum_exp: {
        const auto top = of_item<of_columns, double>(items.state, statistic.state, i);
        const auto total = of_item<of_columns, double>(items.state, statistic.state + 1, i);
        scale_terms(statistic, x, count, terms);
#pragma omp simd
        for (std::int64_t j = 0; j < count; ++j) {
          const T below_top = static_cast<T>(top[j]) - terms[j];
          const T share = exp_negative(below_top) / static_cast<T>(total[j]);
          terms[j] = looked_at[j] ? upstream[j] * scale * share : T(0);
        }
        break;
      }
      case Reduction::sum:
        for (std::int64_t j = 0; j < count; ++j)
          terms[j] = looked_at[j] ? upstream[j] : T(0);
        break;
      case Reduction::hinge: {
        const auto threshold = of_item<of_columns, T>(items.bounds, statistic.threshold, i);
        for (std::int64_t j = 0; j < count; ++j) {
          const bool positive = looked_at[j] && scale * (x[j] - threshold[j]) > T(0);
          terms[j] = positive ? upstream[j] * scale : T(0);
        }
        break;
      }
      case Reduction::histogram:
        for (std::int64_t j = 0; j < count; ++j)
          terms[j] =
              looked_at[j] ? slope_at(statistic, items.upstream, of_columns ? j : i, x[j]) : T(0);
        break;
      case Reduction::extremum: {
        const auto column = of_item<of_columns, double>(items.state, statistic.state + 1, i);
        for (std::int64_t j = 0; j < count; ++j) {
          const double other = static_cast<double>(first_other + (of_columns ? 0 : j));
          terms[j] = column[j] == other ? upstream[j] : T(0);
        }
        break;
      }
      case Reduction::count:
        continue;
    }
    chain(scores, count, statistic.power, terms);
    for (std::int64_t j = 0; j < count; ++j)
      gradient[j] += terms[j];
  }
}

// The gradient of one row's scores. Not inlined, like `reduce_row`.
template <class T>
void differentiate_row(const std::vector<Statistic>& statistics, const Items& rows, std::int64_t i,
                       const Items& cols, bool symmetric, const T* scores, Scratch<T>& scratch,
                       T* gradient) {
  const auto body = [&](std::int64_t) IDML_INLINE_LAMBDA {
    const std::int64_t count = cols.labels.cols;
    const std::int64_t label = rows.labels.row<std::int64_t>(0)[i];
    const std::int64_t own = symmetric ? rows.first + i - cols.first : -1;
    const std::int32_t present = group_columns(cols, label, own, scratch.group.data());
    std::fill_n(gradient, count, T(0));
    differentiate<false>(statistics, rows, i, cols.first, scores, count, present, scratch,
                         gradient);
    if (symmetric)
      differentiate<true>(statistics, cols, 0, rows.first + i, scores, count, present, scratch,
                          gradient);
  };
  run(isa(), body, i);
}

}  // namespace

template <class T>
void rowstats_forward(const Tile& tile, const AnyMetric& metric,
                      const std::vector<Statistic>& statistics, const Items& rows,
                      const Items& cols, const Matrix& scores, int threads) {
  const bool symmetric = scores.data != 0;
  const bool for_cols = symmetric && rows.first != cols.first;
  with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    parallel(block_count(tile.rows()), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      Scratch<T> scratch(tile.cols());
      walk_block<form, Squares::all, T>(tile, block, [&](const Row<T>& row) IDML_INLINE_LAMBDA {
        T* found = for_cols ? scores.row<T>(row.index) : row.sem;
        score_row<form>(row, 0, metric.as<T>(), found);
        const std::int64_t own = symmetric ? rows.first + row.index - cols.first : -1;
        reduce_row(statistics, rows, row.index, cols, own, found, scratch);
      });
    });
  });
  if (!for_cols)
    return;
  const std::int64_t height = tile.rows(), count = tile.cols();
  parallel(block_count(count), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
    const std::int64_t begin = block * block_rows;
    const std::int64_t end = std::min(begin + block_rows, count);
    std::vector<T> transposed(block_rows * height);
    for (std::int64_t i = 0; i < height; ++i)
      for (std::int64_t j = begin; j < end; ++j)
        transposed[(j - begin) * height + i] = scores.row<T>(i)[j];
    Scratch<T> scratch(height);
    for (std::int64_t j = begin; j < end; ++j)
      reduce_row(statistics, cols, j, rows, -1, &transposed[(j - begin) * height], scratch);
  });
}

template <class T>
NearPairs rowstats_backward(const Tile& tile, const AnyMetric& metric,
                            const std::vector<Statistic>& statistics, const Items& rows,
                            const Items& cols, bool symmetric, const Gradients& gradients,
                            int threads) {
  const std::int64_t count = tile.cols();
  return with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    return weigh_tile<form, Squares::all>(
        tile, metric.as<T>(), gradients, threads, [&](std::int64_t) IDML_INLINE_LAMBDA {
          return [&, scratch = Scratch<T>(count), scores = std::vector<T>(count),
                  gradient = std::vector<T>(count)](const Row<T>& row) mutable IDML_INLINE_LAMBDA {
            score_row<form>(row, 0, metric.as<T>(), scores.data());
            differentiate_row(statistics, rows, row.index, cols, symmetric, scores.data(), scratch,
                              gradient.data());
            return Upstream<T>{gradient.data(), nullptr};
          };
        });
  });
}

template void rowstats_forward<float>(const Tile&, const AnyMetric&, const std::vector<Statistic>&,
                                      const Items&, const Items&, const Matrix&, int);
template void rowstats_forward<double>(const Tile&, const AnyMetric&, const std::vector<Statistic>&,
                                       const Items&, const Items&, const Matrix&, int);
template NearPairs rowstats_backward<float>(const Tile&, const AnyMetric&,
                                            const std::vector<Statistic>&, const Items&,
                                            const Items&, bool, const Gradients&, int);
template NearPairs rowstats_backward<double>(const Tile&, const AnyMetric&,
                                             const std::vector<Statistic>&, const Items&,
                                             const Items&, bool, const Gradients&, int);

}  // namespace idml::cpu
