// The layers of a pass.
#pragma once

#include "layer.h"

namespace {

// What is done at each layer beside it, by its number; null where nothing is. Of `masks` what is added to the scores,
// (B, T, slots); of `taps` where what the layer before it left goes, before its gate and scale; of `feeds` what the
// context is at the layer, null: what it was; of `masses` as in `attend`.
template <typename W>
void forward_of(const Shape& shape, const Layer<W>* layers, const Pass& pass, const float* const* masks,
                float* const* taps, const float* const* feeds, float* const* masses) {
  const Rows rows(pass);
#pragma omp parallel num_threads(pass.threads)
  {
    Worker worker(shape, pass);
    // all rows leave keys and values alone, and no queries
    const bool leaves = pass.context == worker.n;
    if (pass.known) worker.take(rows, pass.known, worker.n - pass.known);
    if (pass.first == 0 && taps[0]) worker.copy_to(taps[0]);
    for (int64_t index = pass.first; index < pass.last; index++) {
      const Layer<W>& layer = layers[index];
      if (pass.known && index == pass.known_to) worker.take(rows, 0, pass.tokens);
      if (index + 1 == pass.last) worker.live = pass.last_from;
      if (feeds[index]) {
        worker.feed(feeds[index]);
#pragma omp barrier
      }
      if (leaves)
        worker.leave(index, layer);
      else
        worker.run(index, layer, masks[index], index + 1 < shape.layers ? taps[index + 1] : nullptr, masses[index]);
    }
  }
}

}  // namespace
