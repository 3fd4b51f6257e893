#include "gradient.cuh"
#include "launch.h"
#include "walk.cuh"

namespace idml::cuda {
namespace {

// The epilogue: the scores, and their mirror image.
template <class T>
struct Store {
  Pairs scores;

  template <class View>
  __device__ __forceinline__ void operator()(View& view) const {
    put_scores(view);
    view.team.sync();
    store_tile(view, static_cast<T*>(scores.data), scores.stride, view.here.first_row,
               view.here.first_col, view.walk.symmetric);
  }
};

// The upstream gradient of a matrix of scores.
template <class T>
struct Load {
  Matrix matrix;

  template <class View>
  __device__ __forceinline__ void operator()(View& view) const {
    put(view, matrix.row_stride, matrix.col_stride, [](float&, float x) { return x; });
    if (!view.walk.symmetric)
      return;
    view.team.sync();
    put(view, matrix.col_stride, matrix.row_stride,
        [](float& before, float x) { return before + x; });
  }

  // Goes along the items that are closer to each other in memory.
  template <class View, class Join>
  __device__ __forceinline__ void put(View& view, std::int64_t row_stride, std::int64_t col_stride,
                                      const Join& join) const {
    const Here& here = view.here;
    const T* data = static_cast<const T*>(matrix.data) + here.first_row * row_stride +
                    here.first_col * col_stride;
    const bool along_rows = col_stride <= row_stride;
    for (int k = view.team.thread; k < TILE * TILE; k += View::Team::threads) {
      const int row = along_rows ? k / TILE : k % TILE, col = along_rows ? k % TILE : k / TILE;
      if (row >= here.rows || col >= here.cols)
        continue;
      float& number = view.number(row, col);
      number = join(number, to_float(data[row * row_stride + col * col_stride]));
    }
  }
};

}  // namespace

void pairwise(const Walk& walk, const Pairs& scores, void* stream) {
  walk_all(walk, [&](auto number) { return Store<decltype(number)>{scores}; }, stream);
}

void weigh_pairwise(const Walk& walk, const WeightsTo& to, const Matrix& upstream, void* stream) {
  walk_all(
      walk,
      [&](auto number) {
        using T = decltype(number);
        return Weigh<T, Load<T>>{to, {upstream}};
      },
      stream);
}

}  // namespace idml::cuda
