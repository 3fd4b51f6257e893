// The CPU kernels of `pairwise`, as csrc/bindings.cpp exposes them. Instantiated for float and
// double.

#pragma once

#include "gradient.h"
#include "matrix.h"
#include "score.h"

namespace idml::cpu {

// scores[i, j] of every pair of the tile, as T or rounded to bfloat16. Rows against themselves:
// `mirror` is where scores[j, i] go. For a tile on the diagonal the two are the same memory; its
// upper triangle then stands for both.
template <class T>
void pairwise_forward(const Tile& tile, const AnyMetric& metric, const Matrix& scores,
                      const Matrix& mirror, int threads);

// What the backward of `pairwise` reads of the tile's pairs, [N, M] each, as T or bfloat16.
struct PairwiseUpstream {
  Matrix gradient;
  Matrix mirror;  // rows against themselves: the gradient of the pairs (j, i), [M, N]; else absent
  Matrix scores;  // what the forward returned, in the distance form alone; may be absent
};

// See gradient.h. Where there are scores it gets alpha from them: tile.sem then comes without
// products.
template <class T>
NearPairs pairwise_backward(const Tile& tile, const AnyMetric& metric,
                            const PairwiseUpstream& upstream, const Gradients& gradients,
                            int threads);

}  // namespace idml::cpu
