// One tile of pairs on the CPU: squares from Gram products, row by row, on all threads, in vectors
// as wide as the machine has. An epilogue is a function of one row of squares, which stays in the
// first cache; the walk around it is written here once.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "matrix.h"
#include "score.h"

namespace idml::cpu {

enum class Isa { baseline, avx2, avx512 };

// The widest that this machine has; the environment variable IDML_FAST_CPU_ISA = baseline | avx2 |
// avx512 lowers it.
Isa isa();

// Whether the machine multiplies bfloat16 natively.
bool has_bf16();

// Whether this build has OpenMP.
bool has_threads();

// `body` is inlined into one function per instruction set, so each copy is compiled for that set.
#if defined(__x86_64__) && defined(__GNUC__)
template <class Body>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))) void run_avx512(const Body& body,
                                                                                  std::int64_t i) {
  body(i);
}
template <class Body>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body, std::int64_t i) {
  body(i);
}
#endif

template <class Body>
void run(Isa isa, const Body& body, std::int64_t i) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa == Isa::avx512)
    return run_avx512(body, i);
  if (isa == Isa::avx2)
    return run_avx2(body, i);
#endif
  body(i);
}

// body(0) ... body(count - 1) in any order; a body writes only what belongs to its own index, so
// the result does not depend on the threads. OpenMP because torch's own products use it: its
// threads are there already, and a second pool would fight them for the cores.
template <class Body>
void parallel(std::int64_t count, int threads, const Body& body) {
  const Isa chosen = isa();
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (count > 1 && threads > 1)
  for (std::int64_t i = 0; i < count; ++i)
    run(chosen, body, i);
}

// Asks for large pages under memory that is about to be written for the first time: a result of N x
// M costs a page fault every 4 KiB otherwise, which takes longer than the scores themselves. Only a
// hint; nothing happens where there are none.
void advise_huge_pages(const Matrix& matrix);

// out[i] = ||x_i||^2, accumulated in double.
template <class T>
void squared_norms(const Matrix& x, const Matrix& out, int threads);

// Below this share of ||x||^2 + ||y||^2 the expansion ||x||^2 + ||y||^2 +- 2 x.y has cancelled too
// much, and the square is taken from the components instead. Above it, an error of e (||x||^2 +
// ||y||^2) in the product is a relative error of at most e / near in the square, and half of that
// in its root.
template <class T>
constexpr T near = T(1) / T(256);

struct BFloat16 {
  std::uint16_t bits;

  IDML_INLINE operator float() const {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }

  // The nearest, of two the even one; NaN stays NaN.
  IDML_INLINE static BFloat16 of(float value) {
    const std::uint32_t wide = bits_as<std::uint32_t>(value);
    const std::uint32_t rounded = (wide + 0x7fffu + (wide >> 16 & 1u)) >> 16;
    return {static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded)};
  }
};

// Whether numbers that are T in the arithmetic are stored in bfloat16; doubles never are.
template <class T>
constexpr bool is_bfloat16(const Matrix& x) {
  return std::is_same_v<T, float> && x.itemsize == sizeof(BFloat16);
}

// A row of numbers as T: where it is or, of bfloat16, widened into `memory`.
template <class T>
IDML_INLINE const T* load_row(const Matrix& x, std::int64_t i, T* memory) {
  if (!is_bfloat16<T>(x))
    return x.row<T>(i);
  const BFloat16* stored = x.row<BFloat16>(i);
  for (std::int64_t j = 0; j < x.cols; ++j)
    memory[j] = stored[j];
  return memory;
}

// Where to write a row of numbers as T: where it belongs or, of bfloat16, into `memory`, from which
// `round_row` takes it there, from column `first` on.
template <class T>
IDML_INLINE T* begin_row(const Matrix& x, std::int64_t i, T* memory) {
  return is_bfloat16<T>(x) ? memory : x.row<T>(i);
}

template <class T>
IDML_INLINE void round_row(const T* row, const Matrix& x, std::int64_t i, std::int64_t first = 0) {
  if (!is_bfloat16<T>(x))
    return;
  BFloat16* stored = x.row<BFloat16>(i);
  for (std::int64_t j = first; j < x.cols; ++j)
    stored[j] = BFloat16::of(static_cast<float>(row[j]));
}

// sum_k (x_ik + sign * y_jk)^2 of elements stored as S
template <class S, class T>
IDML_INLINE T square_of_stored(const Matrix& x, std::int64_t i, const Matrix& y, std::int64_t j,
                               T sign) {
  const S* a = x.row<S>(i);
  const S* b = y.row<S>(j);
  T total = 0;
  if (x.col_stride == 1 && y.col_stride == 1) {
#pragma omp simd reduction(+ : total)
    for (std::int64_t k = 0; k < x.cols; ++k) {
      const T sum = T(a[k]) + sign * T(b[k]);
      total += sum * sum;
    }
    return total;
  }
  for (std::int64_t k = 0; k < x.cols; ++k) {
    const T sum = T(a[k * x.col_stride]) + sign * T(b[k * y.col_stride]);
    total += sum * sum;
  }
  return total;
}

template <class T>
IDML_INLINE T square_of_sum(const Gram& gram, std::int64_t i, std::int64_t j, T sign) {
  const Matrix& x = gram.rows.x;
  if (is_bfloat16<T>(x))
    return square_of_stored<BFloat16>(x, i, gram.cols.x, j, sign);
  return square_of_stored<T>(x, i, gram.cols.x, j, sign);
}

// ||y_j|| of all columns; only a product in bfloat16 asks for them.
template <class T>
IDML_INLINE std::vector<T> col_norms(const Gram& gram) {
  std::vector<T> norms(is_bfloat16<T>(gram.products) ? gram.products.cols : 0);
  for (std::size_t j = 0; j < norms.size(); ++j)
    norms[j] = std::sqrt(gram.cols.squares.row<T>(0)[j]);
  return norms;
}

// squares[j] = ||x_i + sign * y_j||^2 for one row of a product stored as S. NaN stays NaN.
template <class S, class T>
IDML_INLINE void squares_of_stored(const Gram& gram, std::int64_t i, T sign, const T* norms,
                                   T* squares) {
  const std::int64_t count = gram.products.cols;
  const S* products = gram.products.row<S>(i);
  const T row_square = gram.rows.squares.row<T>(0)[i];
  const T row_norm = std::sqrt(row_square);
  const T* col_squares = gram.cols.squares.row<T>(0);
  int cancelled = 0;
#pragma omp simd reduction(| : cancelled)
  for (std::int64_t j = 0; j < count; ++j) {
    const T scale = row_square + col_squares[j];
    T square;
    if constexpr (std::is_same_v<S, BFloat16>)
      square = T(products[j]) + (row_norm - norms[j]) * (row_norm - norms[j]);
    else
      square = scale + T(2) * sign * products[j];
    cancelled |= square < near<T> * scale ? 1 : 0;
    squares[j] = square < T(0) ? T(0) : square;
  }
  if (!cancelled)
    return;
  for (std::int64_t j = 0; j < count; ++j) {
    if (squares[j] < near<T> * (row_square + col_squares[j]))
      squares[j] = square_of_sum(gram, i, j, sign);
  }
}

template <class T>
IDML_INLINE void squares_of_row(const Gram& gram, std::int64_t i, T sign, const T* norms,
                                T* squares) {
  if (!gram.products.data) {  // one side is zero, and so are its squares
    const T* col_squares = gram.cols.squares.row<T>(0);
    const T row_square = gram.rows.squares.row<T>(0)[i];
    for (std::int64_t j = 0; j < gram.cols.squares.cols; ++j)
      squares[j] = row_square + col_squares[j];
    return;
  }
  if (is_bfloat16<T>(gram.products))
    return squares_of_stored<BFloat16>(gram, i, sign, norms, squares);
  squares_of_stored<T>(gram, i, sign, norms, squares);
}

// versines[j] = 1 - cos of one row of products stored as S, as long as they are there. A zero
// vector has cosine 0.
template <class S, class T>
IDML_INLINE void versines_of_stored(const Gram& sem, std::int64_t i, T inverse,
                                    const T* col_inverses, T* versines) {
  const S* products = sem.products.row<S>(i);
  for (std::int64_t j = 0; j < sem.products.cols; ++j) {
    const T inverses = inverse * col_inverses[j];
    const T halved = inverses == T(0) ? T(1) : T(products[j]) * inverses / T(2);
    const T versine = std::is_same_v<S, BFloat16> ? halved : T(1) - T(products[j]) * inverses;
    versines[j] = versine < T(0) ? T(0) : versine;
  }
}

// The same of the pairs that have cancelled, once their squares are there:
// 1 - cos = (||x - y||^2 - (||x|| - ||y||)^2) / (2 ||x|| ||y||). Identical vectors get exactly 0,
// even two zero vectors.
template <class T>
IDML_INLINE void versines_of_near(const Gram& sem, std::int64_t i, T inverse, const T* col_inverses,
                                  const T* alpha2, T* versines) {
  const T square = sem.rows.squares.row<T>(0)[i];
  const T* col_squares = sem.cols.squares.row<T>(0);
  for (std::int64_t j = 0; j < sem.cols.squares.cols; ++j) {
    const T difference = square * inverse - col_squares[j] * col_inverses[j];
    const T versine = (alpha2[j] - difference * difference) * inverse * col_inverses[j] / T(2);
    const bool cancelled = alpha2[j] < near<T> * (square + col_squares[j]);
    const T better = cancelled ? (versine < T(0) ? T(0) : versine) : versines[j];
    versines[j] = alpha2[j] == T(0) ? T(0) : better;
  }
}

template <class T>
IDML_INLINE void versines_of_row(const Gram& sem, std::int64_t i, T inverse, const T* col_inverses,
                                 T* versines) {
  if (is_bfloat16<T>(sem.products))
    return versines_of_stored<BFloat16>(sem, i, inverse, col_inverses, versines);
  versines_of_stored<T>(sem, i, inverse, col_inverses, versines);
}

// 1 / ||x||, 0 for a zero vector.
template <class T>
IDML_INLINE T inverse_norm(T square) {
  return square == T(0) ? T(0) : T(1) / std::sqrt(square);
}

// A row of the tile as an epilogue sees it.
template <class T>
struct Row {
  std::int64_t index;  // within the tile
  std::int64_t count;  // M
  T* sem;     // [M] squared semantic distances (not computed `without_alpha`); the epilogue may
              // overwrite them
  T* unc;     // [M] squared pair uncertainties, likewise; null for a conventional metric
  T inverse;  // 1 / ||s_i||; this and the next two for the cosine forms only
  const T* col_inverses;  // [M] 1 / ||s_j||
  const T* versines;      // [M] 1 - cos
};

// 16 rows of float are a cache line of every column that is written transposed.
constexpr std::int64_t block_rows = 16;

inline std::int64_t block_count(std::int64_t rows) {
  return (rows + block_rows - 1) / block_rows;
}

enum class Squares { all, without_alpha };

// One instantiation of `call` for each form, chosen here and nowhere else.
template <class Call>
auto with_form(Form form, const Call& call) {
  if (form == Form::distance)
    return call(std::integral_constant<Form, Form::distance>{});
  if (form == Form::cosine)
    return call(std::integral_constant<Form, Form::cosine>{});
  return call(std::integral_constant<Form, Form::official>{});
}

// Calls epilogue(row) for every row of one block of the tile.
template <Form form, Squares squares, class T, class Epilogue>
IDML_INLINE void walk_block(const Tile& tile, std::int64_t block, const Epilogue& epilogue) {
  const Gram& sem = tile.sem;
  const std::int64_t count = tile.cols();
  const std::int64_t end = std::min((block + 1) * block_rows, tile.rows());
  constexpr bool cosine = form != Form::distance;
  std::vector<T> alpha2(count);
  std::vector<T> beta2(tile.has_unc() ? count : 0);
  const std::vector<T> sem_norms = col_norms<T>(sem);
  const std::vector<T> unc_norms = col_norms<T>(tile.unc);
  std::vector<T> versines(cosine ? count : 0);
  std::vector<T> col_inverses(cosine ? count : 0);
  if constexpr (cosine) {
    const T* col_squares = sem.cols.squares.row<T>(0);
    for (std::int64_t j = 0; j < count; ++j)
      col_inverses[j] = inverse_norm(col_squares[j]);
  }
  for (std::int64_t i = block * block_rows; i < end; ++i) {
    const T inverse = cosine ? inverse_norm(sem.rows.squares.row<T>(0)[i]) : T(0);
    if constexpr (cosine)
      versines_of_row(sem, i, inverse, col_inverses.data(), versines.data());
    if constexpr (squares == Squares::all)
      squares_of_row(sem, i, T(-1), sem_norms.data(), alpha2.data());
    if constexpr (cosine)
      versines_of_near(sem, i, inverse, col_inverses.data(), alpha2.data(), versines.data());
    if (tile.has_unc())
      squares_of_row(tile.unc, i, T(1), unc_norms.data(), beta2.data());
    epilogue(Row<T>{i, count, alpha2.data(), tile.has_unc() ? beta2.data() : nullptr, inverse,
                    col_inverses.data(), versines.data()});
  }
}

// The scores of a row, from column `first` on; they may be written over the squares.
template <Form form, class T>
IDML_INLINE void score_row(const Row<T>& row, std::int64_t first, Metric<T> metric, T* scores) {
  constexpr bool cosine = form != Form::distance;
  if (!row.unc) {  // a choice within the loop would keep it from being vectorised
#pragma omp simd
    for (std::int64_t j = first; j < row.count; ++j)
      scores[j] = score<form>(row.sem[j], T(0), cosine ? row.versines[j] : T(0), metric);
    return;
  }
#pragma omp simd
  for (std::int64_t j = first; j < row.count; ++j)
    scores[j] = score<form>(row.sem[j], row.unc[j], cosine ? row.versines[j] : T(0), metric);
}

}  // namespace idml::cpu
