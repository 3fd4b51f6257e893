// The CPU kernels of `pairwise`, as csrc/bindings.cpp exposes them. Instantiated for float and
// double.

#pragma once

#include "matrix.h"
#include "score.h"

namespace idml::cpu {

// scores[i, j] of every pair of the tile. Rows against themselves: `mirror` is where scores[j, i]
// go. For a tile on the diagonal the two are the same memory; its upper triangle then stands for
// both.
template <class T>
void pairwise_forward(const Tile& tile, Form form, Metric<T> metric, const Matrix& scores,
                      const Matrix& mirror, int threads);

// What a backward reads of the tile's pairs, [N, M] each.
struct Upstream {
  Matrix gradient;
  Matrix mirror;  // rows against themselves: the gradient of the pairs (j, i), [M, N]; else absent
  Matrix scores;  // what the forward returned; read by the distance form only
};

// What multiplies an item's own embedding in its gradient, added up over the tiles: [1, N] for the
// rows and [1, M] for the columns, which may be absent.
struct Diagonal {
  Matrix rows, cols;
};

// Replaces the tile's products by weights, so that grad sem += sem.values @ sem2, grad unc +=
// unc.values @ unc2, and with the transposes for the columns; adds to the diagonals in an order
// that does not depend on the number of threads. The distance form gets alpha from the scores: for
// it, sem.values come without a product.
template <class T>
void pairwise_backward(const Tile& tile, Form form, Metric<T> metric, const Upstream& upstream,
                       const Diagonal& sem, const Diagonal& unc, int threads);

}  // namespace idml::cpu
