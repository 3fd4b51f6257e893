// The native module `_gpu`: pointers of the device, sizes and strides in, nothing of torch. Its
// callers are the launchers beside the kernels, which have checked everything.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "launch.h"
#include "layout.h"

namespace py = pybind11;
using namespace idml;
using namespace idml::cuda;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Form form_of(const std::string& name) {
  return name == "distance" ? Form::distance : name == "cosine" ? Form::cosine : Form::official;
}

Dtype dtype_of(const std::string& name) {
  return name == "bfloat16" ? Dtype::bfloat16 : name == "float16" ? Dtype::float16 : Dtype::float32;
}

Reduction reduction_of(const std::string& name) {
  return name == "log_sum_exp" ? Reduction::log_sum_exp
         : name == "sum"       ? Reduction::sum
         : name == "count"     ? Reduction::count
         : name == "hinge"     ? Reduction::hinge
                               : Reduction::extremum;
}

Where where_of(const std::string& name) {
  return name == "same" ? Where::same : name == "different" ? Where::different : Where::any;
}

// Binds a function without the interpreter's lock, which no launch needs.
template <class Function>
void bind(py::module_& m, const char* name, Function function) {
  m.def(name, function, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_gpu, m) {
  m.doc() = "CUDA kernels of idml_fast; call them through the launchers in idml_fast._cuda.";
  m.attr("TILE") = TILE;
  m.attr("MOST_STATISTICS") = MOST_STATISTICS;
  m.attr("ARCHITECTURES") = py::make_tuple(IDML_FAST_CUDA_ARCHS);

  py::class_<Items>(m, "Items", py::module_local())
      .def(py::init<>())
      .def(py::init([](Address data, Address squares, std::int64_t stride, int width) {
        return Items{pointer<void>(data), pointer<float>(squares), stride, width};
      }));
  py::class_<Walk>(m, "Walk", py::module_local())
      .def(py::init([](Items sem, Items unc, Items sem2, Items unc2, const std::string& dtype,
                       const std::string& form, float inverse_tau, float gamma,
                       std::int64_t first_row, std::int64_t last_row, std::int64_t first_col,
                       std::int64_t last_col, bool own, bool symmetric, bool triangle, float limit,
                       int programs, Address flags) {
        return Walk{sem,
                    unc,
                    sem2,
                    unc2,
                    dtype_of(dtype),
                    form_of(form),
                    inverse_tau,
                    gamma,
                    first_row,
                    last_row,
                    first_col,
                    last_col,
                    own,
                    symmetric,
                    triangle,
                    limit,
                    programs,
                    pointer<std::int8_t>(flags)};
      }));
  py::class_<Pairs>(m, "Pairs", py::module_local())
      .def(py::init(
          [](Address data, std::int64_t stride) { return Pairs{pointer<void>(data), stride}; }));
  py::class_<Matrix>(m, "Matrix", py::module_local())
      .def(py::init([](Address data, std::int64_t row_stride, std::int64_t col_stride) {
        return Matrix{pointer<void>(data), row_stride, col_stride};
      }));
  py::class_<WeightsTo>(m, "WeightsTo", py::module_local())
      .def(py::init([](Address sem, Address unc, std::int64_t stride, bool mirrored,
                       Address sem_rows, Address unc_rows, std::int64_t rows_stride,
                       Address sem_cols, Address unc_cols, std::int64_t cols_stride) {
        return WeightsTo{pointer<void>(sem), pointer<void>(unc),       stride,
                         mirrored,           pointer<float>(sem_rows), pointer<float>(unc_rows),
                         rows_stride,        pointer<float>(sem_cols), pointer<float>(unc_cols),
                         cols_stride};
      }));
  py::class_<Statistic>(m, "Statistic", py::module_local())
      .def(py::init([](const std::string& reduction, const std::string& where, float power,
                       float scale, int threshold, int above, int below, int value, int state) {
        return Statistic{reduction_of(reduction),
                         where_of(where),
                         power,
                         scale,
                         threshold,
                         above,
                         below,
                         value,
                         state};
      }));
  py::class_<Statistics>(m, "Statistics", py::module_local())
      .def(py::init([](const std::vector<Statistic>& statistics, Address labels, Address labels2,
                       Address bounds, std::int64_t bounds_stride) {
        Statistics found;
        found.count = static_cast<int>(statistics.size());
        for (int k = 0; k < found.count; ++k)
          found.of[k] = statistics[k];
        found.labels = pointer<std::int64_t>(labels);
        found.labels2 = pointer<std::int64_t>(labels2);
        found.bounds = pointer<float>(bounds);
        found.bounds_stride = bounds_stride;
        return found;
      }));
  py::class_<OfTiles>(m, "OfTiles", py::module_local())
      .def(py::init<>())
      .def(py::init([](Address data, std::int64_t tile_stride, std::int64_t state_stride) {
        return OfTiles{pointer<float>(data), tile_stride, state_stride};
      }));
  py::class_<Learned>(m, "Learned", py::module_local())
      .def(py::init([](Address upstream, Address state, std::int64_t count) {
        return Learned{pointer<float>(upstream), pointer<double>(state), count};
      }));

  py::class_<Keys>(m, "Keys", py::module_local())
      .def(py::init([](Address data, std::int64_t stride, const std::string& where, bool largest,
                       bool exclude_self, Address labels, Address labels2, Address above) {
        return Keys{pointer<std::int32_t>(data),
                    stride,
                    where_of(where),
                    largest,
                    exclude_self,
                    pointer<std::int64_t>(labels),
                    pointer<std::int64_t>(labels2),
                    pointer<float>(above)};
      }));

  bind(m, "nearest", [](const Walk& walk, const Keys& keys, Address stream) {
    nearest(walk, keys, pointer<void>(stream));
  });
  bind(m, "pairwise", [](const Walk& walk, const Pairs& scores, Address stream) {
    pairwise(walk, scores, pointer<void>(stream));
  });
  bind(m, "weigh_pairwise",
       [](const Walk& walk, const WeightsTo& to, const Matrix& upstream, Address stream) {
         weigh_pairwise(walk, to, upstream, pointer<void>(stream));
       });
  bind(m, "rowstats",
       [](const Walk& walk, const Statistics& statistics, const OfTiles& rows, const OfTiles& cols,
          Address stream) { rowstats(walk, statistics, rows, cols, pointer<void>(stream)); });
  bind(m, "weigh_rowstats",
       [](const Walk& walk, const WeightsTo& to, const Statistics& statistics,
          const Learned& learned, Address stream) {
         weigh_rowstats(walk, to, statistics, learned, pointer<void>(stream));
       });
}
