// The CPU kernels of `paired`, as csrc/bindings.cpp exposes them: no tiles, each listed pair is
// gathered from the embeddings. Instantiated for float and double.

#pragma once

#include "matrix.h"
#include "score.h"

namespace idml::cpu {

// The embeddings of one side. An absent `unc` is zero.
struct Side {
  Matrix sem, unc;  // [n, Ds], [n, Du]
};

// scores[t] of the pair (rows[t], cols[t]); [1, T] each, the index in int64.
template <class T>
void paired_forward(const Side& row_side, const Side& col_side, const AnyMetric& metric,
                    const Matrix& rows, const Matrix& cols, const Matrix& scores, int threads);

// The pairs of one side's items, each item's one after the other.
struct PairsByItem {
  Matrix starts;    // [1, n + 1] int64: where each item's pairs begin in the next three
  Matrix partners;  // [1, T] int64: the item of the other side
  Matrix upstream;  // [1, T]
  Matrix metric;    // [2, T] of double, absent if not wanted: see Gradients::metric
};

// Adds up the gradients of one side's items: sem [n, Ds] and unc [n, Du], absent if not wanted. An
// item's pairs are added in their order by one thread, or in chunks whose sums are added in their
// order: nothing depends on the threads.
template <class T>
void paired_backward(const Side& items, const Side& others, const AnyMetric& metric,
                     const PairsByItem& pairs, const Matrix& sem, const Matrix& unc, int threads);

}  // namespace idml::cpu
