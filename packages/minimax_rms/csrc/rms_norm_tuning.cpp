// Which tuning a call gets: from sweeps on two H200s, over MiniMax-M2's rows on two ranks and, as
// wide as those of four, again on two.
//
// Few tokens are a matter of latency: large teams, that have a row's sum soon. The more tokens, the
// smaller the team: it spends less on each, and more rows fit the registers. As long as all rows do
// (16 warps with some 128 registers each on a multiprocessor), each team has one; past that, teams
// load their next row while they wait for their peers.
#include <algorithm>

#include "rms_norm.h"

namespace minimax_rms {

namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 8;
constexpr int kWarpsPerMultiprocessor = 16;

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
  if (tokens_per_multiprocessor <= 1) return smallest_team(row_vectors, 2);
  if (tokens_per_multiprocessor <= 2) return smallest_team(row_vectors, 7, 2);
  if (tokens_per_multiprocessor <= 4) return smallest_team(row_vectors, 7);
  if (tokens_per_multiprocessor <= kWarpsPerMultiprocessor) return smallest_team(row_vectors, 14);
  return smallest_team(row_vectors, 7);
}

}  // namespace

RmsNormTuning choose_tuning(int64_t row_vectors, int num_ranks, int64_t num_tokens,
                            int num_multiprocessors) {
  const auto divide_up = [](int64_t dividend, int64_t divisor) {
    return (dividend + divisor - 1) / divisor;
  };
  const int64_t tokens_per_multiprocessor = divide_up(num_tokens, num_multiprocessors);
  RmsNormTuning tuning;
  tuning.warps_per_token = choose_team(row_vectors, num_ranks, tokens_per_multiprocessor);
  // Teams of one warp share blocks, since blocks are numbered one by one.
  const int teams_per_block = tuning.warps_per_token > 1      ? 1
                              : tokens_per_multiprocessor > 8 ? 8
                                                              : 4;
  tuning.threads_per_block = teams_per_block * tuning.warps_per_token * kWarpSize;
  const int64_t teams =
      int64_t{num_multiprocessors} *
      std::max(1, (num_ranks == 1 ? 2 : 1) * kWarpsPerMultiprocessor / tuning.warps_per_token);
  tuning.num_blocks = static_cast<int>(divide_up(std::min(num_tokens, teams), teams_per_block));
  return tuning;
}

}  // namespace minimax_rms
