// A decoder layer over the rows at work.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"

namespace {

// One thread's part in it.
struct Worker : Attention {
  // the stream times a gain, if there is one
  const float* normed = x;

  using Attention::Attention;

  // All of a layer. `tap` gets what it leaves, before its gate and scale, if not null; `masses` as in `attend`.
  template <typename W>
  void run(int64_t index, const Layer<W>& layer, const float* mask, float* tap, float* masses) {
    // texts may be in different cycles then, so that each has gates and scales of its own
    const bool apart = p.shifts, gated = apart ? s.gated : layer.cycle_gate != 1;
    if (index == s.head_layers && !apart) copy_to(fed);
    if (apart ? fed != nullptr : layer.injection != 0) {
      inject(layer);
#pragma omp barrier
    }
    if (gated) copy_to(buffers.earlier);
    make_keys(index, layer, 0);
    attend(index, layer, mask, masses);
#pragma omp barrier
    onto_stream(buffers.attended, width, layer.out, layer.out_bias);
#pragma omp barrier
    feed_forward(layer);
    if (tap) copy_to(tap);
    if (apart || gated || layer.scale != 1) {
      gate_and_scale(layer);
#pragma omp barrier
    }
  }

  // Keys and values of a layer, and nothing else of it.
  template <typename W>
  void leave(int64_t index, const Layer<W>& layer) {
    make_keys(index, layer, s.heads);
  }

 private:
  // What the head has made is added to the stream.
  template <typename W>
  void inject(const Layer<W>& layer) const {
    change([&](int64_t row, int64_t first, int64_t end) {
      const float factor = own(layer, sequence(row)).injection;
      if (factor != 0)
        for (int64_t i = first; i < end; i++) x[i] += factor * fed[i];
    });
  }

  // The stream between what it was before the layer and what it is, times a factor.
  template <typename W>
  void gate_and_scale(const Layer<W>& layer) const {
    const float* const earlier = buffers.earlier;
    change([&](int64_t row, int64_t first, int64_t end) {
      const Layer<W>& of_row = own(layer, sequence(row));
      const float gate = of_row.cycle_gate, factor = of_row.scale;
      if (gate != 1)
        for (int64_t i = first; i < end; i++) x[i] = earlier[i] + gate * (x[i] - earlier[i]);
      if (factor != 1)
        for (int64_t i = first; i < end; i++) x[i] *= factor;
    });
  }

  // Queries, keys and values, from one of their heads on; keys and values are in the cache then.
  template <typename W>
  void make_keys(int64_t index, const Layer<W>& layer, int64_t from) {
    norm(0, layer.before);
    project(layer, from);
#pragma omp barrier
    turn_and_keep(index, layer.qk_gain, from);
#pragma omp barrier
  }

  template <typename W>
  void feed_forward(const Layer<W>& layer) {
    float* const inner = buffers.inner;
    norm(live, layer.after);
    from_stream(live, layer.gate, layer.gate_bias, s.inner, s.inner,
                [&](int64_t i, auto value) { put(inner, i, silu(value)); });
    // the same thread has the same panels again
    from_stream(live, layer.up, layer.up_bias, s.inner, s.inner,
                [&](int64_t i, auto value) { put(inner, i, value * at(inner, i, value)); });
#pragma omp barrier
    onto_stream(inner, s.inner, layer.down, layer.down_bias);
#pragma omp barrier
  }

  // Every thread for itself: cheaper than waiting for each other.
  void norm(int64_t first, const float* gain) {
    float *const factors = buffers.factors, *const scaled = buffers.scaled;
    for (int64_t row = first; row < n; row++) {
      const float* const from = x + row * s.hidden;
      factors[row] = 1.0f / std::sqrt(sum_of_squares(from, s.hidden) + s.floor * s.floor);
      if (gain)
        for (int64_t i = 0; i < s.hidden; i++) scaled[row * s.hidden + i] = from[i] * gain[i];
    }
    normed = gain ? scaled : x;
  }

  // The normed stream from a row on by a weight, with its bias; `done(place in rows of this stride, value)`.
  template <typename W, typename Done>
  void from_stream(int64_t from, const W* w, const float* bias, int64_t outputs, int64_t stride, Done done) const {
    const auto finish = [&](int64_t row, int64_t first, int64_t count, const Vector* values) {
      const float factor = buffers.factors[from + row];
      each(values, count, [&](int64_t i, auto value) {
        value *= factor;
        if (bias) value += at(bias, first + i, value);
        done((from + row) * stride + first + i, value);
      });
    };
    product(normed + from * s.hidden, n - from, s.hidden, w, outputs, finish);
  }

  // The live rows of something by a weight, with its bias, added to the stream.
  template <typename W>
  void onto_stream(const float* from, int64_t k, const W* w, const float* bias) const {
    const int64_t outputs = s.hidden;
    const auto finish = [&](int64_t row, int64_t first, int64_t count, const Vector* values) {
      float* const to = x + (live + row) * outputs + first;
      each(values, count, [&](int64_t i, auto value) {
        if (bias) value += at(bias, first + i, value);
        put(to, i, value + at(to, i, value));
      });
    };
    product(from + live * k, n - live, k, w, outputs, finish);
  }

  // Queries, keys and values of the stream, from one of their heads on.
  template <typename W>
  void project(const Layer<W>& layer, int64_t from) const {
    const int64_t skipped = from * d;
    float* const qkv = buffers.qkv + skipped;
    from_stream(0, layer.qkv + skipped * s.hidden, layer.qkv_bias ? layer.qkv_bias + skipped : nullptr,
                qkv_width - skipped, qkv_width, [&](int64_t i, auto value) { put(qkv, i, value); });
  }

  // From one of the heads on: queries and keys are normed and turned, keys and values go to the cache.
  void turn_and_keep(int64_t index, const float* qk_gain, int64_t from) const {
    const int64_t count = qkv_heads - from;
    const Range heads = share(n * count);
    for (int64_t piece = heads.first; piece < heads.end; piece++) {
      const int64_t row = piece / count, head = from + piece % count;
      float* const made = buffers.qkv + row * qkv_width + head * d;
      float* to = made;
      if (head >= s.heads) to = kept(index, sequence(row), head - s.heads) + place(row) * d;
      if (head >= s.heads + s.kv_heads) {
        std::copy(made, made + d, to);
        continue;
      }
      if (qk_gain) {
        const float factor = 1.0f / std::sqrt(sum_of_squares(made, d) + s.head_floor * s.head_floor);
        for (int64_t i = 0; i < d; i++) made[i] *= factor * qk_gain[head * d + i];
      }
      const float* const turn = p.turns + token(row) * d;
      for (int64_t i = 0; i < d; i += 2) {
        const float real = made[i], imaginary = made[i + 1];
        to[i] = real * turn[i] - imaginary * turn[i + 1];
        to[i + 1] = real * turn[i + 1] + imaginary * turn[i];
      }
    }
  }
};

}  // namespace
