// A looped model's draft of one text: each token is the likeliest after those before it.
#pragma once

#include <algorithm>
#include <cmath>

#include "exits.h"

namespace {

// The likeliest of all, the best one first, and their log-probabilities.
void choose(const float* logits, int64_t count, int64_t candidates, int64_t* ids, float* log_q) {
  int64_t found = 0;
  for (int64_t id = 0; id < count; id++) {
    if (found == candidates && !(logits[id] > log_q[found - 1])) continue;
    int64_t at = found < candidates ? found++ : found - 1;
    for (; at > 0 && logits[id] > log_q[at - 1]; at--) log_q[at] = log_q[at - 1], ids[at] = ids[at - 1];
    log_q[at] = logits[id], ids[at] = id;
  }
  const float best = log_q[0];
  float rest = 0;
  Vector sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += exp(load(logits + i) - best);
  for (; i < count; i++) rest += std::exp(logits[i] - best);
  const float whole = std::log(sum(sums) + rest);
  for (int64_t at = 0; at < candidates; at++) log_q[at] = log_q[at] - best - whole;
}

// The LM head on one state, which is normed in place.
void read_out(const Shape& s, const Pass& p, const Draft& d) {
  const float factor = 1.0f / std::sqrt(sum_of_squares(p.x, s.hidden) + s.floor * s.floor);
  for (int64_t i = 0; i < s.hidden; i++) p.x[i] *= d.head_gain ? factor * d.head_gain[i] : factor;
  const auto times = [&](const auto* head) {
    linear_of(p.x, head, d.head_bias, nullptr, d.logits, 1, s.hidden, d.vocabulary, 0, p.threads);
  };
  if (d.narrow)
    times(static_cast<const uint16_t*>(d.head));
  else
    times(static_cast<const float*>(d.head));
}

// `pass` has room for as many tokens as may be drafted, of which the first is known; how many were drafted.
template <typename W>
int64_t draft_of(const Shape& shape, const Layer<W>* layers, Pass pass, const float* const* masks, float* const* taps,
                 Exits exits, const Draft& d) {
  const int64_t most = pass.tokens;
  int64_t token = d.first, depth, drafted = 0;
  double chance = 0;
  bool ends = false;
  pass.tokens = 1, exits.depth = &depth;
  while (drafted < most && !ends) {
    pass.seen = pass.past + 1, depth = 1;
    std::copy_n(d.embedding + token * shape.hidden, shape.hidden, pass.x);
    forward_with_exits_of(shape, layers, pass, masks, taps, exits);
    read_out(shape, pass, d);
    int64_t* const ids = d.ids + drafted * d.candidates;
    float* const log_q = d.log_q + drafted * d.candidates;
    choose(d.logits, d.vocabulary, d.candidates, ids, log_q);
    token = ids[0], chance += log_q[0], drafted++;
    ends = std::find(d.eos, d.eos + d.eos_count, token) != d.eos + d.eos_count || chance < d.least;
    pass.past++, pass.x += shape.hidden, pass.turns += shape.head_dim, exits.states += shape.hidden;
    if (pass.head_output) pass.head_output += shape.hidden;
  }
  return drafted;
}

}  // namespace
