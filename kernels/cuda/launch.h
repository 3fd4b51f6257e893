// What the bindings call: the walk over tiles with each of its epilogues. Pointers are the
// device's.

#pragma once

#include <cstdint>

#include "score.h"

namespace idml::cuda {

enum class Dtype { float32, bfloat16, float16 };

// One side's embeddings, [n, width], their features side by side and every item at a multiple of 16
// bytes. Absent (null) ones are zeros.
struct Items {
  const void* data = nullptr;
  const float* squares = nullptr;  // [n], their squared norms
  std::int64_t stride = 0;         // between items, in elements
  int width = 0;
};

// Some rows and some columns, whose tiles one launch takes.
struct Walk {
  Items sem, unc, sem2, unc2;
  Dtype dtype = Dtype::bfloat16;
  Form form = Form::distance;
  float inverse_tau = 0, gamma = 0;
  std::int64_t first_row = 0, last_row = 0, first_col = 0, last_col = 0;
  bool own = false;        // rows against themselves,
  bool symmetric = false;  // of which each tile stands for its mirror image too;
  bool triangle = false;   // these are the upper triangle
  // Below this share of ||x||^2 + ||y||^2 a square has cancelled. Tiles with such pairs are
  // flagged, and those that are flagged taken again, from differences.
  float limit = 0;
  int programs = 0;
  std::int8_t* flags = nullptr;  // [programs]
};

// Where a matrix of pairs goes, [rows, cols].
struct Pairs {
  void* data = nullptr;
  std::int64_t stride = 0;
};

void pairwise(const Walk& walk, const Pairs& scores, void* stream);

// The upstream gradient of a matrix of scores, of the embeddings' type.
struct Matrix {
  const void* data = nullptr;
  std::int64_t row_stride = 0, col_stride = 0;
};

// Where the weights of a backward go: those of pairs, absent where nobody wants them, and the sums
// by which items multiply themselves, of each tile.
struct WeightsTo {
  void* sem = nullptr;  // [rows, cols] of this launch
  void* unc = nullptr;
  std::int64_t stride = 0;
  bool mirrored = false;
  float* sem_rows = nullptr;  // [col tiles, rows]
  float* unc_rows = nullptr;
  std::int64_t rows_stride = 0;
  float* sem_cols = nullptr;  // [row tiles, cols]
  float* unc_cols = nullptr;
  std::int64_t cols_stride = 0;
};

void weigh_pairwise(const Walk& walk, const WeightsTo& to, const Matrix& upstream, void* stream);

enum class Reduction { log_sum_exp, sum, count, hinge, extremum };
enum class Where { any, same, different };

// See `idml_fast.stats`. Rows of the bounds, of the upstream gradient and of the state; -1 for
// none.
struct Statistic {
  Reduction reduction = Reduction::sum;
  Where where = Where::any;
  float power = 1, scale = 1;
  int threshold = -1, above = -1, below = -1;
  int value = -1, state = 0;
};

constexpr int MOST_STATISTICS = 4;

struct Statistics {
  int count = 0;
  Statistic of[MOST_STATISTICS];
  const std::int64_t* labels = nullptr;   // [N]
  const std::int64_t* labels2 = nullptr;  // [M]
  const float* bounds = nullptr;          // [B, N]
  std::int64_t bounds_stride = 0;
};

// What every tile knows of its items, [tiles, states, items of this launch].
struct OfTiles {
  float* data = nullptr;
  std::int64_t tile_stride = 0, state_stride = 0;
};

void rowstats(const Walk& walk, const Statistics& statistics, const OfTiles& rows,
              const OfTiles& cols, void* stream);

// The upstream gradient of statistics, and the states that they ended with.
struct Learned {
  const float* upstream = nullptr;  // [K, N]
  const double* state = nullptr;    // [S, N]
  std::int64_t count = 0;           // N
};

// Where the keys of `nearest` go, [rows, cols] of this launch, and which pairs have one; the others
// have NOTHING.
struct Keys {
  std::int32_t* data = nullptr;
  std::int64_t stride = 0;
  Where where = Where::any;
  bool largest = false, exclude_self = false;
  const std::int64_t* labels = nullptr;   // [N]
  const std::int64_t* labels2 = nullptr;  // [M]
  const float* above = nullptr;           // [N], a score has to be larger
};

constexpr std::int32_t NOTHING = INT32_MIN;

void nearest(const Walk& walk, const Keys& keys, void* stream);

void weigh_rowstats(const Walk& walk, const WeightsTo& to, const Statistics& statistics,
                    const Learned& learned, void* stream);

}  // namespace idml::cuda
