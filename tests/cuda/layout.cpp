// Goes through all of layout.h, what the walks make of it, and the arithmetic of the kernels, on
// the host. `layout CHECK` ends with the first violation; `layout` says which checks there are.

#include <array>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "walk_ampere.cuh"
#include "walk_hopper.cuh"

namespace idml::cuda {
namespace {

template <class... Where>
void expect(bool right, const char* violation, const Where&... where) {
  if (right)
    return;
  std::cout << violation << ':';
  ((std::cout << ' ' << where), ...);
  std::cout << '\n';
  std::exit(1);
}

// Whether shared memory serves some lanes at once: none needs a bank of 4 bytes that another has.
// `place(lane)` is in units of so many bytes, of which a lane takes one.
template <class Place>
bool is_served(int lanes, int bytes, const Place& place) {
  bool taken[32] = {};
  for (int lane = 0; lane < lanes; ++lane) {
    for (int word = 0; word < bytes / 4; ++word) {
      bool& bank = taken[(place(lane) * bytes / 4 + word) % 32];
      if (bank)
        return false;
      bank = true;
    }
  }
  return true;
}

// 16 bytes a lane are taken by 8 lanes at a time.
template <class Place>
bool pieces_are_served(const Place& place) {
  return is_served(8, PIECE, [&](int lane) { return place(lane) / PIECE; });
}

void pieces_lie_as_tma_puts_them() {
  std::vector<bool> taken(TILE * PIECES);
  for (int item = 0; item < TILE; ++item) {
    for (int piece = 0; piece < PIECES; ++piece) {
      const int place = place_of_piece(item, piece), plain = item * LINE + piece * PIECE;
      expect(place == (plain ^ (plain >> 7 & 7) << 4), "another swizzle", item, piece);
      expect(!taken[place / PIECE], "a place twice", item, piece);
      taken[place / PIECE] = true;
    }
  }
}

// As in load_lines and multiply_lines.
void pieces_have_no_bank_twice() {
  for (int first = 0; first < TILE * PIECES; first += 8) {
    const auto copied = [&](int lane) {
      return place_of_piece((first + lane) / PIECES, (first + lane) % PIECES);
    };
    expect(pieces_are_served(copied), "copies", first);
  }
  for (int first = 0; first < ampere::Block::threads; first += 8) {  // the rows of a matrix
    for (int piece = 0; piece < PIECES; piece += 2) {
      for (int block = 0; block < TILE; block += 16) {
        const auto of_rows = [&](int k) {
          const ampere::Block team(first + k);
          return place_of_piece((team.loaded_row() + block) % TILE, piece + team.lane / 16);
        };
        const auto of_cols = [&](int k) {
          const ampere::Block team(first + k);
          return place_of_piece((team.loaded_col() + block) % TILE, piece + team.lane / 8 % 2);
        };
        expect(pieces_are_served(of_rows), "matrices of rows", first, piece, block);
        expect(pieces_are_served(of_cols), "matrices of columns", first, piece, block);
      }
    }
  }
}

// Each number has a place of its own.
template <int STRIPS>
void places_in_strips() {
  std::vector<bool> taken(TILE * STRIPS * STRIP);
  for (int row = 0; row < TILE; ++row) {
    for (int col = 0; col < STRIPS * STRIP; ++col) {
      const int place = place_of_number<STRIPS>(row, col);
      expect(place >= 0 && place < TILE * STRIPS * STRIP, "beyond the memory", STRIPS, row, col);
      expect(!taken[place], "a place twice", STRIPS, row, col);
      taken[place] = true;
    }
  }
}

void numbers_have_their_places() {
  places_in_strips<1>();
  places_in_strips<TILE / STRIP>();
}

template <class Share, class... Number>
void numbers_of_share(Number... number) {
  for (int first = 0; first < Share::threads; first += 32) {
    for (int i = 0; i < Share::ROWS; ++i) {
      for (int j = 0; j < Share::COLS; ++j) {
        const auto of_lane = [&](int lane) {
          const Share team(first + lane, number...);
          return place_of_number(team.row(i), team.col(j));
        };
        expect(is_served(32, 4, of_lane), "lanes of a share", Share::threads, first, i, j);
      }
    }
  }
}

template <int STRIPS>
void banks_in_strips() {
  for (int first = 0; first + 32 <= TILE; ++first) {
    for (int same = 0; same < STRIPS * STRIP; ++same) {
      const auto in_column = [&](int lane) { return place_of_number<STRIPS>(first + lane, same); };
      expect(is_served(32, 4, in_column), "32 rows", STRIPS, first, same);
    }
  }
  for (int first = 0; first + 32 <= STRIPS * STRIP; ++first) {
    for (int same = 0; same < TILE; ++same) {
      const auto in_row = [&](int lane) { return place_of_number<STRIPS>(same, first + lane); };
      expect(is_served(32, 4, in_row), "32 columns", STRIPS, first, same);
    }
  }
  for (int first = 0; first < TILE; first += 32) {
    for (int step = 0; step < STRIPS * STRIP; ++step) {
      const auto on_diagonal = [&](int lane) {
        return place_of_number<STRIPS>(first + lane, step ^ lane);
      };
      expect(is_served(32, 4, on_diagonal), "a diagonal", STRIPS, first, step);
    }
  }
}

void numbers_have_no_bank_twice() {
  banks_in_strips<1>();
  banks_in_strips<TILE / STRIP>();
  numbers_of_share<ampere::Block>();
  numbers_of_share<hopper::Warpgroup>(0);
}

// All pairs once; and a thread's are what mma and wgmma leave in sums[i / 2][j / 2][i % 2 * 2 + j %
// 2]: of blocks of 16 x 8 the rows lane / 4 and 8 more, the columns lane % 4 * 2 and the next.
// `corner(warp, i / 2, j / 2)` is where a block begins; a warpgroup has a number.
struct Corner {
  int row, col;
};

template <class Share, class FindCorner, class... Number>
void pairs_of_share(const FindCorner& corner, Number... number) {
  std::vector<bool> taken(TILE * TILE);
  for (int thread = 0; thread < Share::threads; ++thread) {
    const Share team(thread, number...);
    for (int i = 0; i < Share::ROWS; ++i) {
      for (int j = 0; j < Share::COLS; ++j) {
        const int row = team.row(i), col = team.col(j), lane = thread % 32;
        expect(row >= 0 && row < TILE && col >= 0 && col < TILE, "beyond the tile", thread, i, j);
        expect(!taken[row * TILE + col], "a pair twice", thread, i, j);
        taken[row * TILE + col] = true;
        const Corner begin = corner(thread / 32, i / 2, j / 2);
        expect(row == begin.row + lane / 4 + i % 2 * 8, "another row", thread, i);
        expect(col == begin.col + lane % 4 * 2 + j % 2, "another column", thread, j);
      }
    }
  }
  for (std::size_t pair = 0; pair < taken.size(); ++pair)
    expect(taken[pair], "nobody's", pair);
}

void threads_share_all_pairs() {
  // The rows and columns that multiply_lines loads for a warp; `wgmma` takes 64 rows, 16 a warp.
  pairs_of_share<ampere::Block>(
      [](int warp, int i, int j) { return Corner{warp % 2 * 64 + 16 * i, warp / 2 * 8 + 32 * j}; });
  pairs_of_share<hopper::Warpgroup>(
      [](int warp, int i, int j) { return Corner{64 * i + 16 * warp, 8 * j}; }, 0);
  pairs_of_share<ampere::LargeBlock>(
      [](int warp, int, int j) { return Corner{warp % 8 * 16, warp / 8 * 8 + 32 * j}; });
}

// As in Weigh: the pairs of a thread from a column on are those of a half.
template <class Share, class... Number>
void halves_of_share(Number... number) {
  for (int thread = 0; thread < Share::threads; ++thread) {
    const Share team(thread, number...);
    for (int j = 0; j < Share::COLS; ++j) {
      const bool second = j >= Share::COLS / 2;
      expect(team.col(j) / (TILE / 2) == second, "another half", Share::threads, thread, j);
    }
  }
}

void threads_share_both_halves() {
  halves_of_share<ampere::Block>();
  halves_of_share<ampere::LargeBlock>();
  halves_of_share<hopper::Warpgroup>(0);
}

// As in Weigh::weigh_strip, by some helpers: a lane has another column at every step, no two have
// the same at once, and what goes from lane to lane stays with its column.
void diagonals_of(int helpers) {
  const int steps = STRIP / helpers;
  for (int helper = 0; helper < helpers; ++helper) {
    std::array<std::vector<bool>, 32> had;
    std::array<int, 32> carried;
    for (int lane = 0; lane < 32; ++lane) {
      had[lane].resize(STRIP);
      carried[lane] = (helper * steps) ^ lane;
    }
    for (int step = 0; step < steps; ++step) {
      std::vector<bool> at_once(STRIP);
      for (int lane = 0; lane < 32; ++lane) {
        const int col = (helper * steps) ^ lane ^ step;
        expect(col >= 0 && col < STRIP && !at_once[col] && !had[lane][col], "a column twice",
               helpers, helper, step, lane);
        at_once[col] = had[lane][col] = true;
        expect(carried[lane] == col, "the sums of another", helpers, helper, step, lane);
      }
      const auto before = carried;
      for (int lane = 0; lane < 32; ++lane)
        carried[lane] = before[lane ^ ((step ^ (step + 1)) % steps)];
    }
    for (int lane = 0; lane < 32; ++lane)
      expect(carried[lane] == ((helper * steps) ^ lane), "not its own", helpers, helper, lane);
  }
}

void diagonals_have_all_pairs() {
  diagonals_of(1);
  diagonals_of(2);
}

template <int WIDE, bool TRANSPOSED>
void parts_of_matrix() {
  constexpr int ROWS = TRANSPOSED ? STRIP : TILE, COLS = TRANSPOSED ? TILE : STRIP;
  std::vector<bool> taken(TILE * STRIP);
  for (int part = 0; part < PARTS<WIDE>; ++part) {
    const auto begin = [&](int lane) { return begin_of_part<WIDE, TRANSPOSED>(part, lane); };
    int lanes_of_row[TILE] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const auto [row, col] = begin(lane);
      expect(row >= 0 && row < ROWS && col >= 0 && col + WIDE <= COLS, "beyond", WIDE, part, lane);
      expect(col % WIDE == 0, "not aligned", WIDE, TRANSPOSED, part, lane);
      expect(col / 32 == begin(0).col / 32, "columns apart", WIDE, TRANSPOSED, part, lane);
      ++lanes_of_row[row];
      for (int k = 0; k < WIDE; ++k) {
        expect(!taken[row * COLS + col + k], "a number twice", WIDE, TRANSPOSED, part, lane);
        taken[row * COLS + col + k] = true;
      }
    }
    for (const int lanes : lanes_of_row)  // 32 columns in a row, if any
      expect(lanes == 0 || lanes == 32 / WIDE, "less of a row", WIDE, TRANSPOSED, part);
    for (int k = 0; k < WIDE; ++k) {
      const auto read = [&](int lane) {
        const auto [row, col] = begin(lane);
        return TRANSPOSED ? place_of_number(col + k, row) : place_of_number(row, col + k);
      };
      expect(is_served(32, 4, read), "a bank twice", WIDE, TRANSPOSED, part, k);
    }
  }
  for (std::size_t at = 0; at < taken.size(); ++at)
    expect(taken[at], "not copied", WIDE, at);
}

void parts_copy_a_strip() {
  parts_of_matrix<4, false>();
  parts_of_matrix<4, true>();
  parts_of_matrix<8, false>();
  parts_of_matrix<8, true>();
}

// `programs` is that of Walk.programs in kernels/triton/tile.py.
void tiles_of_problem(int row_tiles, int col_tiles, bool triangle, int group_size) {
  const int groups = (row_tiles + group_size - 1) / group_size;
  const int programs =
      triangle ? (groups + 1) / 2 * (2 * row_tiles - (groups - 1) * group_size) * group_size
               : groups * group_size * col_tiles;
  std::vector<bool> taken(row_tiles * col_tiles);
  for (int program = 0; program < programs; ++program) {
    const auto [row, col, there] =
        place_of_tile(program, row_tiles, col_tiles, triangle, group_size);
    if (!there)
      continue;
    const bool is_tile = row >= 0 && row < row_tiles && col >= 0 && col < col_tiles;
    expect(is_tile && (!triangle || row <= col), "no tile", row_tiles, col_tiles, program);
    expect(!taken[row * col_tiles + col], "a tile twice", row_tiles, col_tiles, program);
    taken[row * col_tiles + col] = true;
  }
  for (int row = 0; row < row_tiles; ++row)
    for (int col = triangle ? row : 0; col < col_tiles; ++col)
      expect(taken[row * col_tiles + col], "not taken", row_tiles, col_tiles, row, col);
}

void programs_take_all_tiles() {
  for (const int group_size : {1, 2, 3, 5, GROUP, 16}) {
    for (int row_tiles = 1; row_tiles <= 40; ++row_tiles)
      for (int col_tiles = 1; col_tiles <= 40; ++col_tiles)
        tiles_of_problem(row_tiles, col_tiles, false, group_size);
    for (int tiles = 1; tiles <= 60; ++tiles)
      tiles_of_problem(tiles, tiles, true, group_size);
  }
}

// A model of the barriers in walk_hopper.cuh: what each warp does with them, in its order. Phases
// are numbered here; the kernel knows their parity only, so that a warp that waits for the end of
// one must find the barrier in that very phase or in the next. And nobody may arrive in another
// phase.
struct Operation {
  bool waits;
  int barrier, phase;
};
using Agent = std::vector<Operation>;

struct ModelBarrier {
  int arrivals, arrived = 0, phase = 0;
};

// All agents go as far as they can, but for one that stops before an operation: what it has yet to
// arrive at comes as late as anything can come, what the others do comes as early. Since what
// agents do depends on no more than the order of phases, this finds every order that can go wrong.
void go(const std::vector<Agent>& agents, std::vector<ModelBarrier> barriers, std::size_t stopped,
        std::size_t before, int steps, int tiles) {
  std::vector<std::size_t> at(agents.size());
  const auto next = [&](std::size_t agent) -> const Operation& {
    const Operation& next = agents[agent][at[agent]];
    const int ahead = barriers[next.barrier].phase - next.phase;
    expect(ahead == 0 || (next.waits && ahead == 1), "another phase", steps, tiles, agent,
           at[agent], next.barrier, ahead);
    return next;
  };
  for (bool moves = true; moves;) {
    moves = false;
    for (std::size_t agent = 0; agent < agents.size(); ++agent) {
      const std::size_t end = agent == stopped ? before : agents[agent].size();
      for (; at[agent] < end; ++at[agent], moves = true) {
        const Operation& operation = next(agent);
        ModelBarrier& barrier = barriers[operation.barrier];
        if (operation.waits && barrier.phase == operation.phase)
          break;
        if (operation.waits || ++barrier.arrived < barrier.arrivals)
          continue;
        barrier.arrived = 0;
        ++barrier.phase;
      }
    }
  }
  if (stopped < agents.size()) {
    expect(at[stopped] == before, "stuck", steps, tiles, stopped, before);
    next(stopped);
  } else {
    for (std::size_t agent = 0; agent < agents.size(); ++agent)
      expect(at[agent] == agents[agent].size(), "stuck", steps, tiles, agent);
  }
}

void ring_of(int steps, int tiles) {
  using hopper::STAGES, hopper::WARPGROUPS;
  constexpr int WARPS = hopper::Warpgroup::warps_down;
  // `issued` is no barrier of the kernel: TMA has what to copy, and copies in any order.
  const int filled = 0, emptied = STAGES, issued = 2 * STAGES, multiplied = 3 * STAGES,
            finished = multiplied + 1, met = finished + 1;
  std::vector<ModelBarrier> barriers(met + WARPGROUPS, {1});
  for (int stage = 0; stage < STAGES; ++stage)
    barriers[emptied + stage] = {WARPS};
  for (int barrier = multiplied; barrier < met + WARPGROUPS; ++barrier)
    barriers[barrier] = {WARPS};

  // The copies of each stage, the producer, the warps of the warpgroups.
  std::vector<Agent> agents(STAGES + 1 + WARPGROUPS * WARPS);
  for (int filling = 0; filling < tiles * steps; ++filling) {
    const int stage = filling % STAGES, round = filling / STAGES;
    Agent &copies = agents[stage], &producer = agents[STAGES];
    if (round > 0)
      producer.push_back({true, emptied + stage, round - 1});
    producer.push_back({false, issued + stage, round});
    copies.push_back({true, issued + stage, round});
    copies.push_back({false, filled + stage, round});
  }
  for (int turn = 0; turn < tiles; ++turn) {
    for (int warp = 0; warp < WARPS; ++warp) {
      Agent& own = agents[STAGES + 1 + turn % WARPGROUPS * WARPS + warp];
      const auto empty = [&](int taken) {
        own.push_back({false, emptied + taken % STAGES, taken / STAGES});
      };
      own.push_back({false, met + turn % WARPGROUPS, turn / WARPGROUPS});
      own.push_back({true, met + turn % WARPGROUPS, turn / WARPGROUPS});
      if (turn > 0)
        own.push_back({true, multiplied, turn - 1});
      int taking = turn * steps;
      for (int step = 0; step < steps; ++step, ++taking) {
        own.push_back({true, filled + taking % STAGES, taking / STAGES});
        if (step + 1 == steps)
          own.push_back({false, multiplied, turn});
        if (step > 0)
          empty(taking - 1);
      }
      empty(taking - 1);
      if (turn > 0)
        own.push_back({true, finished, turn - 1});
      own.push_back({false, finished, turn});
    }
  }
  go(agents, barriers, agents.size(), 0, steps, tiles);
  for (std::size_t stopped = 0; stopped < agents.size(); ++stopped) {
    const bool another_warp = stopped > STAGES + 1 && (stopped - STAGES - 1) % WARPS > 0;
    if (another_warp)
      continue;  // does what the warpgroup's first does
    for (std::size_t before = 0; before < agents[stopped].size(); ++before)
      go(agents, barriers, stopped, before, steps, tiles);
  }
}

void nobody_is_a_phase_ahead() {
  for (int steps = 1; steps <= 9; ++steps)
    for (int tiles = 1; tiles <= 12; ++tiles)
      ring_of(steps, tiles);
}

// Whether float is within so many times 2^-24 of double, of a number of such a magnitude. What is
// below 2^-70 may have underflowed on the way. A NaN is not near.
bool is_near(float found, double expected, double magnitude, double times) {
  return std::abs(found - expected) <= times * 0x1p-24 * magnitude + 0x1p-70;
}

// Below 1.5 ulp, as it says, wherever the result is a normal number.
void exponential_is_that_in_double() {
  const auto last = bits_as<std::uint32_t>(87.0f);
  for (std::uint32_t bits = 0; bits <= last; bits += 997) {
    const float r = bits_as<float>(bits), found = exp_negative(r);
    const double expected = std::exp(-double{r});
    const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
    expect(std::abs(found - expected) < 1.5 * ulp, "exponential", r, found, expected);
  }
}

// Calls `call(alpha2, beta2, versine, metric)`, of numbers that float and double both have.
template <class Call>
void for_pairs_and_metrics(const Call& call) {
  for (const float alpha2 :
       {0.0f, 1e-44f, 1e-38f, 1e-12f, 1e-5f, 0.03f, 0.7f, 1.0f, 1.9f, 4.0f, 310.0f, 1e6f})
    for (const float beta2 : {0.0f, 1e-12f, 1e-4f, 0.2f, 1.0f, 3.3f, 70.0f, 1e5f})
      for (const float versine : {0.0f, 1e-6f, 0.01f, 0.5f, 1.0f, 1.3f, 2.0f})
        for (const float inverse_tau : {0.0f, 0.01f, 0.3f, 1.0f, 7.0f})
          for (const float gamma : {0.0f, 0.4f, 5.0f})
            call(alpha2, beta2, versine, Metric<float>{inverse_tau, gamma});
}

template <Form form>
void score_in_form() {
  for_pairs_and_metrics([](float alpha2, float beta2, float versine, Metric<float> metric) {
    const Metric<double> exactly{metric.inverse_tau, metric.gamma};
    const double above = (form == Form::official ? beta2 : std::sqrt(double{beta2})) + metric.gamma;
    const double length = form == Form::official ? alpha2 : std::sqrt(double{alpha2});
    const double scaled = above * metric.inverse_tau, r = scaled == 0 ? 0 : scaled / length;
    const double decay = std::exp(-r);
    const auto near = [&](const char* what, float found, double expected, double magnitude) {
      expect(is_near(found, expected, magnitude, 8), what, static_cast<int>(form), alpha2, beta2,
             versine, metric.inverse_tau, metric.gamma, found, expected);
    };
    const auto weights_near = [&](const Weights<float>& found, const Weights<double>& expected,
                                  double times, double along_row, double along_col) {
      const auto whole = [&](const char* what, float found, double expected) {
        near(what, found, expected, times * std::abs(expected));
      };
      whole("product", found.product, expected.product);
      near("diagonal_row", found.diagonal_row, expected.diagonal_row,
           times * (std::abs(expected.diagonal_row) + along_row));
      near("diagonal_col", found.diagonal_col, expected.diagonal_col,
           times * (std::abs(expected.diagonal_col) + along_col));
      whole("sum", found.sum, expected.sum);
      whole("of_gamma", found.of_gamma, expected.of_gamma);
      whole("inverse_alpha", found.inverse_alpha, expected.inverse_alpha);
    };

    // exp(-r) loses what r has lost, times r.
    const double times = 1 + (r < 100 ? r : 100);
    const double expected =
        form == Form::distance ? std::sqrt(double{alpha2}) * decay : 1 - versine * decay;
    near("score", score<form>(alpha2, beta2, versine, metric), expected,
         form == Form::distance ? times * expected : 1 + versine);
    for (const auto [row, col] : {std::array{1.0f, 1.0f}, {0.3f, 4.0f}, {0.0f, 2.0f}}) {
      // The diagonals are differences in the cosine forms, of this among others.
      const double along = form == Form::distance ? 0 : 2 * decay * std::abs(1 - double{versine});
      weights_near(weights<form>(alpha2, beta2, versine, row, col, metric),
                   weights<form, double>(alpha2, beta2, versine, row, col, exactly), times,
                   along * row * row, along * col * col);
    }
    // Once more from the score, where float has it: no digit is lost then.
    if (form == Form::distance && r < 80)
      weights_near(distance_weights(static_cast<float>(expected), std::sqrt(beta2), metric),
                   weights<form, double>(alpha2, beta2, versine, 1, 1, exactly), 1, 0, 0);
  });
}

void scores_are_those_in_double() {
  score_in_form<Form::distance>();
  score_in_form<Form::cosine>();
  score_in_form<Form::official>();
}

// What bits of a half type stand for, by their definition; what would be infinite is one step more.
template <class T>
double value_of(int bits) {
  constexpr bool is_bfloat16 = std::is_same_v<T, Bfloat16>;
  constexpr int digits = is_bfloat16 ? 7 : 10, bias = is_bfloat16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> digits, fraction = bits & ((1 << digits) - 1);
  const double magnitude = exponent == 0
                               ? std::ldexp(fraction, 1 - bias - digits)
                               : std::ldexp(fraction + (1 << digits), exponent - bias - digits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <class T>
void numbers_of_half_type(int infinity) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const int magnitude = bits & 0x7fff;
    const float x = to_float(T{static_cast<std::uint16_t>(bits)});
    const int again = rounded<T>(x).bits;
    if (magnitude > infinity) {
      expect(std::isnan(x) && (again & 0x7fff) > infinity, "no NaN any more", bits);
      continue;
    }
    expect(again == bits, "not what it was", bits, again);
    expect(magnitude == infinity ? std::isinf(x) && (x < 0) == (bits > 0x7fff)
                                 : x == value_of<T>(bits) && std::signbit(x) == (bits > 0x7fff),
           "another value", bits, x);
    if (magnitude == infinity)
      continue;
    // The next one away from zero, and what is between: floats all, with more bits by far.
    const double low = value_of<T>(bits), high = value_of<T>(bits + 1);
    const float half = static_cast<float>((low + high) / 2);
    expect(half == (low + high) / 2, "no float", bits);
    const int even = bits + bits % 2;
    const auto rounds_to = [&](float x, int nearest) {
      const int found = rounded<T>(x).bits;
      expect(found == nearest, "not the nearest", bits, x, found);
    };
    rounds_to(half, even);
    rounds_to(std::nextafter(half, static_cast<float>(low)), bits);
    rounds_to(std::nextafter(half, std::copysign(std::numeric_limits<float>::infinity(), half)),
              bits + 1);
    for (const double part : {0.25, 0.75})
      rounds_to(static_cast<float>(low + part * (high - low)), bits + (part > 0.5));
  }
  // A NaN whose bits are all in what is cut off; and what is far beyond.
  for (const std::uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu})
    expect((rounded<T>(bits_as<float>(bits)).bits & 0x7fff) > infinity, "no NaN", bits);
  const float largest = std::numeric_limits<float>::max();
  expect(rounded<T>(largest).bits == infinity, "not infinite");
  expect(rounded<T>(-largest).bits == (infinity | 0x8000), "not infinite");
}

void half_types_round_to_the_nearest() {
  numbers_of_half_type<Bfloat16>(0x7f80);
  numbers_of_half_type<Float16>(0x7c00);
  for (int bits = 0; bits < 0x7c00; ++bits) {  // the first in the low half
    const int other = 0xfbff - bits;
    const auto of = [](int bits) { return to_float(Float16{static_cast<std::uint16_t>(bits)}); };
    const auto pair = rounded_pair(of(bits), of(other));
    expect(static_cast<int>(pair & 0xffff) == bits && static_cast<int>(pair >> 16) == other,
           "another pair", bits, pair);
  }
}

struct Check {
  const char* name;
  void (*run)();
};

#define CHECK(name) {#name, name}
constexpr Check CHECKS[] = {
    CHECK(pieces_lie_as_tma_puts_them),     CHECK(pieces_have_no_bank_twice),
    CHECK(numbers_have_their_places),       CHECK(numbers_have_no_bank_twice),
    CHECK(threads_share_all_pairs),         CHECK(threads_share_both_halves),
    CHECK(diagonals_have_all_pairs),        CHECK(parts_copy_a_strip),
    CHECK(programs_take_all_tiles),         CHECK(nobody_is_a_phase_ahead),
    CHECK(exponential_is_that_in_double),   CHECK(scores_are_those_in_double),
    CHECK(half_types_round_to_the_nearest),
};
#undef CHECK

}  // namespace
}  // namespace idml::cuda

int main(int count, char** arguments) {
  bool found = count < 2;
  for (const auto& check : idml::cuda::CHECKS) {
    if (count < 2) {
      std::cout << check.name << '\n';
    } else if (arguments[1] == std::string(check.name)) {
      found = true;
      check.run();
    }
  }
  return found ? 0 : 2;
}
