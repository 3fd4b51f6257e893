// The CPU kernels of `pairwise`, as csrc/bindings.cpp exposes them. Instantiated for float and double.

#pragma once

#include "matrix.h"
#include "score.h"

namespace idml::cpu {

// out[i] = ||x_i||^2, accumulated in double.
template <class T>
void squared_norms(const Matrix& x, const Matrix& out, int threads);

// scores[i, j] of every pair of the tile; `scores` may be the tile's own products.
template <class T>
void pairwise_forward(const Tile& tile, Form form, Metric<T> metric, const Matrix& scores, int threads);

// What multiplies an item's own embedding in its gradient, added up over the tiles: [1, N] for the rows and [1, M] for the
// columns, which may be absent.
struct Diagonal {
  Matrix rows, cols;
};

// Replaces the tile's products by weights, so that grad sem += sem.values @ sem2, grad unc += unc.values @ unc2, and with
// the transposes for the columns; adds to the diagonals in an order that does not depend on the number of threads.
template <class T>
void pairwise_backward(const Tile& tile, Form form, Metric<T> metric, const Matrix& upstream, const Diagonal& sem,
                       const Diagonal& unc, int threads);

}  // namespace idml::cpu
