// What Python hands over: `compiled.py` has the same structures, field by field.
#pragma once

#include <cstdint>

namespace {

// What a layer is made of; products in panels, their weights of type W. Null where there is none.
template <typename W>
struct Layer {
  const W* qkv;
  const float* qkv_bias;
  const W* out;
  const float* out_bias;
  const W* gate;
  const float* gate_bias;
  const W* up;
  const float* up_bias;
  const W* down;
  const float* down_bias;
  const float* qk_gain;
  // gains of the norms before qkv and before gate and up, where they are not in the weights
  const float *before, *after;
  // What a run of a layer has in a Zero Token Transformer: the zero token's key, (kv heads, D); whether it turns with
  // each query; the gate on what the layer adds; how much of the head's output is added before it; what the stream is
  // multiplied by after it.
  const float* zero;
  int64_t zero_turns;
  float cycle_gate, injection, scale;
};

struct Shape {
  int64_t layers, hidden, inner, heads, kv_heads, head_dim;
  // Weights are bfloat16.
  int64_t narrow;
  // Layers whose output is the head's, if later ones are fed with it, else -1; whether layers have gates.
  int64_t head_layers, gated;
  float floor, head_floor, scale;
};

// One pass, or a stage of one: the layers from `first` to before `last`.
struct Pass {
  int64_t first, last;
  int64_t sequences, tokens, past, capacity, threads;
  // Slots that tokens may see, and sequences that the cache has.
  int64_t seen, texts;
  // No mask is given and each token sees what is before it.
  int64_t causal;
  // The first slot where a mask may differ from 0.
  int64_t masked_from;
  // The first tokens of a single sequence (or all of all) may do no more than leave keys and values. A drafter's
  // context is read anew in front of each layer, at this distance from each other.
  int64_t context, feed_step;
  // From this row on the last layer is computed whole: of a prompt only the last state is wanted.
  int64_t last_from;
  // The first rows of a single sequence (if any) have been through the layers before this one: the others catch up.
  int64_t known, known_to;
  float* x;               // (N, H): in, out
  float* head_output;     // (N, H): written behind the head, read by later stages; null if no layer is fed with it
  const float* turns;     // (N, D / 2, 2): cosine and sine
  float* kv;              // (layers, texts, keys' then values' heads, capacity, D)
  const int64_t* places;  // (N): slots of the tokens; null: from `past` on
  const int64_t* text_of; // (B): the texts in the cache; null: all, in order
  const int64_t* shifts;  // (B): how many layers further on than the pass's each text is, in one of its cycles that
                          // have the same weights; null: none. What the head has made is known then.
  float* scratch;         // scratch_floats(...)
};

// When tokens leave the cycles of a Zero Token Transformer: where their score reaches the cycle's threshold.
struct Exits {
  // Layers of the head and of a cycle, and how many cycles there are.
  int64_t head, shared, cycles;
  // What the score is (`Score`), and which of a cycle's layers have the masses that it is made of.
  int64_t score, first_read, end_read;
  // In the cycles that it skips a token has the keys and values of its last cycle, not those of its last state.
  int64_t latest;
  // After which cycle the states are noted, if not 0: one that all rows run.
  int64_t noted;
  const float* thresholds;  // (cycles - 1); NaN: nobody leaves
  int64_t* depth;           // (N): in: 0 for padding, which leaves after the first cycle, else 1; out: cycles
  float* states;            // (N, H): those that are noted
};

// Minus how far the state moved, as a share of its length; or the mass on the zero token by layer and head, minus
// infinity where there is none.
enum Score { kLatent, kMean, kMost, kLeast };

// What drafts greedily beside the layers; the head's weights in panels.
struct Draft {
  // The known token, the LM head's outputs, whether its weights are bfloat16, and how many candidates a position has.
  int64_t first, vocabulary, narrow, candidates;
  // A draft ends behind one of these tokens, or where the logarithm of the chance that all of it is right is below this.
  int64_t eos_count;
  double least;
  const int64_t* eos;
  const float* embedding;  // (V, H)
  const void* head;
  const float *head_bias, *head_gain;
  float* logits;  // (V): of the last token
  int64_t* ids;   // (positions, candidates)
  float* log_q;   // (positions, candidates)
};

}  // namespace
