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

template <Form form, class T>
IDML_INLINE Weights<T> weights_of_pair(const Row<T>& row, std::int64_t j, T beta2, const T* scores,
                                       Metric<T> metric) {
  if constexpr (form == Form::distance)
    return distance_weights(scores[j], std::sqrt(beta2), metric);
  return cosine_weights<form>(row.sem[j], beta2, row.versines[j], row.inverse, row.col_inverses[j],
                              metric);
}

template <Form form, class T>
IDML_INLINE void weigh_row(const Row<T>& row, Metric<T> metric, const T* upstream, const T* scores,
                           T* row_sem, T* row_unc, T* col_sem, T* col_unc) {
  T diagonal = 0;
  T sum = 0;
#pragma omp simd reduction(+ : diagonal, sum)
  for (std::int64_t j = 0; j < row.count; ++j) {
    const T beta2 = row.unc ? row.unc[j] : T(0);
    const Weights<T> w = weights_of_pair<form>(row, j, beta2, scores, metric);
    const T g = upstream[j];
    row.sem[j] = g * w.product;
    diagonal += g * w.diagonal_row;
    col_sem[j] += g * w.diagonal_col;
    if (row.unc) {
      row.unc[j] = g * w.sum;
      sum += g * w.sum;
      col_unc[j] += g * w.sum;
    }
  }
  *row_sem += diagonal;
  if (row.unc)
    *row_unc += sum;
}

template <class T>
void add(const T* terms, std::int64_t count, T* sums) {
  for (std::int64_t j = 0; j < count; ++j)
    sums[j] += terms[j];
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
                       const Diagonal& sem, const Diagonal& unc, int threads) {
  const std::int64_t blocks = block_count(tile.sem.values.rows);
  const std::int64_t count = tile.sem.values.cols;
  // A block adds up its own columns; the blocks are then added in their order, whichever thread had
  // them.
  std::vector<T> sem_cols(blocks * count);
  std::vector<T> unc_cols(blocks * count);
  with_form(form, [&](auto chosen) {
    constexpr Form the_form = decltype(chosen)::value;
    constexpr Squares squares = the_form == Form::distance ? Squares::without_alpha : Squares::all;
    parallel(blocks, threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      std::vector<T> both(upstream.mirror.data ? block_rows * count : 0);
      if (upstream.mirror.data)
        add_mirror(upstream, block, both.data());
      walk_block<the_form, squares, T>(tile, block, [&](const Row<T>& row) IDML_INLINE_LAMBDA {
        const T* gradient = upstream.mirror.data ? &both[(row.index - block * block_rows) * count]
                                                 : upstream.gradient.row<T>(row.index);
        const T* scores = the_form == Form::distance ? upstream.scores.row<T>(row.index) : nullptr;
        weigh_row<the_form>(row, metric, gradient, scores, sem.rows.row<T>(0) + row.index,
                            unc.rows.row<T>(0) + row.index, &sem_cols[block * count],
                            &unc_cols[block * count]);
      });
    });
  });
  for (std::int64_t block = 0; block < blocks; ++block) {
    if (sem.cols.data)
      add(&sem_cols[block * count], count, sem.cols.row<T>(0));
    if (unc.cols.data)
      add(&unc_cols[block * count], count, unc.cols.row<T>(0));
  }
}

template void pairwise_forward<float>(const Tile&, Form, Metric<float>, const Matrix&,
                                      const Matrix&, int);
template void pairwise_forward<double>(const Tile&, Form, Metric<double>, const Matrix&,
                                       const Matrix&, int);
template void pairwise_backward<float>(const Tile&, Form, Metric<float>, const Upstream&,
                                       const Diagonal&, const Diagonal&, int);
template void pairwise_backward<double>(const Tile&, Form, Metric<double>, const Upstream&,
                                        const Diagonal&, const Diagonal&, int);

}  // namespace idml::cpu
