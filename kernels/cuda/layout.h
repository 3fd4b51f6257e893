// Where things are: tiles in a problem, items and numbers in shared memory, pairs in the registers
// of a thread. All of it is arithmetic on integers, for the host as well, where the tests go
// through it.

#pragma once

#include "score.h"

namespace idml::cuda {

// Rows and columns of a tile.
constexpr int TILE = 128;

// Columns of a tile that lie side by side: as many as a warp has lanes.
constexpr int STRIP = 32;

// A line of shared memory: what one step takes of an item's features, in pieces of 16 bytes.
constexpr int LINE = 128;
constexpr int PIECE = 16;
constexpr int PIECES = LINE / PIECE;

// Where a piece of a line is, in bytes. The lines of 8 items in a row have the same piece in
// different banks, in the order that TMA and wgmma know as the swizzle of 128 bytes.
IDML_INLINE int place_of_piece(int item, int piece) {
  return item * LINE + ((piece ^ (item % 8)) * PIECE);
}

// Where the number of a pair is, in numbers, among some strips of a tile. Another bank for each of
// 32 threads, whether they have a row, a column, a diagonal (row r and column c ^ r), or what `mma`
// gives them: 8 rows and every second of 8 columns.
template <int STRIPS = TILE / STRIP>
IDML_INLINE int place_of_number(int row, int col) {
  const int high = row / 4 % 8;
  return row * (STRIPS * STRIP) + (col ^ (row % 4 * 8 + (high ^ high / 2)));
}

// The number with which a warp's lane begins when the warp copies a part of a strip to a matrix,
// WIDE numbers a lane; TRANSPOSED, if the matrix has the tile's columns as rows. Part by part they
// go along 32 columns of the matrix and have every row of it once, no bank twice.
struct Begin {
  int row, col;  // of the matrix
};

template <int WIDE, bool TRANSPOSED>
IDML_INLINE Begin begin_of_part(int part, int lane) {
  constexpr int STEPS = STRIP / WIDE;
  const int across = lane % WIDE, col = lane / WIDE * WIDE;
  if (TRANSPOSED)
    return {across % 4 * 8 + across / 4 + part % STEPS * (WIDE / 4), part / STEPS * STRIP + col};
  return {part / 4 * 4 * WIDE + across * 4 + part % 4, col};
}

template <int WIDE>
constexpr int PARTS = TILE * STRIP / (32 * WIDE);

struct TilePlace {
  int row, col;
  bool there;
};

// The tile that a program takes. A group of row tiles goes along the columns together, so that both
// stay in the L2 cache. In a triangle, where a later group has fewer columns, the first and the
// last group are laid end to end, the second and the last but one, and so on: all of these are
// equally long. The twin of `place_of_tile` in kernels/triton/tile.py, for square tiles.
IDML_INLINE TilePlace place_of_tile(int program, int row_tiles, int col_tiles, bool triangle,
                                    int group_size) {
  const int groups = (row_tiles + group_size - 1) / group_size;
  const int length = triangle ? 2 * row_tiles - (groups - 1) * group_size : col_tiles;
  int group = program / (group_size * length);
  const int rest = program % (group_size * length);
  int col = rest / group_size;
  bool there = true;
  if (triangle) {
    const int first_length = row_tiles - group * group_size;
    const int second = groups - 1 - group;
    const bool is_second = col >= first_length;
    there = group != second || !is_second;
    col = is_second ? col - first_length + second * group_size : col + group * group_size;
    group = is_second ? second : group;
  }
  const int row = group * group_size + rest % group_size;
  there = there && row < row_tiles && (!triangle || row <= col) && col < col_tiles;
  return {row, col, there};
}

// How the warps of a tile share its pairs: a thread has ROWS x COLS, in blocks of 8 x 2, as `mma`
// and `wgmma` leave them. Four lanes have the same rows, eight the same columns; so have warps. Two
// blocks of 8 rows are side by side; the next two are BLOCK_PITCH rows on, those of the next warp
// WARP_PITCH. Blocks of columns are every warp's in turn, so that each has a part of every strip.
template <int WARPS_DOWN, int WARPS_ACROSS, int BLOCK_PITCH, int WARP_PITCH>
struct Share {
  static constexpr int threads = 32 * WARPS_DOWN * WARPS_ACROSS;
  static constexpr int warps_down = WARPS_DOWN, warps_across = WARPS_ACROSS;
  static constexpr int ROWS = TILE / WARPS_DOWN / 8, COLS = TILE / WARPS_ACROSS / 4;

  int thread, lane, down, across;  // the warp's place in the tile

  IDML_INLINE explicit Share(int thread)
      : thread(thread),
        lane(thread % 32),
        down(thread / 32 % WARPS_DOWN),
        across(thread / 32 / WARPS_DOWN) {}

  IDML_INLINE int row(int i) const {
    return down * WARP_PITCH + i / 2 * BLOCK_PITCH + i % 2 * 8 + lane / 4;
  }
  IDML_INLINE int col(int j) const {
    return (j / 2 * WARPS_ACROSS + across) * 8 + lane % 4 * 2 + j % 2;
  }
};

}  // namespace idml::cuda
