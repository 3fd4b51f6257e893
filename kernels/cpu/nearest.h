// The CPU kernels of `nearest`, as csrc/bindings.cpp exposes them. Instantiated for float and
// double.

#pragma once

#include <cstdint>

#include "matrix.h"
#include "score.h"

namespace idml::cpu {

// Draws columns with probability proportional to 1 / q(score), without replacement,
//
//   q(d) = d^(width - 2) (1 - d^2 / 4)^((width - 3) / 2),
//
// d at least `cutoff`; a column from `upto` on has weight 0. Wu et al., Sampling Matters in Deep
// Embedding Learning, ICCV 2017.
struct DistanceWeighted {
  double width, cutoff, upto;
  std::uint64_t seed;
};

// Which columns the rows of a tile look at, and which of two is better: that with the larger key.
struct Choice {
  std::int64_t first_row, first_col;  // of the tile, among all
  bool exclude_self;                  // leave out column i of row i, counted among all
  bool same, different;               // whether columns with the row's label, with another
  Matrix labels, labels2;             // [1, N] and [1, M] of int64; not read if it is both
  Matrix above;  // [1, N], absent: no bound. Scores at or below it are left out
  bool largest;  // whether the key is the score, or its negative
  bool draws;    // whether the key is random instead, see nearest.cpp
  DistanceWeighted weights;
};

// The best columns that the rows of a tile have met, and more for which there is room, so that they
// are sifted only when it is full. A key that is NaN is better than any other; of equal keys that
// of the smaller column is better, which is always the one that came first.
struct Best {
  std::int64_t wanted;           // k
  Matrix keys, scores, columns;  // [N, more than k]; columns are int64, counted among all
  Matrix counts;                 // [1, N] of int64, how many of them there are
  Matrix thresholds;             // [1, N], keys at or below it are not wanted; NaN: all are
};

struct Results {
  Matrix keys, scores, columns;  // [N, k], the best first
};

// Lets the columns of a tile take part. All of them come after those that `best` has met.
template <class T>
void nearest_offer(const Tile& tile, const AnyMetric& metric, const Choice& choice,
                   const Best& best, int threads);

// Writes the best into the results; where a row has fewer than k, the others stay as they are.
template <class T>
void nearest_finish(const Best& best, const Results& results, int threads);

}  // namespace idml::cpu
