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

// Where a backward adds up, for one embedding of the rows and one of the columns, besides the
// products: [1, N] and [1, M] what multiplies an item's own embedding, [N, D] and [M, D] the
// gradient of the pairs that are left out of the products. What is not wanted is absent.
struct Gradient {
  Matrix row_diagonal, col_diagonal;
  Matrix rows, cols;
};

// Replaces the tile's values by weights, so that grad sem += sem.values @ sem2,
// grad unc += unc.values @ unc2, and with the transposes for the columns. A near-duplicate's weight
// can be so large that this sum would cancel: it is 0, and the pair is added apart, from its
// difference. All sums are taken in an order that does not depend on the number of threads.
// The distance form gets alpha from the scores: for it, tile.sem comes without products.
template <class T>
void pairwise_backward(const Tile& tile, Form form, Metric<T> metric, const Upstream& upstream,
                       const Gradient& sem, const Gradient& unc, int threads);

}  // namespace idml::cpu
