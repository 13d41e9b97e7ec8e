// All layers of a Zero Token Transformer with early exit: a token leaves its cycles where a score of what a cycle has
// made of it reaches a threshold.
#pragma once

#include <algorithm>
#include <cmath>

#include "layer.h"

namespace {

// How the rows that run are scored in a cycle; every thread has its share of them.
struct Judge : ExitBuffers {
  const Exits& e;
  const Shape& s;

  Judge(const Shape& shape, const Pass& pass, const Exits& exits) : ExitBuffers(shape, pass), e(exits), s(shape) {}

  void begin(const Stream& stream) const {
    if (e.score == kLatent) return stream.copy_to(before);
    const Range mine = share(stream.n);
    std::fill(scores + mine.first, scores + mine.end, e.score == kLeast ? INFINITY : e.score == kMost ? -INFINITY : 0);
  }

  // Takes in the masses of a layer.
  void read(const Stream& stream) const {
    const Range mine = share(stream.n);
    for (int64_t row = mine.first; row < mine.end; row++)
      for (int64_t head = 0; head < s.heads; head++) {
        const float mass = masses[row * s.heads + head];
        float& score = scores[row];
        score = e.score == kMean ? score + mass : e.score == kMost ? std::max(score, mass) : std::min(score, mass);
      }
  }

  float score(const Stream& stream, int64_t row, bool has_masses) const {
    if (e.score == kLatent) return -moved(stream, row);
    if (!has_masses) return -INFINITY;
    return e.score == kMean ? scores[row] / (s.heads * (e.end_read - e.first_read)) : scores[row];
  }

  float moved(const Stream& stream, int64_t row) const {
    const float *const x = stream.x + row * s.hidden, *const from = before + row * s.hidden;
    float difference = 0;
    Vector squares{};
    int64_t i = 0;
    for (; i + kLanes <= s.hidden; i += kLanes) {
      const Vector by = load(x + i) - load(from + i);
      squares += by * by;
    }
    for (; i < s.hidden; i++) difference += (x[i] - from[i]) * (x[i] - from[i]);
    return std::sqrt(sum(squares) + difference) / std::max(std::sqrt(sum_of_squares(x, s.hidden)), 1e-12f);
  }

  // Which rows stop: padding, and those whose score reaches the threshold, if there is one.
  void judge(const Stream& stream, float threshold, bool has_masses, Rows& rows) const {
    const Range mine = share(stream.n);
    for (int64_t row = mine.first; row < mine.end; row++) {
      const bool settled = threshold == threshold && score(stream, row, has_masses) >= threshold;
      rows.stops[row] = settled || e.depth[stream.token(row)] == 0;
    }
  }
};

// One thread's walk through head, cycles and tail; `masks` and `taps` as in `forward_of`.
template <typename W>
struct Cycling {
  const Shape& s;
  const Pass& p;
  const Exits& e;
  const Layer<W>* layers;
  const float* const* masks;
  float* const* taps;
  // of all threads
  Rows& rows;
  Worker worker{s, p};
  const Judge judge{s, p, e};
  // the first layer behind the cycles
  const int64_t tail = e.head + e.cycles * e.shared;

  void run_all() {
    if (taps[0]) worker.copy_to(taps[0]);
    for (int64_t index = 0; index < e.head; index++) run(index, nullptr);
    for (int64_t cycle = 1; cycle <= e.cycles && rows.running; cycle++) {
      const float threshold = cycle < e.cycles ? e.thresholds[cycle - 1] : NAN;
      run_cycle(cycle, threshold);
      if (cycle == e.noted) worker.copy_to(e.states);
      if (cycle < e.cycles) part(cycle, threshold);
    }
    worker.take_all(rows, judge.before);
    for (int64_t index = tail; index < s.layers; index++) run(index, nullptr);
  }

 private:
  int64_t first_of(int64_t cycle) const { return e.head + (cycle - 1) * e.shared; }
  bool has_masses(int64_t cycle) const { return layers[first_of(cycle)].zero; }

  void run(int64_t index, float* masses) {
    if (index >= tail && index + 1 == s.layers) worker.live = p.last_from;
    worker.run(index, layers[index], masks[index], index + 1 < s.layers ? taps[index + 1] : nullptr, masses);
  }

  void run_cycle(int64_t cycle, float threshold) {
    const bool asks = threshold == threshold, reads = asks && has_masses(cycle);
    if (asks) judge.begin(worker);
    for (int64_t place = 0; place < e.shared; place++) {
      const bool read = reads && place >= e.first_read && place < e.end_read;
      run(first_of(cycle) + place, read ? judge.masses : nullptr);
      if (read) judge.read(worker);
    }
  }

  // Some stop behind a cycle, and leave keys and values in those that they skip.
  void part(int64_t cycle, float threshold) {
    judge.judge(worker, threshold, has_masses(cycle), rows);
#pragma omp barrier
#pragma omp single
    {
      rows.part(s, p, judge.before);
      for (int64_t row = 0; row < rows.running; row++) e.depth[rows.tokens[row]] = cycle + 1;
    }
    worker.take(rows, rows.running, rows.stopped);
    const int64_t first = first_of(cycle), next = first_of(cycle + 1);
    for (int64_t place = 0; rows.stopped && place < e.shared; place++) {
      if (!e.latest) worker.leave(next + place, layers[next + place]);
      worker.repeat((e.latest ? first : next) + place, e.shared, tail);
    }
    worker.take(rows, 0, rows.running);
  }
};

template <typename W>
void forward_with_exits_of(const Shape& shape, const Layer<W>* layers, const Pass& pass, const float* const* masks,
                           float* const* taps, const Exits& exits) {
  Rows rows(pass);
#pragma omp parallel num_threads(pass.threads)
  Cycling<W>{shape, pass, exits, layers, masks, taps, rows}.run_all();
}

}  // namespace
