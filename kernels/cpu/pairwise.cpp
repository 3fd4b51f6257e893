#include "pairwise.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "tile.h"

namespace idml::cpu {

namespace {

// One instantiation of `call` for each form, chosen here and nowhere else.
template <class Call>
void with_form(Form form, const Call& call) {
  switch (form) {
    case Form::distance:
      return call(std::integral_constant<Form, Form::distance>{});
    case Form::cosine:
      return call(std::integral_constant<Form, Form::cosine>{});
    case Form::official:
      return call(std::integral_constant<Form, Form::official>{});
  }
}

template <Form form, class T>
IDML_INLINE void score_row(const Row<T>& row, std::int64_t first, Metric<T> metric, T* scores) {
  for (std::int64_t j = first; j < row.count; ++j) {
    const T beta2 = row.unc ? row.unc[j] : T(0);
    scores[j] =
        score<form>(row.sem[j], beta2, form == Form::distance ? T(0) : row.versines[j], metric);
  }
}

// mirror[j, i] = scores[i, j] for the rows of one block, of each the pairs from first(i) on.
template <class T, class First>
IDML_INLINE void mirror_block(const Matrix& scores, const Matrix& mirror, std::int64_t block,
                              const First& first) {
  const std::int64_t begin = block * block_rows;
  const std::int64_t end = std::min(begin + block_rows, scores.rows);
  for (std::int64_t j = first(begin); j < scores.cols; ++j) {
    T* column = mirror.row<T>(j);
    for (std::int64_t i = begin; i < end; ++i)
      if (j >= first(i))
        column[i] = scores.row<T>(i)[j];
  }
}

// gradient[i, j] + mirror[j, i] for the rows of one block.
template <class T>
IDML_INLINE void add_mirror(const Upstream& upstream, std::int64_t block, T* both) {
  const std::int64_t begin = block * block_rows;
  const std::int64_t end = std::min(begin + block_rows, upstream.gradient.rows);
  const std::int64_t count = upstream.gradient.cols;
  for (std::int64_t i = begin; i < end; ++i)
    std::copy_n(upstream.gradient.row<T>(i), count, both + (i - begin) * count);
  for (std::int64_t j = 0; j < count; ++j) {
    const T* column = upstream.mirror.row<T>(j);
    for (std::int64_t i = begin; i < end; ++i)
      both[(i - begin) * count + j] += column[i];
  }
}

template <class T>
struct Pair {
  std::int64_t row, col;
  T weight;
};

// What one block of rows adds up for one embedding.
template <class T>
struct Sums {
  std::vector<T> cols;        // [M] what multiplies the columns' own embedding
  std::vector<Pair<T>> near;  // the pairs left out of the products
};

// Memory for one row at a time.
template <class T>
struct Scratch {
  explicit Scratch(std::int64_t count) : diagonal(count), near_sem(count), near_unc(count) {}

  std::vector<T> diagonal;
  std::vector<std::int32_t> near_sem, near_unc;  // 1 for a pair left out of the products
};

template <Form form, class T>
IDML_INLINE Weights<T> weights_of_pair(const Row<T>& row, std::int64_t j, T alpha2, T beta2,
                                       const T* scores, Metric<T> metric) {
  if constexpr (form == Form::distance)
    return distance_weights(scores[j], std::sqrt(beta2), metric);
  return cosine_weights<form>(alpha2, beta2, row.versines[j], row.inverse, row.col_inverses[j],
                              metric);
}

template <class T>
IDML_INLINE T sum(const T* terms, std::int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < count; ++j)
    total += terms[j];
  return static_cast<T>(total);
}

template <Form form, class T>
IDML_INLINE void weigh_row(const Tile& tile, const Row<T>& row, Metric<T> metric, const T* upstream,
                           const T* scores, const Gradient& sem_gradient,
                           const Gradient& unc_gradient, Sums<T>& sem, Sums<T>& unc,
                           Scratch<T>& scratch) {
  const std::int64_t i = row.index;
  const T sem_square = tile.sem.rows.squares.row<T>(0)[i];
  const T* sem_squares = tile.sem.cols.squares.row<T>(0);
  const T unc_square = row.unc ? tile.unc.rows.squares.row<T>(0)[i] : T(0);
  const T* unc_squares = row.unc ? tile.unc.cols.squares.row<T>(0) : nullptr;
  T* diagonal = scratch.diagonal.data();
  std::int32_t* near_sem = scratch.near_sem.data();
  std::int32_t* near_unc = scratch.near_unc.data();
  T* col_sem = sem.cols.data();
  T* col_unc = unc.cols.data();
  int any_near = 0;
#pragma omp simd reduction(| : any_near)
  for (std::int64_t j = 0; j < row.count; ++j) {
    const T beta2 = row.unc ? row.unc[j] : T(0);
    const Weights<T> w = weights_of_pair<form>(row, j, row.sem[j], beta2, scores, metric);
    // The weight of sem grows without bound only in the distance form; in the others it has the
    // versine as a factor, which falls as fast as alpha^2.
    const T nearness = near<T> * (sem_square + sem_squares[j]) * w.inverse_alpha * w.inverse_alpha;
    const bool is_near = form == Form::distance && nearness > T(1);
    const T of_sem = is_near ? T(0) : upstream[j];
    row.sem[j] = of_sem * w.product;
    diagonal[j] = of_sem * w.diagonal_row;
    col_sem[j] += of_sem * w.diagonal_col;
    near_sem[j] = is_near;
    any_near |= is_near;
    if (row.unc) {
      const bool is_opposite = beta2 < near<T> * (unc_square + unc_squares[j]);
      const T of_unc = is_opposite ? T(0) : upstream[j];
      row.unc[j] = of_unc * w.sum;
      col_unc[j] += of_unc * w.sum;
      near_unc[j] = is_opposite;
      any_near |= is_opposite;
    }
  }
  sem_gradient.row_diagonal.row<T>(0)[i] += sum(diagonal, row.count);
  if (row.unc)
    unc_gradient.row_diagonal.row<T>(0)[i] += sum(row.unc, row.count);
  for (std::int64_t j = 0; any_near && j < row.count; ++j) {
    if (!near_sem[j] && !near_unc[j])
      continue;
    const T alpha2 = form == Form::distance ? T(0) : square_of_sum(tile.sem, i, j, T(-1));
    const T beta2 = row.unc ? square_of_sum(tile.unc, i, j, T(1)) : T(0);
    const Weights<T> w = weights_of_pair<form>(row, j, alpha2, beta2, scores, metric);
    if (near_sem[j])
      sem.near.push_back({i, j, upstream[j] * w.diagonal_row});
    if (near_unc[j])
      unc.near.push_back({i, j, upstream[j] * w.sum});
  }
}

// rows[i] += weight * (x_i + sign * y_j) and cols[j] += sign * the same, for elements stored as S.
// A thread takes some features of all pairs, in the pairs' order: no two write to one place.
template <class S, class T>
void add_near(const Gram& gram, const std::vector<Sums<T>>& blocks, T sign,
              const Gradient& gradient, int threads) {
  constexpr std::int64_t width = 64;
  const Matrix& x = gram.rows.x;
  const Matrix& y = gram.cols.x;
  parallel((x.cols + width - 1) / width, threads, [&](std::int64_t part) IDML_INLINE_LAMBDA {
    const std::int64_t begin = part * width;
    const std::int64_t end = std::min(begin + width, x.cols);
    for (const Sums<T>& sums : blocks) {
      for (const Pair<T>& pair : sums.near) {
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

// What the blocks have added up goes where it belongs, in their order, whichever thread had them.
template <class T>
void add_blocks(const Gram& gram, const std::vector<Sums<T>>& blocks, T sign,
                const Gradient& gradient, int threads) {
  if (gradient.col_diagonal.data) {
    const std::int64_t count = gram.values.cols;
    std::vector<double> totals(count);
    for (const Sums<T>& sums : blocks)
      for (std::int64_t j = 0; j < count; ++j)
        totals[j] += sums.cols[j];
    T* diagonal = gradient.col_diagonal.row<T>(0);
    for (std::int64_t j = 0; j < count; ++j)
      diagonal[j] += static_cast<T>(totals[j]);
  }
  const bool any = std::any_of(blocks.begin(), blocks.end(),
                               [](const Sums<T>& sums) { return !sums.near.empty(); });
  if (!any)
    return;
  if (gram.rows.x.itemsize == sizeof(BFloat16))
    return add_near<BFloat16>(gram, blocks, sign, gradient, threads);
  add_near<T>(gram, blocks, sign, gradient, threads);
}

}  // namespace

template <class T>
void pairwise_forward(const Tile& tile, Form form, Metric<T> metric, const Matrix& scores,
                      const Matrix& mirror, int threads) {
  const bool on_diagonal = mirror.data == scores.data;
  with_form(form, [&](auto chosen) {
    constexpr Form the_form = decltype(chosen)::value;
    parallel(block_count(scores.rows), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      walk_block<the_form, Squares::all, T>(tile, block, [&](const Row<T>& row) IDML_INLINE_LAMBDA {
        score_row<the_form>(row, on_diagonal ? row.index : 0, metric, scores.row<T>(row.index));
      });
      if (mirror.data)
        mirror_block<T>(scores, mirror, block,
                        [&](std::int64_t i) { return on_diagonal ? i + 1 : 0; });
    });
  });
}

template <class T>
void pairwise_backward(const Tile& tile, Form form, Metric<T> metric, const Upstream& upstream,
                       const Gradient& sem, const Gradient& unc, int threads) {
  const std::int64_t blocks = block_count(tile.sem.values.rows);
  const std::int64_t count = tile.sem.values.cols;
  const bool has_unc = tile.unc.values.data != 0;
  std::vector<Sums<T>> sem_sums(blocks, {std::vector<T>(count), {}});
  std::vector<Sums<T>> unc_sums(blocks, {std::vector<T>(has_unc ? count : 0), {}});
  with_form(form, [&](auto chosen) {
    constexpr Form the_form = decltype(chosen)::value;
    constexpr Squares squares = the_form == Form::distance ? Squares::without_alpha : Squares::all;
    parallel(blocks, threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      std::vector<T> both(upstream.mirror.data ? block_rows * count : 0);
      if (upstream.mirror.data)
        add_mirror(upstream, block, both.data());
      Scratch<T> scratch(count);
      walk_block<the_form, squares, T>(tile, block, [&](const Row<T>& row) IDML_INLINE_LAMBDA {
        const T* gradient = upstream.mirror.data ? &both[(row.index - block * block_rows) * count]
                                                 : upstream.gradient.row<T>(row.index);
        const T* scores = the_form == Form::distance ? upstream.scores.row<T>(row.index) : nullptr;
        weigh_row<the_form>(tile, row, metric, gradient, scores, sem, unc, sem_sums[block],
                            unc_sums[block], scratch);
      });
    });
  });
  add_blocks(tile.sem, sem_sums, T(-1), sem, threads);
  if (has_unc)
    add_blocks(tile.unc, unc_sums, T(1), unc, threads);
}

template void pairwise_forward<float>(const Tile&, Form, Metric<float>, const Matrix&,
                                      const Matrix&, int);
template void pairwise_forward<double>(const Tile&, Form, Metric<double>, const Matrix&,
                                       const Matrix&, int);
template void pairwise_backward<float>(const Tile&, Form, Metric<float>, const Upstream&,
                                       const Gradient&, const Gradient&, int);
template void pairwise_backward<double>(const Tile&, Form, Metric<double>, const Upstream&,
                                        const Gradient&, const Gradient&, int);

}  // namespace idml::cpu
