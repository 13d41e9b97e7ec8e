// Matrix products on few rows.
//
// Decoding reads every weight once a pass, so a product is as fast as memory if nothing else gets in its way. Weights
// are kept in panels of 16 outputs, [panel][input][16]: a panel is one stream for the prefetcher, and one vector of it
// serves all rows of the pass before the next one is read. Each thread has a share of the panels.
//
// Weights are float32, or bfloat16 where they are exactly that or may be a little wrong (drafters); sums are float32.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// Products that are added up in one go.
constexpr int64_t kRun = 128;

typedef Vector Sums[kRows][kPanels][kVectors];

// sums[m][p] = sum over k of a[m * a_row + k * a_step] * w[p * w_panel + k * w_step + (0 .. 15)]
template <int M, int P, typename W>
__attribute__((noinline)) void tile(const float* a, int64_t a_row, int64_t a_step, const W* w, int64_t w_panel,
                                    int64_t w_step, int64_t k_count, Sums& sums) {
  // Sums of sums: the rounding error of one long sum grows with its length.
  for (int64_t begin = 0; begin < k_count; begin += kRun) {
    Vector s[M][P][kVectors] = {};
    for (int64_t k = begin; k < std::min(begin + kRun, k_count); k++) {
      Vector row[P][kVectors];
      for (int p = 0; p < P; p++) __builtin_prefetch(w + p * w_panel + (k + kAhead) * w_step, 0, 2);
      for (int p = 0; p < P; p++)
        for (int v = 0; v < kVectors; v++) row[p][v] = load(w + p * w_panel + k * w_step + v * kLanes);
      for (int m = 0; m < M; m++) {
        const float factor = a[m * a_row + k * a_step];
        for (int p = 0; p < P; p++)
          for (int v = 0; v < kVectors; v++) s[m][p][v] += factor * row[p][v];
      }
    }
    for (int m = 0; m < M; m++)
      for (int p = 0; p < P; p++)
        for (int v = 0; v < kVectors; v++) sums[m][p][v] = begin ? sums[m][p][v] + s[m][p][v] : s[m][p][v];
  }
}

// A tile of `rows` rows, at most M, and `panels` panels, at most P.
template <int P, int M = std::min(kRows, kSums / P), typename W>
inline void tile_of(int rows, int panels, const float* a, int64_t a_row, int64_t a_step, const W* w, int64_t w_panel,
                    int64_t w_step, int64_t k_count, Sums& sums) {
  if (P > 1 && panels < P)
    tile_of<std::max(P - 1, 1)>(rows, panels, a, a_row, a_step, w, w_panel, w_step, k_count, sums);
  else if (rows == M)
    tile<M, P>(a, a_row, a_step, w, w_panel, w_step, k_count, sums);
  else if constexpr (M > 1)
    tile_of<P, M - 1>(rows, panels, a, a_row, a_step, w, w_panel, w_step, k_count, sums);
}

struct Range {
  int64_t first, end;
};

// This thread's share of `count` pieces.
inline Range share(int64_t count) {
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Rows of one tile after another of nearly the same size.
inline int tile_rows(int64_t rows) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  return static_cast<int>((rows + tiles - 1) / tiles);
}

// Weights as floats. For many rows that is cheaper once than in every tile.
inline const float* widened(const uint16_t* w, int64_t count) {
  thread_local std::vector<float> floats;
  if (static_cast<int64_t>(floats.size()) < count) floats.resize(count);
  for (int64_t i = 0; i < count; i += kLanes) store(floats.data() + i, load(w + i));
  return floats.data();
}
inline const float* widened(const float* w, int64_t) { return w; }

// x (N, K) by this thread's share of w's panels. `done(row, first output, how many, sums of the panel)` takes each
// piece.
template <typename W, typename Done>
inline void product(const float* x, int64_t n, int64_t k, const W* w, int64_t outputs, Done done) {
  const Range mine = share((outputs + kPanel - 1) / kPanel);
  const int step = tile_rows(n);
  Sums sums;
  for (int64_t panel = mine.first; panel < mine.end;) {
    const int panels = std::min<int64_t>(std::min(kPanels, kSums / step), mine.end - panel);
    const auto rows_by = [&](const auto* weights) {
      for (int64_t row = 0; row < n; row += step) {
        const int rows = static_cast<int>(std::min<int64_t>(step, n - row));
        tile_of<kPanels>(rows, panels, x + row * k, k, 1, weights, k * kPanel, kPanel, k, sums);
        for (int m = 0; m < rows; m++)
          for (int p = 0; p < panels; p++) {
            const int64_t output = (panel + p) * kPanel;
            done(row + m, output, std::min<int64_t>(kPanel, outputs - output), sums[m][p]);
          }
      }
    };
    const W* const weights = w + panel * k * kPanel;
    if (n > 2 * kRows)
      rows_by(widened(weights, panels * k * kPanel));
    else
      rows_by(weights);
    panel += panels;
  }
}

// Hands `done(place, value)` each of `count` values of a piece, as vectors where all 16 are there.
template <typename Done>
inline void each(const Vector* values, int64_t count, Done done) {
  if (count == kPanel) {
    for (int v = 0; v < kVectors; v++) done(v * kLanes, values[v]);
  } else {
    for (int64_t i = 0; i < count; i++) done(i, values[i / kLanes][i % kLanes]);
  }
}

// out (N, outputs) = x @ w.T + bias, then nothing (0), silu (1), + other (2) or * other (3).
template <typename W>
void linear_of(const float* x, const W* w, const float* bias, const float* other, float* out, int64_t n, int64_t k,
               int64_t outputs, int64_t after, int64_t threads) {
#pragma omp parallel num_threads(threads)
  product(x, n, k, w, outputs, [&](int64_t row, int64_t first, int64_t count, const Vector* values) {
    const int64_t start = row * outputs + first;
    each(values, count, [&](int64_t i, auto value) {
      if (bias) value += at(bias, first + i, value);
      if (after == 1) value = silu(value);
      if (after == 2) value += at(other, start + i, value);
      if (after == 3) value *= at(other, start + i, value);
      put(out, start + i, value);
    });
  });
}

}  // namespace
