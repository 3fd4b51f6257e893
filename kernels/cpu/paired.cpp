#include "paired.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tile.h"

namespace idml::cpu {

namespace {

// One item's embeddings in the arithmetic's own type: where they are, or widened into memory of its
// own. An absent `unc` is zero.
template <class T>
struct Item {
  explicit Item(const Side& side)
      : side(side), sem_memory(widened(side.sem)), unc_memory(widened(side.unc)) {}

  IDML_INLINE void take(std::int64_t i) {
    sem = vector_of(side.sem, i, sem_memory.data());
    unc = side.unc.data ? vector_of(side.unc, i, unc_memory.data()) : nullptr;
  }

  const Side& side;
  const T* sem;
  const T* unc;

 private:
  // How many numbers have to be taken from where they are.
  static std::int64_t widened(const Matrix& x) {
    return is_bfloat16<T>(x) || x.col_stride != 1 ? x.cols : 0;
  }

  IDML_INLINE static const T* vector_of(const Matrix& x, std::int64_t i, T* memory) {
    if (!widened(x))
      return x.row<T>(i);
    for (std::int64_t k = 0; k < x.cols; ++k)
      memory[k] = is_bfloat16<T>(x) ? T(x.row<BFloat16>(i)[k * x.col_stride])
                                    : x.row<T>(i)[k * x.col_stride];
    return memory;
  }

  std::vector<T> sem_memory, unc_memory;
};

// What the score of a pair is made of; all but the squares for the cosine forms only.
template <class T>
struct Measured {
  T alpha2, beta2, versine, inverse, other_inverse;
};

// beta^2
template <class T>
IDML_INLINE T measure_unc(const T* u, const T* v, std::int64_t width) {
  T beta2 = 0;
  if (u && v) {
#pragma omp simd reduction(+ : beta2)
    for (std::int64_t k = 0; k < width; ++k)
      beta2 += (u[k] + v[k]) * (u[k] + v[k]);
    return beta2;
  }
  const T* one = u ? u : v;
  if (one) {
#pragma omp simd reduction(+ : beta2)
    for (std::int64_t k = 0; k < width; ++k)
      beta2 += one[k] * one[k];
  }
  return beta2;
}

// The versine is 1 - cos, of near-duplicates from their difference, as in tile.h.
template <Form form, class T>
IDML_INLINE Measured<T> measure(const Item<T>& item, const Item<T>& other) {
  const T beta2 =
      measure_unc(item.unc, other.unc, std::max(item.side.unc.cols, other.side.unc.cols));
  T alpha2 = 0, dot = 0, square = 0, other_square = 0;
#pragma omp simd reduction(+ : alpha2, dot, square, other_square)
  for (std::int64_t k = 0; k < item.side.sem.cols; ++k) {
    const T x = item.sem[k];
    const T y = other.sem[k];
    alpha2 += (x - y) * (x - y);
    if (form != Form::distance) {
      dot += x * y;
      square += x * x;
      other_square += y * y;
    }
  }
  if constexpr (form == Form::distance)
    return {alpha2, beta2, T(0), T(0), T(0)};
  const T inverse = inverse_norm(square);
  const T other_inverse = inverse_norm(other_square);
  const T difference = square * inverse - other_square * other_inverse;
  const T versine = alpha2 < near<T> * (square + other_square)
                        ? (alpha2 - difference * difference) * inverse * other_inverse / T(2)
                        : T(1) - dot * inverse * other_inverse;
  const T clamped = versine < T(0) || alpha2 == T(0) ? T(0) : versine;
  return {alpha2, beta2, clamped, inverse, other_inverse};
}

// Some consecutive pairs of one item, and where their sum goes: to the item if they are all it has,
// else to a row of memory for chunks.
struct Chunk {
  std::int64_t item, begin, end, partial;
};

// An item that many pairs share must not keep the other threads waiting.
constexpr std::int64_t chunk_pairs = 256;

// The chunks of all items; returns how many of them are not all of their item.
std::int64_t cut(const Matrix& starts, std::vector<Chunk>& chunks) {
  const std::int64_t* start = starts.row<std::int64_t>(0);
  std::int64_t partials = 0;
  for (std::int64_t i = 0; i + 1 < starts.cols; ++i) {
    const bool whole = start[i + 1] - start[i] <= chunk_pairs;
    for (std::int64_t begin = start[i]; begin < start[i + 1]; begin += chunk_pairs)
      chunks.push_back({i, begin, std::min(begin + chunk_pairs, start[i + 1]),
                        whole ? std::int64_t(-1) : partials++});
  }
  return partials;
}

// Adds the gradients of one pair to those of its item.
template <Form form, class T>
IDML_INLINE void add_pair(const Item<T>& item, const Item<T>& other, Metric<T> metric,
                          const PairsByItem& pairs, std::int64_t t, T* sem, T* unc) {
  const T incoming = pairs.upstream.row<T>(0)[t];
  const Measured<T> found = measure<form>(item, other);
  const Weights<T> w = weights<form>(found.alpha2, found.beta2, found.versine, found.inverse,
                                     found.other_inverse, metric);
  if (pairs.metric.data) {
    const double term = incoming * w.of_gamma;
    pairs.metric.row<double>(0)[t] = term;
    pairs.metric.row<double>(1)[t] =
        term * (form == Form::official ? found.beta2 : std::sqrt(found.beta2));
  }
  if (sem) {
    const T own = incoming * w.diagonal_row;
    const T others = incoming * w.product;
    // The two terms of a near-duplicate would cancel: in the distance form they are opposite.
    for (std::int64_t k = 0; k < item.side.sem.cols; ++k)
      sem[k] += form == Form::distance ? own * (item.sem[k] - other.sem[k])
                                       : own * item.sem[k] + others * other.sem[k];
  }
  if (unc) {
    const T own = incoming * w.sum;
    for (std::int64_t k = 0; k < item.side.unc.cols; ++k)
      unc[k] += own * (item.unc[k] + (other.unc ? other.unc[k] : T(0)));
  }
}

template <class T>
void add(const T* terms, std::int64_t count, T* sums) {
  for (std::int64_t k = 0; k < count; ++k)
    sums[k] += terms[k];
}

}  // namespace

template <class T>
void paired_forward(const Side& row_side, const Side& col_side, const AnyMetric& metric,
                    const Matrix& rows, const Matrix& cols, const Matrix& scores, int threads) {
  with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    parallel(block_count(rows.cols), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      Item<T> row(row_side), col(col_side);
      const std::int64_t end = std::min((block + 1) * block_rows, rows.cols);
      for (std::int64_t t = block * block_rows; t < end; ++t) {
        row.take(rows.row<std::int64_t>(0)[t]);
        col.take(cols.row<std::int64_t>(0)[t]);
        const Measured<T> found = measure<form>(row, col);
        scores.row<T>(0)[t] = score<form>(found.alpha2, found.beta2, found.versine, metric.as<T>());
      }
    });
  });
}

template <class T>
void paired_backward(const Side& items, const Side& others, const AnyMetric& metric,
                     const PairsByItem& pairs, const Matrix& sem, const Matrix& unc, int threads) {
  const std::int64_t sem_width = sem.data ? sem.cols : 0;
  const std::int64_t width = sem_width + (unc.data ? unc.cols : 0);
  std::vector<Chunk> chunks;
  std::vector<T> partials(cut(pairs.starts, chunks) * width);
  const std::int64_t count = chunks.size();
  const auto add_to_item = [&](std::int64_t item, const T* sums) {
    if (sem.data)
      add(sums, sem.cols, sem.row<T>(item));
    if (unc.data)
      add(sums + sem_width, unc.cols, unc.row<T>(item));
  };
  with_form(metric.form, [&](auto chosen) {
    constexpr Form form = decltype(chosen)::value;
    parallel(block_count(count), threads, [&](std::int64_t block) IDML_INLINE_LAMBDA {
      Item<T> item(items), other(others);
      std::vector<T> sums(width);
      const std::int64_t end = std::min((block + 1) * block_rows, count);
      for (std::int64_t c = block * block_rows; c < end; ++c) {
        const Chunk& chunk = chunks[c];
        item.take(chunk.item);
        std::fill(sums.begin(), sums.end(), T(0));
        for (std::int64_t t = chunk.begin; t < chunk.end; ++t) {
          other.take(pairs.partners.row<std::int64_t>(0)[t]);
          add_pair<form>(item, other, metric.as<T>(), pairs, t, sem.data ? sums.data() : nullptr,
                         unc.data ? sums.data() + sem_width : nullptr);
        }
        if (chunk.partial < 0)
          add_to_item(chunk.item, sums.data());
        else
          std::copy(sums.begin(), sums.end(), partials.begin() + chunk.partial * width);
      }
    });
  });
  for (const Chunk& chunk : chunks)
    if (chunk.partial >= 0)
      add_to_item(chunk.item, partials.data() + chunk.partial * width);
}

template void paired_forward<float>(const Side&, const Side&, const AnyMetric&, const Matrix&,
                                    const Matrix&, const Matrix&, int);
template void paired_forward<double>(const Side&, const Side&, const AnyMetric&, const Matrix&,
                                     const Matrix&, const Matrix&, int);
template void paired_backward<float>(const Side&, const Side&, const AnyMetric&, const PairsByItem&,
                                     const Matrix&, const Matrix&, int);
template void paired_backward<double>(const Side&, const Side&, const AnyMetric&,
                                      const PairsByItem&, const Matrix&, const Matrix&, int);

}  // namespace idml::cpu
