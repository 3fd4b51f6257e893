#include "launch.h"
#include "walk.cuh"

namespace idml::cuda {
namespace {

// The epilogue: the keys of a tile's pairs, see kernels/triton/select.py.
struct StoreKeys {
  Keys keys;

  // What is looked up for the tile's items.
  struct Looked {
    std::int64_t of_rows[TILE], of_cols[TILE];
    float above[TILE];
  };

  template <class View>
  __device__ __forceinline__ void operator()(View& view) const {
    const Metric<float> metric{view.walk.inverse_tau, view.walk.gamma};
    const Here& here = view.here;
    const auto& team = view.team;
    Looked& looked = view.memory.template beside<Looked>();
    for (int k = team.thread; k < TILE; k += View::Team::threads) {
      const std::int64_t row = here.first_row + (k < here.rows ? k : here.rows - 1);
      const std::int64_t col = here.first_col + (k < here.cols ? k : here.cols - 1);
      looked.of_rows[k] = keys.where == Where::any ? 0 : keys.labels[row];
      looked.of_cols[k] = keys.where == Where::any ? 0 : keys.labels2[col];
      looked.above[k] = keys.above == nullptr ? 0 : keys.above[row];
    }
    team.sync();
    for_pairs<typename View::Team>([&](int i, int j) {
      const int row = team.row(i), col = team.col(j);
      bool looks = !(keys.exclude_self && here.first_row + row == here.first_col + col);
      const bool same = looked.of_rows[row] == looked.of_cols[col];
      looks = looks && (keys.where == Where::any || same == (keys.where == Where::same));
      const Pair pair = view.pair(i, j);
      const float found = score<View::form>(pair.alpha2, pair.beta2, pair.versine, metric);
      looks = looks && !(keys.above != nullptr && found <= looked.above[row]);  // NaN passes
      view.number(row, col) =
          bits_as<float>(looks ? ordered(keys.largest ? found : -found) : NOTHING);
    });
    team.sync();
    // As bits: what is copied are integers.
    store_tile(view, WHOLE, reinterpret_cast<float*>(keys.data), keys.stride,
               static_cast<std::int64_t>(here.tile_row) * TILE,
               static_cast<std::int64_t>(here.tile_col) * TILE, false);
  }

  // A number as an integer of the same order: NaN above all, -0 like 0.
  static __device__ __forceinline__ std::int32_t ordered(float x) {
    const std::int32_t bits = bits_as<std::int32_t>(x), magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
      return 0x7fc00000;
    return bits < 0 ? -magnitude : magnitude;
  }
};

}  // namespace

void nearest(const Walk& walk, const Keys& keys, void* stream) {
  walk_all(walk, [&](auto) { return StoreKeys{keys}; }, stream);
}

}  // namespace idml::cuda
