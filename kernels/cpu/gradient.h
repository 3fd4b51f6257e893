// The backward of a tile: the pairs get their weights, so that the gradients of the embeddings are
// matrix products with them,
//
//   grad sem += sem.weights @ sem2     grad unc += unc.weights @ unc2     and transposed for the
//   columns,
//
// plus what multiplies an item's own embedding. A near-duplicate's weight can be so large that this
// sum would cancel: it is 0, and the pair is added apart, from its difference. All sums are taken
// in an order that does not depend on the number of threads.

#pragma once

#include <algorithm>
#include <vector>

#include "tile.h"

namespace idml::cpu {

// Where a tile adds up for one embedding of the rows and one of the columns, besides the products.
// A side that is not wanted has no diagonal; one that no product is added to (the other side is
// zero) has a diagonal only.
struct Gradient {
  Matrix row_diagonal, col_diagonal;  // [1, N] and [1, M], what multiplies the items themselves
  Matrix rows, cols;                  // [N, D] and [M, D]
  bool starts_rows, starts_cols;      // whether they are empty memory as yet
};

struct Gradients {
  Gradient sem, unc;
  // [2, N] of double, absent if not wanted: the sums over each row's pairs of the score's
  // derivative with respect to gamma, and of that times beta (beta^2 in the official form).
  Matrix metric;
};

// Whether a tile had pairs that were left out of its products. Their gradient has then been written
// to where it belongs; else memory that is empty as yet still is.
struct NearPairs {
  bool sem, unc;
};

// What a backward knows of a row: the upstream gradient of its pairs, and their scores if alpha has
// to be computed from them.
template <class T>
struct Upstream {
  const T* gradient;
  const T* scores;
};

template <class T>
struct Pair {
  std::int64_t row, col;
  T weight;
};

// What the blocks of rows add up for one embedding.
template <class T>
struct Sums {
  Sums(std::int64_t rows, std::int64_t cols)
      : rows(rows), cols(block_count(rows), std::vector<T>(cols)), near(block_count(rows)) {}

  std::vector<T> rows;                     // [N] what multiplies the rows' own embedding
  std::vector<std::vector<T>> cols;        // [M] of each block, the same for the columns
  std::vector<std::vector<Pair<T>>> near;  // of each block, the pairs left out of the products
};

// Memory for one row at a time.
template <class T>
struct RowScratch {
  explicit RowScratch(std::int64_t count) : diagonal(count), near_sem(count), near_unc(count) {}

  std::vector<T> diagonal;
  std::vector<std::int32_t> near_sem, near_unc;  // 1 for a pair left out of the products
};

template <class T>
IDML_INLINE double sum(const T* terms, std::int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < count; ++j)
    total += terms[j];
  return total;
}

template <Form form, Squares squares, class T>
IDML_INLINE Weights<T> weights_of_pair(const Row<T>& row, std::int64_t j, T alpha2, T beta2,
                                       const T* scores, Metric<T> metric) {
  if constexpr (squares == Squares::without_alpha)
    return distance_weights(scores[j], std::sqrt(beta2), metric);
  else if constexpr (form == Form::distance)
    return weights<form>(alpha2, beta2, T(0), T(0), T(0), metric);
  else
    return weights<form>(alpha2, beta2, row.versines[j], row.inverse, row.col_inverses[j], metric);
}

// The row's share of the gradients of gamma and tau, see Gradients::metric. Apart, because few
// metrics learn.
template <Form form, Squares squares, class T>
IDML_INLINE void add_of_metric(const Row<T>& row, Metric<T> metric, const Upstream<T>& upstream,
                               const Matrix& of_metric) {
  double of_gamma = 0, of_tau = 0;
#pragma omp simd reduction(+ : of_gamma, of_tau)
  for (std::int64_t j = 0; j < row.count; ++j) {
    const T beta2 = row.unc ? row.unc[j] : T(0);
    const Weights<T> w =
        weights_of_pair<form, squares>(row, j, row.sem[j], beta2, upstream.scores, metric);
    const T term = upstream.gradient[j] * w.of_gamma;
    of_gamma += term;
    of_tau += term * (form == Form::official ? beta2 : std::sqrt(beta2));
  }
  of_metric.row<double>(0)[row.index] += of_gamma;
  of_metric.row<double>(1)[row.index] += of_tau;
}

template <Form form, Squares squares, class T>
IDML_INLINE void weigh_row(const Tile& tile, const Row<T>& row, Metric<T> metric,
                           const Upstream<T>& upstream, const Matrix& of_metric, std::int64_t block,
                           Sums<T>& sem, Sums<T>& unc, RowScratch<T>& scratch) {
  const std::int64_t i = row.index;
  const T* incoming = upstream.gradient;
  const T sem_square = tile.sem.rows.squares.row<T>(0)[i];
  const T* sem_squares = tile.sem.cols.squares.row<T>(0);
  const T unc_square = row.unc ? tile.unc.rows.squares.row<T>(0)[i] : T(0);
  const T* unc_squares = row.unc ? tile.unc.cols.squares.row<T>(0) : nullptr;
  T* diagonal = scratch.diagonal.data();
  std::int32_t* near_sem = scratch.near_sem.data();
  std::int32_t* near_unc = scratch.near_unc.data();
  T* sem_weights = begin_row(tile.sem.weights, i, row.sem);
  T* unc_weights = row.unc ? begin_row(tile.unc.weights, i, row.unc) : nullptr;
  T* col_sem = sem.cols[block].data();
  T* col_unc = unc.cols[block].data();
  if (of_metric.data)
    add_of_metric<form, squares>(row, metric, upstream, of_metric);
  int any_near = 0;
#pragma omp simd reduction(| : any_near)
  for (std::int64_t j = 0; j < row.count; ++j) {
    const T beta2 = row.unc ? row.unc[j] : T(0);
    const Weights<T> w =
        weights_of_pair<form, squares>(row, j, row.sem[j], beta2, upstream.scores, metric);
    // The weight of sem grows without bound only in the distance form; in the others it has the
    // versine as a factor, which falls as fast as alpha^2.
    const T nearness = near<T> * (sem_square + sem_squares[j]) * w.inverse_alpha * w.inverse_alpha;
    const bool is_near = form == Form::distance && nearness > T(1);
    const T of_sem = is_near ? T(0) : incoming[j];
    sem_weights[j] = of_sem * w.product;
    diagonal[j] = of_sem * w.diagonal_row;
    col_sem[j] += of_sem * w.diagonal_col;
    if constexpr (form == Form::distance) {
      near_sem[j] = is_near;
      any_near |= is_near;
    }
    if (row.unc) {
      const bool is_opposite = beta2 < near<T> * (unc_square + unc_squares[j]);
      const T of_unc = is_opposite ? T(0) : incoming[j];
      unc_weights[j] = of_unc * w.sum;
      col_unc[j] += of_unc * w.sum;
      near_unc[j] = is_opposite;
      any_near |= is_opposite;
    }
  }
  sem.rows[i] = static_cast<T>(sum(diagonal, row.count));
  round_row(sem_weights, tile.sem.weights, i);
  if (row.unc) {
    unc.rows[i] = static_cast<T>(sum(unc_weights, row.count));
    round_row(unc_weights, tile.unc.weights, i);
  }
  for (std::int64_t j = 0; any_near && j < row.count; ++j) {
    if (!near_sem[j] && !near_unc[j])
      continue;
    const T alpha2 =
        squares == Squares::without_alpha ? T(0) : square_of_sum(tile.sem, i, j, T(-1));
    const T beta2 = row.unc ? square_of_sum(tile.unc, i, j, T(1)) : T(0);
    const Weights<T> w =
        weights_of_pair<form, squares>(row, j, alpha2, beta2, upstream.scores, metric);
    if (near_sem[j])
      sem.near[block].push_back({i, j, incoming[j] * w.diagonal_row});
    if (near_unc[j])
      unc.near[block].push_back({i, j, incoming[j] * w.sum});
  }
}

// rows[i] += weight * (x_i + sign * y_j) and cols[j] += sign * the same, for elements stored as S.
// A thread takes some features of all pairs, in the pairs' order: no two write to one place.
template <class S, class T>
void add_near(const Gram& gram, const Sums<T>& sums, T sign, const Gradient& gradient,
              int threads) {
  constexpr std::int64_t width = 64;
  const Matrix& x = gram.rows.x;
  const Matrix& y = gram.cols.x;
  parallel((x.cols + width - 1) / width, threads, [&](std::int64_t part) IDML_INLINE_LAMBDA {
    const std::int64_t begin = part * width;
    const std::int64_t end = std::min(begin + width, x.cols);
    for (const std::vector<Pair<T>>& pairs : sums.near) {
      for (const Pair<T>& pair : pairs) {
        for (std::int64_t k = begin; k < end; ++k) {
          const T a = x.row<S>(pair.row)[k * x.col_stride];
          const T b = y.row<S>(pair.col)[k * y.col_stride];
          const T term = pair.weight * (a + sign * b);
          if (gradient.rows.data)
            gradient.rows.row<T>(pair.row)[k] += term;
          if (gradient.cols.data)
            gradient.cols.row<T>(pair.col)[k] += sign * term;
        }
      }
    }
  });
}

template <class T>
IDML_INLINE void add_own(const Matrix& diagonal, const std::vector<T>& own) {
  for (std::int64_t i = 0; i < diagonal.cols; ++i)
    diagonal.row<T>(0)[i] += own[i];
}

template <class T>
void clear(const Matrix& items) {
  for (std::int64_t i = 0; i < items.rows; ++i)
    std::fill_n(items.row<T>(i), items.cols, T(0));
}

// What the blocks have added up goes where it belongs, in their order, whichever thread had them.
// Returns whether any pair was left out of the products.
template <class T>
bool add_sums(const Gram& gram, const Sums<T>& sums, T sign, const Gradient& gradient,
              int threads) {
  if (gradient.row_diagonal.data)
    add_own(gradient.row_diagonal, sums.rows);
  if (gradient.col_diagonal.data) {
    const std::int64_t count = gram.cols.squares.cols;
    std::vector<double> totals(count);
    for (const std::vector<T>& cols : sums.cols)
      for (std::int64_t j = 0; j < count; ++j)
        totals[j] += cols[j];
    add_own(gradient.col_diagonal, std::vector<T>(totals.begin(), totals.end()));
  }
  if (std::all_of(sums.near.begin(), sums.near.end(), [](const auto& p) { return p.empty(); }))
    return false;
  if (gradient.starts_rows)
    clear<T>(gradient.rows);
  if (gradient.starts_cols)
    clear<T>(gradient.cols);
  if (is_bfloat16<T>(gram.rows.x))
    add_near<BFloat16>(gram, sums, sign, gradient, threads);
  else
    add_near<T>(gram, sums, sign, gradient, threads);
  return true;
}

// `upstream_of(block)` returns a function from the rows of that block, whose squares are there, to
// their `Upstream`. With Squares::without_alpha (distance form only) tile.sem has no products.
template <Form form, Squares squares, class T, class UpstreamOf>
NearPairs weigh_tile(const Tile& tile, Metric<T> metric, const Gradients& gradients, int threads,
                     const UpstreamOf& upstream_of) {
  const std::int64_t rows = tile.rows();
  const std::int64_t cols = tile.cols();
  Sums<T> sem(rows, cols);
  Sums<T> unc(rows, tile.has_unc() ? cols : 0);
  parallel(block_count(rows), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
    auto upstream = upstream_of(block);
    RowScratch<T> scratch(cols);
    walk_block<form, squares, T>(tile, block, [&](const Row<T>& row) IDML_INLINE_LAMBDA {
      weigh_row<form, squares>(tile, row, metric, upstream(row), gradients.metric, block, sem, unc,
                               scratch);
    });
  });
  return {add_sums(tile.sem, sem, T(-1), gradients.sem, threads),
          tile.has_unc() && add_sums(tile.unc, unc, T(1), gradients.unc, threads)};
}

}  // namespace idml::cpu
