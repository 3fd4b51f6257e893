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
    store_tile(view, WHOLE, static_cast<T*>(scores.data), scores.stride, view.here.first_row,
               view.here.first_col, view.walk.symmetric);
  }
};

// The upstream gradient of a matrix of scores, with that of their mirror image where the tile
// stands for it.
template <class T>
struct Load {
  Matrix matrix;

  struct Memory {
    float numbers[TILE * STRIP];
  };

  template <class View>
  __device__ __forceinline__ void load_tile(View&, Memory&) const {}

  template <class View>
  __device__ __forceinline__ void load_strip(View& view, Memory& memory, int first) const {
    view.team.sync();  // all have left the strip before
    load(view, memory, first, matrix.row_stride, matrix.col_stride,
         [](float&, float x) { return x; });
    if (!view.walk.symmetric)
      return;
    view.team.sync();
    load(view, memory, first, matrix.col_stride, matrix.row_stride,
         [](float& before, float x) { return before + x; });
  }

  // Goes along the items that are closer to each other in memory. Beyond the edge the last one
  // stands in.
  template <class View, class Join>
  __device__ __forceinline__ void load(View& view, Memory& memory, int first,
                                       std::int64_t row_stride, std::int64_t col_stride,
                                       const Join& join) const {
    const Here& here = view.here;
    const T* data = static_cast<const T*>(matrix.data) + here.first_row * row_stride +
                    here.first_col * col_stride;
    const bool along_rows = col_stride <= row_stride;
#pragma unroll 4
    for (int k = view.team.thread; k < TILE * STRIP; k += View::Team::threads) {
      const int row = along_rows ? k / STRIP : k % TILE, col = along_rows ? k % STRIP : k / TILE;
      const int read_row = row < here.rows ? row : here.rows - 1;
      const int read_col = first + col < here.cols ? first + col : here.cols - 1;
      float& number = memory.numbers[place_of_number<1>(row, col)];
      number = join(number, to_float(data[read_row * row_stride + read_col * col_stride]));
    }
  }

  template <class View>
  __device__ __forceinline__ float of_pair(View&, const Memory& memory, int row, int col,
                                           const Pair&) const {
    return memory.numbers[place_of_number<1>(row, col % STRIP)];
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
