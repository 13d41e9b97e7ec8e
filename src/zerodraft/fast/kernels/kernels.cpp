// The lean decode path's inner loops: matrix products on few rows, and all decoder layers of a pass in one call. One
// team of threads walks through all layers with barriers in between; nothing is allocated but, with early exit, the
// list of who still runs. Here are the functions that `compiled.py` calls.
//
// To be read in this order:
//   vectors.h     vectors of floats
//   product.h     matrix products on few rows
//   structures.h  what Python hands over: layers, a pass, exits
//   scratch.h     the buffers of a pass
//   rows.h        who still runs
//   stream.h      the rows at work: their stream, and where their keys and values lie
//   attention.h   attention over what is cached
//   layer.h       a decoder layer
//   forward.h     the layers of a pass
//   exits.h       all layers with early exit
//   draft.h       tokens that a looped model drafts for itself
//
// Legend: N rows of a pass (B sequences of T tokens), K inputs of a product, H hidden size, D head size, S slots of the
// cache. Heads lie as in lean/layer.py: a rotary pair is two neighbouring elements, and norms' gains are in the weights
// if these need not stay what they are, so that a norm is one factor a row.

#include "draft.h"
#include "exits.h"
#include "forward.h"
#include "product.h"

extern "C" {

// With early exit or without.
int64_t scratch_floats(const Shape* shape, const Pass* pass, int64_t exits) {
  return buffer_floats(*shape, *pass) + exits * pass->sequences * pass->tokens * exit_floats(*shape);
}

// `linear_of` for weights of either type.
void linear(const float* x, const void* w, int64_t narrow, const float* bias, const float* other, float* out, int64_t n,
            int64_t k, int64_t outputs, int64_t after, int64_t threads) {
  if (narrow)
    linear_of(x, static_cast<const uint16_t*>(w), bias, other, out, n, k, outputs, after, threads);
  else
    linear_of(x, static_cast<const float*>(w), bias, other, out, n, k, outputs, after, threads);
}

// `forward_with_exits_of` for weights of either type.
void forward_with_exits(const Shape* shape, const void* layers, const Pass* pass, const float* const* masks,
                        float* const* taps, const Exits* exits) {
  if (shape->narrow)
    forward_with_exits_of(*shape, static_cast<const Layer<uint16_t>*>(layers), *pass, masks, taps, *exits);
  else
    forward_with_exits_of(*shape, static_cast<const Layer<float>*>(layers), *pass, masks, taps, *exits);
}

// `draft_of` for weights of either type.
int64_t draft(const Shape* shape, const void* layers, const Pass* pass, const float* const* masks, float* const* taps,
              const Exits* exits, const Draft* own) {
  if (shape->narrow)
    return draft_of(*shape, static_cast<const Layer<uint16_t>*>(layers), *pass, masks, taps, *exits, *own);
  return draft_of(*shape, static_cast<const Layer<float>*>(layers), *pass, masks, taps, *exits, *own);
}

// `forward_of` for weights of either type.
void forward(const Shape* shape, const void* layers, const Pass* pass, const float* const* masks, float* const* taps,
             const float* const* feeds, float* const* masses) {
  if (shape->narrow)
    forward_of(*shape, static_cast<const Layer<uint16_t>*>(layers), *pass, masks, taps, feeds, masses);
  else
    forward_of(*shape, static_cast<const Layer<float>*>(layers), *pass, masks, taps, feeds, masses);
}

// The number of floats that vectors of this build hold.
int64_t lanes() { return kLanes; }

}  // extern "C"
