#include "pairwise.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "tile.h"

namespace idml::cpu {

namespace {

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
IDML_INLINE void add_mirror(const PairwiseUpstream& upstream, std::int64_t block, T* both) {
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

}  // namespace

template <class T>
void pairwise_forward(const Tile& tile, const AnyMetric& metric, const Matrix& scores,
                      const Matrix& mirror, int threads) {
  const bool on_diagonal = mirror.data == scores.data;
  with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    parallel(block_count(scores.rows), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      walk_block<form, Squares::all, T>(tile, block, [&](const Row<T>& row) IDML_INLINE_LAMBDA {
        score_row<form>(row, on_diagonal ? row.index : 0, metric.as<T>(), scores.row<T>(row.index));
      });
      if (mirror.data)
        mirror_block<T>(scores, mirror, block,
                        [&](std::int64_t i) { return on_diagonal ? i + 1 : 0; });
    });
  });
}

template <class T>
NearPairs pairwise_backward(const Tile& tile, const AnyMetric& metric,
                            const PairwiseUpstream& upstream, const Gradients& gradients,
                            int threads) {
  const std::int64_t count = tile.sem.values.cols;
  return with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    constexpr bool inverts = form == Form::distance;
    return weigh_tile<form, inverts ? Squares::without_alpha : Squares::all>(
        tile, metric.as<T>(), gradients, threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
          std::vector<T> both(upstream.mirror.data ? block_rows * count : 0);
          if (upstream.mirror.data)
            add_mirror(upstream, block, both.data());
          return [&upstream, both = std::move(both), count,
                  block](const Row<T>& row) IDML_INLINE_LAMBDA {
            const T* gradient = both.empty() ? upstream.gradient.row<T>(row.index)
                                             : &both[(row.index - block * block_rows) * count];
            return Upstream<T>{gradient, inverts ? upstream.scores.row<T>(row.index) : nullptr};
          };
        });
  });
}

template void pairwise_forward<float>(const Tile&, const AnyMetric&, const Matrix&, const Matrix&,
                                      int);
template void pairwise_forward<double>(const Tile&, const AnyMetric&, const Matrix&, const Matrix&,
                                       int);
template NearPairs pairwise_backward<float>(const Tile&, const AnyMetric&, const PairwiseUpstream&,
                                            const Gradients&, int);
template NearPairs pairwise_backward<double>(const Tile&, const AnyMetric&, const PairwiseUpstream&,
                                             const Gradients&, int);

}  // namespace idml::cpu
