// The CPU kernels of `rowstats`, as csrc/bindings.cpp exposes them. Instantiated for float and
// double.

#pragma once

#include <cstdint>
#include <vector>

#include "gradient.h"
#include "matrix.h"
#include "score.h"

namespace idml::cpu {

enum class Reduction { log_sum_exp, sum, count, hinge, histogram, extremum };

// The labels a statistic looks at, as bits.
enum Where : std::int32_t { same = 1, different = 2 };

// One statistic of each row, of x = score^power, over the columns that it looks at.
struct Statistic {
  Reduction reduction;
  std::int32_t where;  // bits of Where
  double power;
  // log_sum_exp: log sum exp(scale (x - shift)); hinge: sum max(0, scale (x - threshold));
  // extremum: the largest scale x.
  double scale, shift;
  double low, width;  // histogram: bin b is a triangle around low + b width, two widths wide
  int bins;           // histogram: of bins + 1 triangles
  // Its first row of Items::state:
  //   log_sum_exp  the maximum m, and the sum of exp(scale (x - shift) - m)
  //   sum, count   that
  //   hinge        the sum, and how many terms are positive
  //   histogram    the bins
  //   extremum     scale x, and its column; -infinity and -1 as long as there is none
  int state;
  // Rows of Items::bounds: the hinge's threshold; only x above and below these are looked at, -1
  // for no such limit.
  int threshold, above, below;
  int value;  // its first row of Items::upstream; -1: it has no gradient
};

// The rows or the columns of a tile. Everything that rows have, columns need for rows against
// themselves, whose tiles stand for (j, i) as well.
struct Items {
  std::int64_t first;  // the number of the first one among all
  Matrix labels;       // [1, n] int64
  Matrix bounds;       // [B, n]
  Matrix state;        // [S, n] of double, which the forward updates and the backward reads
  Matrix upstream;     // [K, n] the gradient of the statistics, for the backward
};

// Takes the tile's pairs into the state of its rows and, for rows against themselves beside their
// diagonal, of its columns, which then need their scores: `scores` has
// room for those of the largest tile, and is absent for two sets.
template <class T>
void rowstats_forward(const Tile& tile, const AnyMetric& metric,
                      const std::vector<Statistic>& statistics, const Items& rows,
                      const Items& cols, const Matrix& scores, int threads);

// See gradient.h; the upstream gradient of a pair comes from the statistics it is part of.
template <class T>
NearPairs rowstats_backward(const Tile& tile, const AnyMetric& metric,
                            const std::vector<Statistic>& statistics, const Items& rows,
                            const Items& cols, bool symmetric, const Gradients& gradients,
                            int threads);

}  // namespace idml::cpu
