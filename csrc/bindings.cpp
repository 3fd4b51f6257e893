// The native module `_C`: raw pointers, sizes and strides in, nothing of torch. Its callers are the
// launchers beside the kernels, which have checked everything; nothing is checked again here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "matrix.h"
#include "nearest.h"
#include "paired.h"
#include "pairwise.h"
#include "rowstats.h"
#include "score.h"
#include "tile.h"

namespace py = pybind11;
using idml::AnyMetric;
using idml::Form;
using idml::Gram;
using idml::Matrix;
using idml::Panel;
using idml::Tile;
using idml::cpu::Best;
using idml::cpu::Choice;
using idml::cpu::DistanceWeighted;
using idml::cpu::Gradient;
using idml::cpu::Gradients;
using idml::cpu::Items;
using idml::cpu::NearPairs;
using idml::cpu::PairsByItem;
using idml::cpu::PairwiseUpstream;
using idml::cpu::Reduction;
using idml::cpu::Results;
using idml::cpu::Side;
using idml::cpu::Statistic;

namespace {

// Calls `call` with a double if the matrix holds these, else with a float.
template <class Call>
auto with_dtype(const Matrix& matrix, const Call& call) {
  return matrix.itemsize == sizeof(double) ? call(double()) : call(float());
}

Form form_of(const std::string& name) {
  return name == "distance" ? Form::distance : name == "cosine" ? Form::cosine : Form::official;
}

Reduction reduction_of(const std::string& name) {
  return name == "log_sum_exp" ? Reduction::log_sum_exp
         : name == "sum"       ? Reduction::sum
         : name == "count"     ? Reduction::count
         : name == "hinge"     ? Reduction::hinge
         : name == "histogram" ? Reduction::histogram
                               : Reduction::extremum;
}

std::int32_t where_of(const std::string& name) {
  return name == "same"        ? idml::cpu::same
         : name == "different" ? idml::cpu::different
                               : idml::cpu::same | idml::cpu::different;
}

const char* isa_name() {
  switch (idml::cpu::isa()) {
    case idml::cpu::Isa::avx512:
      return "AVX-512";
    case idml::cpu::Isa::avx2:
      return "AVX2";
    default:
      return "baseline";
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of idml_fast; call them through the launchers in idml_fast._cpu.";

  py::class_<Matrix>(m, "Matrix")
      .def(py::init<>())
      .def(py::init([](std::uintptr_t data, std::int64_t rows, std::int64_t cols,
                       std::int64_t row_stride, std::int64_t col_stride, std::int64_t itemsize) {
        return Matrix{data, rows, cols, row_stride, col_stride, itemsize};
      }));
  py::class_<Panel>(m, "Panel").def(py::init<Matrix, Matrix>());
  py::class_<Gram>(m, "Gram").def(py::init<Panel, Panel, Matrix, Matrix>());
  py::class_<Tile>(m, "Tile").def(py::init<Gram>()).def(py::init<Gram, Gram>());
  py::class_<AnyMetric>(m, "Metric")
      .def(py::init([](const std::string& form, double tau, double gamma) {
        return AnyMetric{form_of(form), tau, gamma};
      }));
  py::class_<Gradient>(m, "Gradient")
      .def(py::init<>())
      .def(py::init<Matrix, Matrix, Matrix, Matrix, bool, bool>());
  py::class_<Gradients>(m, "Gradients").def(py::init<Gradient, Gradient, Matrix>());
  py::class_<NearPairs>(m, "NearPairs")
      .def_readonly("sem", &NearPairs::sem)
      .def_readonly("unc", &NearPairs::unc);
  py::class_<PairwiseUpstream>(m, "PairwiseUpstream").def(py::init<Matrix, Matrix, Matrix>());
  py::class_<Statistic>(m, "Statistic")
      .def(py::init([](const std::string& reduction, const std::string& where, double power,
                       double scale, double shift, double low, double width, int bins, int state,
                       int threshold, int above, int below, int value) {
        return Statistic{reduction_of(reduction),
                         where_of(where),
                         power,
                         scale,
                         shift,
                         low,
                         width,
                         bins,
                         state,
                         threshold,
                         above,
                         below,
                         value};
      }));
  py::class_<Side>(m, "Side").def(py::init<Matrix, Matrix>());
  py::class_<PairsByItem>(m, "PairsByItem").def(py::init<Matrix, Matrix, Matrix, Matrix>());
  py::class_<Items>(m, "Items").def(py::init<std::int64_t, Matrix, Matrix, Matrix, Matrix>());

  py::class_<DistanceWeighted>(m, "DistanceWeighted")
      .def(py::init<>())
      .def(py::init<double, double, double, std::uint64_t>());
  py::class_<Choice>(m, "Choice")
      .def(py::init<std::int64_t, std::int64_t, bool, bool, bool, Matrix, Matrix, Matrix, bool,
                    bool, DistanceWeighted>());
  py::class_<Results>(m, "Results").def(py::init<Matrix, Matrix, Matrix>());
  py::class_<Best>(m, "Best").def(py::init<std::int64_t, Matrix, Matrix, Matrix, Matrix, Matrix>());

  m.def("isa", &isa_name);
  m.def("has_bf16", &idml::cpu::has_bf16);
  m.def("has_threads", &idml::cpu::has_threads);

  m.def("advise_huge_pages", &idml::cpu::advise_huge_pages);
  m.def(
      "squared_norms",
      [](const Matrix& x, const Matrix& out, int threads) {
        with_dtype(out,
                   [&](auto zero) { idml::cpu::squared_norms<decltype(zero)>(x, out, threads); });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pairwise_forward",
      [](const Tile& tile, const AnyMetric& metric, const Matrix& scores, const Matrix& mirror,
         int threads) {
        with_dtype(tile.sem.rows.squares, [&](auto zero) {
          idml::cpu::pairwise_forward<decltype(zero)>(tile, metric, scores, mirror, threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pairwise_backward",
      [](const Tile& tile, const AnyMetric& metric, const PairwiseUpstream& upstream,
         const Gradients& gradients, int threads) {
        return with_dtype(tile.sem.rows.squares, [&](auto zero) {
          return idml::cpu::pairwise_backward<decltype(zero)>(tile, metric, upstream, gradients,
                                                              threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rowstats_forward",
      [](const Tile& tile, const AnyMetric& metric, const std::vector<Statistic>& statistics,
         const Items& rows, const Items& cols, const Matrix& scores, int threads) {
        with_dtype(tile.sem.rows.squares, [&](auto zero) {
          idml::cpu::rowstats_forward<decltype(zero)>(tile, metric, statistics, rows, cols, scores,
                                                      threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rowstats_backward",
      [](const Tile& tile, const AnyMetric& metric, const std::vector<Statistic>& statistics,
         const Items& rows, const Items& cols, bool symmetric, const Gradients& gradients,
         int threads) {
        return with_dtype(tile.sem.rows.squares, [&](auto zero) {
          return idml::cpu::rowstats_backward<decltype(zero)>(tile, metric, statistics, rows, cols,
                                                              symmetric, gradients, threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "paired_forward",
      [](const Side& row_side, const Side& col_side, const AnyMetric& metric, const Matrix& rows,
         const Matrix& cols, const Matrix& scores, int threads) {
        with_dtype(scores, [&](auto zero) {
          idml::cpu::paired_forward<decltype(zero)>(row_side, col_side, metric, rows, cols, scores,
                                                    threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "paired_backward",
      [](const Side& items, const Side& others, const AnyMetric& metric, const PairsByItem& pairs,
         const Matrix& sem, const Matrix& unc, int threads) {
        with_dtype(pairs.upstream, [&](auto zero) {
          idml::cpu::paired_backward<decltype(zero)>(items, others, metric, pairs, sem, unc,
                                                     threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "nearest_offer",
      [](const Tile& tile, const AnyMetric& metric, const Choice& choice, const Best& best,
         int threads) {
        with_dtype(best.keys, [&](auto zero) {
          idml::cpu::nearest_offer<decltype(zero)>(tile, metric, choice, best, threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "nearest_finish",
      [](const Best& best, const Results& results, int threads) {
        with_dtype(best.keys, [&](auto zero) {
          idml::cpu::nearest_finish<decltype(zero)>(best, results, threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
}
