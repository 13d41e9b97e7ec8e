// The rows at work in a pass: their residual stream, whose they are, and where their keys and values lie.
#pragma once

#include <algorithm>

#include "product.h"
#include "rows.h"
#include "scratch.h"

namespace {

// As one thread has it. Between two barriers no thread reads what another one writes.
struct Stream {
  const Shape& s;
  const Pass& p;
  const int64_t d, group, slots, qkv_heads, qkv_width, width;
  const Buffers buffers;
  // The rows at work: how many, their stream, what the head made of them and their tokens (null: in order). Where each
  // text's begin (null: all of them are there, or there is one text), and the most of a text.
  int64_t n;
  float *x, *fed;
  const int64_t *tokens = nullptr, *starts = nullptr;
  int64_t longest;
  // the first row that goes through the whole layer
  int64_t live;

  Stream(const Shape& shape, const Pass& pass)
      : s(shape), p(pass), d(s.head_dim), group(s.heads / s.kv_heads), slots(p.seen),
        qkv_heads(s.heads + 2 * s.kv_heads), qkv_width(qkv_heads * d), width(s.heads * d), buffers(s, p),
        n(p.sequences * p.tokens), x(p.x), fed(p.head_output), longest(p.tokens), live(p.context) {}

  // Goes on with some of the rows. Of those that run the texts are known too.
  void take(const Rows& rows, int64_t first, int64_t count) {
    n = count;
    x = p.x + first * s.hidden;
    fed = p.head_output ? p.head_output + first * s.hidden : nullptr;
    tokens = rows.tokens.data() + first;
    starts = first == 0 ? rows.starts.data() : nullptr;
    longest = p.sequences == 1 ? n : 0;
    for (int64_t text = 0; p.sequences > 1 && text < p.sequences; text++)
      longest = std::max(longest, rows.starts[text + 1] - rows.starts[text]);
  }

  // Goes on with all rows, in order; `spare` (N, H) is for their states.
  void take_all(const Rows& rows, float* spare) {
    n = p.sequences * p.tokens, x = p.x, tokens = starts = nullptr, longest = p.tokens;
    fed = p.head_output;
    if (std::is_sorted(rows.tokens.begin(), rows.tokens.end())) return;
    copy_to(spare);
#pragma omp barrier
    const Range mine = share(n);
    for (int64_t row = mine.first; row < mine.end; row++)
      std::copy_n(spare + row * s.hidden, s.hidden, x + rows.tokens[row] * s.hidden);
#pragma omp barrier
  }

  // The number of a row's token in the pass, its slot, and its text.
  int64_t token(int64_t row) const { return tokens ? tokens[row] : row; }
  int64_t place(int64_t row) const { return p.places ? p.places[token(row)] : p.past + token(row) % p.tokens; }
  int64_t sequence(int64_t row) const { return token(row) / p.tokens; }

  // The rows of a text.
  Range rows_of(int64_t sequence) const {
    if (p.sequences == 1) return {0, n};
    if (starts) return {starts[sequence], starts[sequence + 1]};
    return {sequence * p.tokens, (sequence + 1) * p.tokens};
  }

  int64_t shift(int64_t sequence) const { return p.shifts ? p.shifts[sequence] : 0; }

  // The layer that a text runs where the pass is at `layer`: other weights it has not, but another cycle's numbers.
  template <typename W>
  const Layer<W>& own(const Layer<W>& layer, int64_t sequence) const {
    return (&layer)[shift(sequence)];
  }

  // Where the keys of a head (or, counted on from them, its values) of a layer begin.
  float* kept(int64_t layer, int64_t sequence, int64_t head) const {
    const int64_t text = p.text_of ? p.text_of[sequence] : sequence;
    return p.kv + (((layer + shift(sequence)) * p.texts + text) * 2 * s.kv_heads + head) * p.capacity * d;
  }

  // Keys and values that the rows have in a layer become theirs in every so many-th one after it, up to an end.
  void repeat(int64_t index, int64_t step, int64_t end) const {
    const int64_t heads = 2 * s.kv_heads;
    const Range mine = share(n * heads);
    for (int64_t piece = mine.first; piece < mine.end; piece++) {
      const int64_t row = piece / heads, head = piece % heads, text = sequence(row), at = place(row) * d;
      const float* const from = kept(index, text, head) + at;
      for (int64_t to = index + step; to < end; to += step) std::copy_n(from, d, kept(to, text, head) + at);
    }
  }

  // This thread's part of the stream, elsewhere.
  void copy_to(float* to) const {
    const Range mine = share(n * s.hidden);
    std::copy(x + mine.first, x + mine.end, to + mine.first);
  }

  // This thread's part of the stream, the same as in `copy_to`: `change(row, first, end)` has numbers of one row.
  template <typename Change>
  void change(Change change) const {
    const Range mine = share(n * s.hidden);
    for (int64_t at = mine.first, end; at < mine.end; at = end) {
      const int64_t row = at / s.hidden;
      end = std::min(mine.end, (row + 1) * s.hidden);
      change(row, at, end);
    }
  }

  // The context becomes what it is in front of a layer.
  void feed(const float* from) const {
    const Range mine = share(p.context);
    for (int64_t row = mine.first; row < mine.end; row++)
      std::copy_n(from + row * p.feed_step, s.hidden, x + row * s.hidden);
  }
};

}  // namespace
