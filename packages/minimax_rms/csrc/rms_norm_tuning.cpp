// Which tuning a call gets: from sweeps over MiniMax-M2's rows, on two H100s those of two ranks and
// those of four, and on four H200s (benchmarks/tune.py, results/tuning*.json).
//
// Few tokens are a matter of latency: large teams, that have a row's sum soon. The more tokens, the
// smaller the team: it spends less on each, and more rows fit the registers (16 warps with some 128
// registers each on a multiprocessor). With more tokens than teams, these load their next row while
// they wait for their peers.
//
// With many more, teams have as many turns as each other, rather than some one more. From six turns
// on there are more blocks than find room at a time, for rows that fill a team's registers, as
// MiniMax-M2's do: those that begin late even out what others lose by waiting for their peers. Rows
// of other widths lost by it (those that fill teams of 4 and 8 warps were not tried), and ranks
// that share a GPU must find room there all at once.
//
// Small teams share blocks, since each block takes a number when it begins and counts itself when
// it ends, one by one; but so few that there is a block for every third multiprocessor.
#include <algorithm>

#include "rms_norm.h"

namespace minimax_rms {

namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 8;
constexpr int kWarpsPerMultiprocessor = 16;

int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

// The smallest team, of at least `least` warps, whose threads hold no more than `max_vectors` of a
// row each. The largest team takes rows of any width.
int smallest_team(int64_t row_vectors, int max_vectors, int least = 1) {
  int warps = least;
  while (warps < kMaxWarps &&
         row_vectors > int64_t{std::min(max_vectors, max_vectors_of(warps))} * warps * kWarpSize) {
    warps *= 2;
  }
  return warps;
}

int choose_team(int64_t row_vectors, int num_ranks, int64_t tokens_per_multiprocessor) {
  if (num_ranks == 1) return smallest_team(row_vectors, 7, 4);
  return smallest_team(row_vectors, tokens_per_multiprocessor <= 1 ? 2 : 7);
}

// How many teams take the tokens of a call, `most` of them at a time.
int64_t choose_teams(int64_t row_vectors, int warps, int num_ranks, int64_t num_tokens,
                     int64_t most, bool shares_gpu) {
  constexpr int64_t kMaxTurns = 5;
  constexpr int64_t kMaxWaves = 1000;  // else there are more blocks than a grid can have
  if (num_ranks == 1 || num_tokens <= 3 * most) return std::min(num_tokens, most);
  const bool is_full = row_vectors == int64_t{max_vectors_of(warps)} * warps * kWarpSize;
  const int64_t waves =
      is_full && !shares_gpu ? std::min(divide_up(num_tokens, kMaxTurns * most), kMaxWaves) : 1;
  return divide_up(num_tokens, divide_up(num_tokens, waves * most));
}

int choose_teams_per_block(int warps, int64_t teams, int num_multiprocessors) {
  const int64_t per_multiprocessor = divide_up(teams, num_multiprocessors);
  int most = max_threads_of(warps) / (warps * kWarpSize);
  if (warps == 1) most = per_multiprocessor <= 4 ? 2 : per_multiprocessor <= 8 ? 4 : 8;
  if (warps == 2 && per_multiprocessor <= 2) most = 1;
  while (most > 1 && 3 * divide_up(teams, most) < num_multiprocessors) most /= 2;
  return most;
}

}  // namespace

RmsNormTuning choose_tuning(int64_t row_vectors, int num_ranks, int64_t num_tokens,
                            int num_multiprocessors, bool shares_gpu) {
  const int64_t tokens_per_multiprocessor = divide_up(num_tokens, num_multiprocessors);
  const int warps = choose_team(row_vectors, num_ranks, tokens_per_multiprocessor);
  const int64_t most_teams =
      int64_t{num_multiprocessors} *
      std::max(1, (num_ranks == 1 ? 2 : 1) * kWarpsPerMultiprocessor / warps);
  const int64_t teams =
      choose_teams(row_vectors, warps, num_ranks, num_tokens, most_teams, shares_gpu);
  const int per_block = choose_teams_per_block(warps, teams, num_multiprocessors);
  RmsNormTuning tuning;
  tuning.warps_per_token = warps;
  tuning.threads_per_block = per_block * warps * kWarpSize;
  tuning.num_blocks = static_cast<int>(divide_up(teams, per_block));
  return tuning;
}

}  // namespace minimax_rms
