#include "nearest.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "random.h"
#include "tile.h"

namespace idml::cpu {

namespace {

// Columns whose scores are held at a time.
constexpr std::int64_t chunk_cols = 2048;

// Keys as integers of the same order, NaN above all others.
IDML_INLINE std::uint32_t order_of(float key) {
  const std::uint32_t bits = bits_as<std::uint32_t>(key + 0.0f);  // -0 becomes 0
  const std::uint32_t sign = 0x80000000u;
  return key != key ? ~0u : bits & sign ? ~bits : bits | sign;
}

IDML_INLINE std::uint64_t order_of(double key) {
  const std::uint64_t bits = bits_as<std::uint64_t>(key + 0.0);
  const std::uint64_t sign = 0x8000000000000000u;
  return key != key ? ~std::uint64_t(0) : bits & sign ? ~bits : bits | sign;
}

template <class T>
using Order = decltype(order_of(T()));

// The k-th largest of some integers: bit by bit the largest one that k of them reach. Counting is
// vectorised, so this takes a tenth of std::nth_element's time.
template <class Integer>
IDML_INLINE Integer kth_largest(const Integer* orders, std::int64_t count, std::int64_t k) {
  Integer kth = 0;
  for (Integer bit = Integer(1) << (8 * sizeof(Integer) - 1); bit; bit >>= 1) {
    const Integer trial = kth | bit;
    Integer reach = 0;  // as wide as what it counts, for the vectors' sake
    for (std::int64_t c = 0; c < count; ++c)
      reach += orders[c] >= trial;
    kth = static_cast<std::int64_t>(reach) >= k ? trial : kth;
  }
  return kth;
}

// Memory for one row at a time.
template <class T>
struct Scratch {
  Scratch(bool draws, std::int64_t room)
      : scores(chunk_cols), keys(chunk_cols), wanted(chunk_cols), orders(room) {
    if (draws)
      words.resize(chunk_cols + 8);
  }

  // Of some columns of the row:
  std::vector<T> scores, keys;
  std::vector<std::uint8_t> wanted;
  std::vector<std::uint32_t> words;
  // Of the row's candidates:
  std::vector<Order<T>> orders;
};

// `Best` of one row.
template <class T>
struct RowBest {
  IDML_INLINE RowBest(const Best& best, std::int64_t i)
      : wanted(best.wanted),
        room(best.keys.cols),
        keys(best.keys.row<T>(i)),
        scores(best.scores.row<T>(i)),
        columns(best.columns.row<std::int64_t>(i)),
        count(best.counts.row<std::int64_t>(0)[i]),
        threshold(best.thresholds.row<T>(0)[i]) {}

  IDML_INLINE void add(T key, T score, std::int64_t column, std::vector<Order<T>>& orders) {
    keys[count] = key;
    scores[count] = score;
    columns[count] = column;
    if (++count == room)
      tighten(orders);
  }

  // Keeps the best alone, in the order in which they came: that of their columns.
  IDML_INLINE void tighten(std::vector<Order<T>>& orders) {
    for (std::int64_t c = 0; c < count; ++c)
      orders[c] = order_of(keys[c]);
    const Order<T> bar = kth_largest(orders.data(), count, wanted);
    std::int64_t ties = wanted;
    for (std::int64_t c = 0; c < count; ++c)
      ties -= orders[c] > bar;
    std::int64_t kept = 0;
    for (std::int64_t c = 0; c < count; ++c) {
      const bool tied = orders[c] == bar;
      threshold = tied ? keys[c] : threshold;
      keys[kept] = keys[c];
      scores[kept] = scores[c];
      columns[kept] = columns[c];
      kept += orders[c] > bar || (tied && ties > 0);
      ties -= tied;
    }
    count = kept;
  }

  const std::int64_t wanted, room;
  T* const keys;
  T* const scores;
  std::int64_t* const columns;
  std::int64_t& count;
  T& threshold;
};

// keys[j] = ln(weight of scores[j]) - ln(E of the pair): the order of the largest is that of the
// draws, one after the other, without replacement (Efraimidis and Spirakis, Weighted Random
// Sampling with a Reservoir, 2006). NaN stays NaN.
template <class T>
IDML_INLINE void draw_keys(const DistanceWeighted& weights, std::int64_t row,
                           std::int64_t first_col, std::int64_t count, Scratch<T>& scratch) {
  const T* scores = scratch.scores.data();
  T* keys = scratch.keys.data();
  std::uint32_t* words = scratch.words.data();
  const std::int64_t first_group = first_col / 4;
  const std::int64_t groups = (first_col + count + 3) / 4 - first_group;
  for (std::int64_t g = 0; g < groups; ++g) {
    const Words drawn = random_words(weights.seed, row, first_group + g);
    for (int w = 0; w < 4; ++w)
      words[4 * g + w] = drawn.word[w];
  }
  words += first_col - 4 * first_group;
  const T of_distance = static_cast<T>(2 - weights.width);
  const T of_rest = static_cast<T>((3 - weights.width) / 2);
  const T cutoff = static_cast<T>(weights.cutoff);
  const T upto = static_cast<T>(weights.upto);
  for (std::int64_t j = 0; j < count; ++j) {
    const T d = scores[j] < cutoff ? cutoff : scores[j];
    // Not looked at below; it must only not be the logarithm of a negative number.
    const T square = d < upto ? d * d : upto * upto;
    const T safe = d != d ? d : square;
    const T log_weight =
        of_distance / T(2) * natural_log(safe) + of_rest * natural_log(T(1) - safe / T(4));
    keys[j] = log_weight - log_exponential<T>(words[j]);
  }
}

// Which of the columns begin ... begin + count - 1 of a row, whose scores and keys are there, it
// looks at and does not leave out because of their key.
template <class T>
IDML_INLINE void find_wanted(const Choice& choice, std::int64_t row, std::int64_t begin,
                             std::int64_t count, T threshold, Scratch<T>& scratch) {
  const T* keys = scratch.keys.data();
  const T* scores = scratch.scores.data();
  std::uint8_t* wanted = scratch.wanted.data();
  for (std::int64_t j = 0; j < count; ++j)
    wanted[j] = keys[j] <= threshold ? 0 : 1;
  if (choice.above.data) {
    const T above = choice.above.row<T>(0)[row];
    for (std::int64_t j = 0; j < count; ++j)
      wanted[j] &= scores[j] <= above ? 0 : 1;
  }
  if (choice.draws) {
    const T upto = static_cast<T>(choice.weights.upto);
    for (std::int64_t j = 0; j < count; ++j)
      wanted[j] &= scores[j] >= upto ? 0 : 1;
  }
  if (!choice.same || !choice.different) {
    const std::int64_t label = choice.labels.row<std::int64_t>(0)[row];
    const std::int64_t* labels = choice.labels2.row<std::int64_t>(0) + begin;
    for (std::int64_t j = 0; j < count; ++j)
      wanted[j] &= (labels[j] == label) == choice.same ? 1 : 0;
  }
  const std::int64_t self = choice.first_row + row - choice.first_col - begin;
  if (choice.exclude_self && 0 <= self && self < count)
    wanted[self] = 0;
  // Columns are looked through in groups of eight.
  std::fill(wanted + count, wanted + (count + 7) / 8 * 8, std::uint8_t(0));
}

// Whether none of eight columns is wanted.
IDML_INLINE bool none_wanted(const std::uint8_t* wanted) {
  std::uint64_t all;
  std::memcpy(&all, wanted, sizeof all);
  return all == 0;
}

template <class T>
IDML_INLINE void offer_chunk(const Choice& choice, std::int64_t row, std::int64_t begin,
                             std::int64_t count, Scratch<T>& scratch, RowBest<T>& best) {
  find_wanted(choice, row, begin, count, best.threshold, scratch);
  for (std::int64_t first = 0; first < count; first += 8) {
    if (none_wanted(&scratch.wanted[first]))
      continue;
    for (std::int64_t j = first; j < first + 8; ++j)
      // The threshold may have risen since.
      if (scratch.wanted[j] && !(scratch.keys[j] <= best.threshold))
        best.add(scratch.keys[j], scratch.scores[j], choice.first_col + begin + j, scratch.orders);
  }
}

template <Form form, class T>
IDML_INLINE void offer_row(const Row<T>& row, const Choice& choice, Metric<T> metric,
                           Scratch<T>& scratch, RowBest<T> best) {
  for (std::int64_t begin = 0; begin < row.count; begin += chunk_cols) {
    const std::int64_t count = std::min(chunk_cols, row.count - begin);
    const Row<T> part{row.index,           count,
                      row.sem + begin,     row.unc ? row.unc + begin : nullptr,
                      row.inverse,         row.col_inverses + begin,
                      row.versines + begin};
    const T* scores = scratch.scores.data();
    T* keys = scratch.keys.data();
    score_row<form>(part, 0, metric, scratch.scores.data());
    if (choice.draws)
      draw_keys(choice.weights, choice.first_row + row.index, choice.first_col + begin, count,
                scratch);
    else
      for (std::int64_t j = 0; j < count; ++j)
        keys[j] = choice.largest ? scores[j] : -scores[j];
    offer_chunk(choice, row.index, begin, count, scratch, best);
  }
}

}  // namespace

template <class T>
void nearest_offer(const Tile& tile, const AnyMetric& metric, const Choice& choice,
                   const Best& best, int threads) {
  with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    parallel(block_count(tile.rows()), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      Scratch<T> scratch(choice.draws, best.keys.cols);
      walk_block<form, Squares::all, T>(tile, block, [&](const Row<T>& row) IDML_INLINE_LAMBDA {
        offer_row<form>(row, choice, metric.as<T>(), scratch, RowBest<T>(best, row.index));
      });
    });
  });
}

template <class T>
void nearest_finish(const Best& best, const Results& results, int threads) {
  parallel(block_count(best.keys.rows), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
    std::vector<Order<T>> orders(best.keys.cols);
    std::vector<std::pair<Order<T>, std::int64_t>> places;
    const std::int64_t end = std::min((block + 1) * block_rows, best.keys.rows);
    for (std::int64_t i = block * block_rows; i < end; ++i) {
      RowBest<T> row(best, i);
      if (row.count > row.wanted)
        row.tighten(orders);
      places.clear();
      for (std::int64_t c = 0; c < row.count; ++c)
        places.push_back({order_of(row.keys[c]), -c});
      std::sort(places.begin(), places.end(), std::greater<>());
      T* keys = results.keys.row<T>(i);
      T* scores = results.scores.row<T>(i);
      std::int64_t* columns = results.columns.row<std::int64_t>(i);
      for (std::int64_t c = 0; c < row.count; ++c) {
        const std::int64_t place = -places[c].second;
        keys[c] = row.keys[place];
        scores[c] = row.scores[place];
        columns[c] = row.columns[place];
      }
    }
  });
}

template void nearest_offer<float>(const Tile&, const AnyMetric&, const Choice&, const Best&, int);
template void nearest_offer<double>(const Tile&, const AnyMetric&, const Choice&, const Best&, int);
template void nearest_finish<float>(const Best&, const Results&, int);
template void nearest_finish<double>(const Best&, const Results&, int);

}  // namespace idml::cpu
