// Views of memory that belongs to somebody else (a torch tensor), and one tile of pairs made of
// them.

#pragma once

#include <cstdint>

namespace idml {

// A strided matrix as Python hands it over; strides count elements. A null pointer means: absent.
struct Matrix {
  std::uintptr_t data = 0;
  std::int64_t rows = 0, cols = 0;
  std::int64_t row_stride = 0, col_stride = 0;
  std::int64_t itemsize = 0;  // bytes: 2 for bfloat16, 4 for float, 8 for double

  template <class T>
  T* row(std::int64_t i) const {
    return reinterpret_cast<T*>(data) + i * row_stride;
  }
};

// Some consecutive items of one side of the tile.
struct Panel {
  Matrix x;        // [n, D], absent if they are all zero
  Matrix squares;  // [1, n] squared norms
};

// One of a tile's two products: x . y or, in bfloat16, 2 (|x||y| - x . y) for sem and
// 2 (|x||y| + x . y) for unc, which have cancelled before they were rounded.
struct Gram {
  Panel rows;       // N items
  Panel cols;       // M items
  Matrix products;  // [N, M], absent where they are not needed or one side is zero
  Matrix weights;   // [N, M], which a backward writes; may be the products' own memory
};

struct Tile {
  Gram sem;
  Gram unc;  // absent (its panels are) for a conventional metric

  std::int64_t rows() const { return sem.rows.squares.cols; }
  std::int64_t cols() const { return sem.cols.squares.cols; }
  bool has_unc() const { return unc.rows.squares.data != 0; }
};

}  // namespace idml
