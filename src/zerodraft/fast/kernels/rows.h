// Who still runs: with early exit not all rows of a pass do all the time.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "structures.h"

namespace {

// The rows of a pass and whose they are. With early exit those that still run are in front, text by text and in order;
// behind them come those that have just stopped, then those that stopped before.
struct Rows {
  std::vector<int64_t> tokens;  // (N): of each row
  std::vector<int64_t> starts;  // (B + 1): where the rows of each text that run begin
  std::vector<char> stops;      // (N): whether a row that runs is about to stop
  int64_t running, stopped = 0;

  explicit Rows(const Pass& p)
      : tokens(p.sequences * p.tokens), stops(tokens.size()), running(p.sequences * p.tokens) {
    std::iota(tokens.begin(), tokens.end(), 0);
    find_texts(p);
  }

  void find_texts(const Pass& p) {
    starts.assign(p.sequences + 1, 0);
    for (int64_t row = 0; row < running; row++) starts[tokens[row] / p.tokens + 1]++;
    for (int64_t text = 0; text < p.sequences; text++) starts[text + 1] += starts[text];
  }

  // Those that stop go behind those that run on, with their states; `spare` (N, H) is for these.
  void part(const Shape& s, const Pass& p, float* spare) {
    std::vector<int64_t> leaving;
    const int64_t width = s.hidden;
    int64_t staying = 0;
    for (int64_t row = 0; row < running; row++) {
      const float* const x = p.x + row * width;
      if (stops[row]) {
        std::copy_n(x, width, spare + leaving.size() * width);
        leaving.push_back(tokens[row]);
      } else if (const int64_t to = staying++; to != row) {
        tokens[to] = tokens[row];
        std::copy_n(x, width, p.x + to * width);
        if (p.head_output) std::copy_n(p.head_output + row * width, width, p.head_output + to * width);
      }
    }
    running = staying;
    stopped = leaving.size();
    std::copy(leaving.begin(), leaving.end(), tokens.begin() + staying);
    std::copy_n(spare, stopped * width, p.x + staying * width);
    find_texts(p);
  }
};

}  // namespace
