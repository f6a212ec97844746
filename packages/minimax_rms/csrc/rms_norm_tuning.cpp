// Which tuning a call gets: from sweeps on two H200s, over MiniMax-M2's rows on two ranks and, as
// wide as those of four, again on two.
//
// Few tokens are a matter of latency: large teams, that have a row's sum soon. The more tokens, the
// smaller the team: it spends less on each, and more rows fit the registers (16 warps with some 128
// registers each on a multiprocessor). With more tokens than teams, these load their next row while
// they wait for their peers.
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

int choose_teams_per_block(int warps, int64_t teams, int num_multiprocessors) {
  int most = max_threads_of(warps) / (warps * kWarpSize);
  if (warps == 1) most = teams <= 4 * int64_t{num_multiprocessors} ? 4 : 8;
  while (most > 1 && 3 * divide_up(teams, most) < num_multiprocessors) most /= 2;
  return most;
}

}  // namespace

RmsNormTuning choose_tuning(int64_t row_vectors, int num_ranks, int64_t num_tokens,
                            int num_multiprocessors) {
  const int64_t tokens_per_multiprocessor = divide_up(num_tokens, num_multiprocessors);
  const int warps = choose_team(row_vectors, num_ranks, tokens_per_multiprocessor);
  const int64_t most_teams =
      int64_t{num_multiprocessors} *
      std::max(1, (num_ranks == 1 ? 2 : 1) * kWarpsPerMultiprocessor / warps);
  const int64_t teams = std::min(num_tokens, most_teams);
  const int per_block = choose_teams_per_block(warps, teams, num_multiprocessors);
  RmsNormTuning tuning;
  tuning.warps_per_token = warps;
  tuning.threads_per_block = per_block * warps * kWarpSize;
  tuning.num_blocks = static_cast<int>(divide_up(teams, per_block));
  return tuning;
}

}  // namespace minimax_rms
