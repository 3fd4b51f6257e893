#include "pairwise.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "tile.h"

namespace idml::cpu {

namespace {

// mirror[j, i] = scores[i, j] for the rows of one block, of each the pairs from first(i) on.
template <class S, class First>
IDML_INLINE void mirror_block(const Matrix& scores, const Matrix& mirror, std::int64_t block,
                              const First& first) {
  const std::int64_t begin = block * block_rows;
  const std::int64_t end = std::min(begin + block_rows, scores.rows);
  for (std::int64_t j = first(begin); j < scores.cols; ++j) {
    S* column = mirror.row<S>(j);
    for (std::int64_t i = begin; i < end; ++i)
      if (j >= first(i))
        column[i] = scores.row<S>(i)[j];
  }
}

// both[i, j] += mirror[j, i] for the rows of one block. By squares, turned in memory of their own:
// the rows of `both` may lie at a multiple of a large power of two, and a walk along a column of
// them would find room for few in the first cache.
template <class S, class T>
IDML_INLINE void add_mirror(const Matrix& mirror, std::int64_t begin, std::int64_t end, T* both) {
  const std::int64_t count = mirror.rows;
  S square[block_rows][block_rows];
  for (std::int64_t first = 0; first < count; first += block_rows) {
    const std::int64_t last = std::min(first + block_rows, count);
    for (std::int64_t j = first; j < last; ++j)
      for (std::int64_t i = begin; i < end; ++i)
        square[i - begin][j - first] = mirror.row<S>(j)[i];
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t j = first; j < last; ++j)
        both[(i - begin) * count + j] += square[i - begin][j - first];
  }
}

// The upstream gradients of the pairs of one block of rows; the scores, if they are given.
template <class T>
class BlockUpstream {
 public:
  BlockUpstream(const PairwiseUpstream& upstream, std::int64_t block)
      : upstream(upstream),
        begin(block * block_rows),
        count(upstream.gradient.cols),
        gradient(upstream.mirror.data ? block_rows * count : count),
        scores(upstream.scores.data ? count : 0) {}

  // gradient[i, j] + mirror[j, i]
  IDML_INLINE void add_both() {
    const std::int64_t end = std::min(begin + block_rows, upstream.gradient.rows);
    for (std::int64_t i = begin; i < end; ++i) {
      T* row = &gradient[(i - begin) * count];
      const T* stored = load_row(upstream.gradient, i, row);
      if (stored != row)
        std::copy_n(stored, count, row);
    }
    if (is_bfloat16<T>(upstream.mirror))
      add_mirror<BFloat16>(upstream.mirror, begin, end, gradient.data());
    else
      add_mirror<T>(upstream.mirror, begin, end, gradient.data());
  }

  IDML_INLINE Upstream<T> operator()(const Row<T>& row) {
    const std::int64_t i = row.index;
    const T* incoming = upstream.mirror.data ? &gradient[(i - begin) * count]
                                             : load_row(upstream.gradient, i, gradient.data());
    return {incoming, upstream.scores.data ? load_row(upstream.scores, i, scores.data()) : nullptr};
  }

 private:
  const PairwiseUpstream& upstream;
  std::int64_t begin, count;
  std::vector<T> gradient, scores;
};

}  // namespace

template <class T>
void pairwise_forward(const Tile& tile, const AnyMetric& metric, const Matrix& scores,
                      const Matrix& mirror, int threads) {
  const bool on_diagonal = mirror.data == scores.data;
  with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    parallel(block_count(scores.rows), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      walk_block<form, Squares::all, T>(tile, block, [&](const Row<T>& row) IDML_INLINE_LAMBDA {
        const std::int64_t first = on_diagonal ? row.index : 0;
        T* found = begin_row(scores, row.index, row.sem);
        score_row<form>(row, first, metric.as<T>(), found);
        round_row(found, scores, row.index, first);
      });
      if (!mirror.data)
        return;
      const auto first = [&](std::int64_t i) { return on_diagonal ? i + 1 : 0; };
      if (is_bfloat16<T>(scores))
        mirror_block<BFloat16>(scores, mirror, block, first);
      else
        mirror_block<T>(scores, mirror, block, first);
    });
  });
}

template <class T>
NearPairs pairwise_backward(const Tile& tile, const AnyMetric& metric,
                            const PairwiseUpstream& upstream, const Gradients& gradients,
                            int threads) {
  const auto of_block = [&](std::int64_t block) IDML_INLINE_LAMBDA {
    BlockUpstream<T> found(upstream, block);
    if (upstream.mirror.data)
      found.add_both();
    return found;
  };
  return with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    if constexpr (form == Form::distance)
      if (upstream.scores.data)
        return weigh_tile<form, Squares::without_alpha>(tile, metric.as<T>(), gradients, threads,
                                                        of_block);
    return weigh_tile<form, Squares::all>(tile, metric.as<T>(), gradients, threads, of_block);
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
