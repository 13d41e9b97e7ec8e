// The lean decode path's inner loops: matrix products on few rows, and all decoder layers of a pass in one call.
//
// Decoding reads every weight once a pass, so a product is as fast as memory if nothing else gets in its way. Weights
// are kept in panels of 16 outputs, [panel][input][16]: a panel is one stream for the prefetcher, and one vector of it
// serves all rows of the pass before the next one is read. One team of threads walks through all layers with barriers
// in between; nothing is allocated but, with early exit, the list of who still runs.
//
// Weights are float32, or bfloat16 where they are exactly that or may be a little wrong (drafters); sums are float32.
//
// Legend: N rows of a pass (B sequences of T tokens), K inputs of a product, H hidden size, D head size, S slots of the
// cache. Heads lie as in lean/layer.py: a rotary pair is two neighbouring elements, and norms' gains are in the
// weights if these need not stay what they are, so that a norm is one factor a row.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <omp.h>
#include <vector>

namespace {

// The most rows and panels of a tile, and rows times panels, as there are so many registers for sums: the fewer the
// rows, the more panels are read at once. How many vectors ahead to ask for weights: else too few loads are under way
// to keep the memory busy, and each page begins with a wait.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12, kPanels = 4, kSums = 24, kAhead = 48;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kPanels = 1, kSums = 6, kAhead = 32;
#else
constexpr int kLanes = 4, kRows = 4, kPanels = 1, kSums = 4, kAhead = 32;
#endif
constexpr int kPanel = 16, kVectors = kPanel / kLanes;
// Products that are added up in one go.
constexpr int64_t kRun = 128;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
// bfloat16: a float's upper half
inline Vector load(const uint16_t* p) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Ints) << 16);
}

// Relative error below 3e-7; 0 below -87 (minus infinity included), infinity from where floats end, NaN for NaN. Taylor's
// series around the nearest multiple of ln 2.
inline Vector exp(Vector x) {
  const Ints tiny = x < -87.0f, huge = x > 88.72283f, fits = (x >= -87.0f) & ~huge;
  const Vector beyond = tiny ? Vector{} : huge ? Vector{} + INFINITY : x;  // NaN is none of the three
  x = fits ? x : Vector{};
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest integer
  const Vector n = shifted - 12582912.0f;
  const Vector r = (x - n * 0.693145751953125f) - n * 1.42860682e-6f;
  Vector p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints scaled = (Ints)p + ((Ints)shifted << 23);
  return fits ? (Vector)scaled : beyond;
}

inline float sum(Vector v) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}

inline float sum_of_squares(const float* x, int n) {
  Vector squares{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vector v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < n; i++) total += x[i] * x[i];
  return total;
}

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

// x (N, K) by this thread's share of w's panels; `done(row, first output, how many, sums of the panel)` takes each piece.
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

inline Vector at(const float* p, int64_t i, Vector) { return load(p + i); }
inline float at(const float* p, int64_t i, float) { return p[i]; }
inline void put(float* p, int64_t i, Vector v) { store(p + i, v); }
inline void put(float* p, int64_t i, float v) { p[i] = v; }
inline Vector silu(Vector x) { return x / (1.0f + exp(-x)); }
inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

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
  // The first tokens of a single sequence (or all of all) may do no more than leave keys and values. A drafter's context
  // is read anew in front of each layer, at this distance from each other.
  int64_t context, feed_step;
  // From this row on the last layer is computed whole: of a prompt only the last state is wanted.
  int64_t last_from;
  float* x;               // (N, H): in, out
  float* head_output;     // (N, H): written behind the head, read by later stages; null if no layer is fed with it
  const float* turns;     // (N, D / 2, 2): cosine and sine
  float* kv;              // (layers, texts, keys' then values' heads, capacity, D)
  const int64_t* places;  // (N): slots of the tokens; null: from `past` on
  const int64_t* text_of; // (B): the texts in the cache; null: all, in order
  const int64_t* shifts;  // (B): how many layers further on than the pass's each text is, in one of its cycles that have
                          // the same weights; null: none. What the head has made is known then.
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
  const float* thresholds;  // (cycles - 1); NaN: nobody leaves
  int64_t* depth;           // (N): in: 0 for padding, which leaves after the first cycle, else 1; out: cycles
};

// Minus how far the state moved, as a share of its length; or the mass on the zero token by layer and head, minus
// infinity where there is none.
enum Score { kLatent, kMean, kMost, kLeast };

int64_t row_floats(const Shape* shape) {
  const Shape& s = *shape;
  return (s.heads + 2 * s.kv_heads + s.heads) * s.head_dim + s.inner + s.gated * s.hidden;
}

// Of early exit: the states in front of the cycle, the masses of a layer, and the scores.
int64_t exit_floats(const Shape* shape) { return shape->hidden + shape->heads + 1; }

int64_t thread_floats(const Shape* shape, const Pass* pass) {
  const int64_t rows = pass->sequences * pass->tokens;
  return (rows + kPanel - 1) / kPanel * kPanel + kPanel * (shape->head_dim + pass->seen) + rows * shape->hidden;
}

int64_t all_floats(const Shape* shape, const Pass* pass) {
  return pass->sequences * pass->tokens * row_floats(shape) + pass->threads * thread_floats(shape, pass);
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

// One thread's part in a pass: its buffers, and what it does in each layer. Between two barriers no thread reads what
// another one writes.
template <typename W>
struct Worker {
  const Shape& s;
  const Pass& p;
  const int64_t d, group, slots, qkv_heads, qkv_width, width;
  // The rows at work: how many, their stream and their tokens (null: in order). Where each text's begin (null: all of it
  // are there), and the most of a text.
  int64_t n;
  float* x;
  const int64_t *tokens = nullptr, *starts = nullptr;
  int64_t longest;
  // of all threads
  float *const qkv, *const attended, *const inner, *const earlier;
  // its own: a factor a row, (D, 16), (S, 16), (N, H)
  float *const factors, *const queries, *const scores, *const scaled;
  // the first row that goes through the whole layer
  int64_t live;
  // the stream times a gain, if there is one
  const float* stream;
  Sums sums;

  Worker(const Shape* shape, const Pass* pass)
      : s(*shape), p(*pass), d(s.head_dim), group(s.heads / s.kv_heads), slots(p.seen),
        qkv_heads(s.heads + 2 * s.kv_heads), qkv_width(qkv_heads * d), width(s.heads * d),
        n(p.sequences * p.tokens), x(p.x), longest(p.tokens),
        qkv(p.scratch), attended(qkv + n * qkv_width), inner(attended + n * width), earlier(inner + n * s.inner),
        factors(p.scratch + n * row_floats(shape) + omp_get_thread_num() * thread_floats(shape, pass)),
        queries(factors + (n + kPanel - 1) / kPanel * kPanel), scores(queries + kPanel * d),
        scaled(scores + kPanel * slots), live(p.context), stream(p.x) {}

  // Goes on with some of the rows. Of those that run the texts are known too.
  void take(const Rows& rows, int64_t first, int64_t count) {
    n = count;
    x = p.x + first * s.hidden;
    tokens = rows.tokens.data() + first;
    starts = first == 0 ? rows.starts.data() : nullptr;
    longest = 0;
    for (int64_t text = 0; text < p.sequences; text++)
      longest = std::max(longest, rows.starts[text + 1] - rows.starts[text]);
  }

  // Where the keys of a head (or, counted on from them, its values) of a layer begin.
  float* kept(int64_t layer, int64_t sequence, int64_t head) const {
    const int64_t text = p.text_of ? p.text_of[sequence] : sequence;
    return p.kv + (((layer + shift(sequence)) * p.texts + text) * 2 * s.kv_heads + head) * p.capacity * d;
  }

  int64_t shift(int64_t sequence) const { return p.shifts ? p.shifts[sequence] : 0; }

  // The layer that a text runs where the pass is at `layer`: other weights it has not, but another cycle's numbers.
  const Layer<W>& own(const Layer<W>& layer, int64_t sequence) const { return (&layer)[shift(sequence)]; }

  // Goes on with all rows, in order; `spare` (N, H) is for their states.
  void take_all(const Rows& rows, float* spare) {
    n = p.sequences * p.tokens, x = p.x, tokens = starts = nullptr, longest = p.tokens;
    if (std::is_sorted(rows.tokens.begin(), rows.tokens.end())) return;
    copy_stream(spare);
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
    if (starts) return {starts[sequence], starts[sequence + 1]};
    return {sequence * p.tokens, (sequence + 1) * p.tokens};
  }

  // This thread's part of the stream, elsewhere.
  void copy_stream(float* to) const {
    const Range mine = share(n * s.hidden);
    std::copy(x + mine.first, x + mine.end, to + mine.first);
  }

  // This thread's part of the stream, the same as in `copy_stream`: `change(row, first, end)` has numbers of one row.
  template <typename Change>
  void change_stream(Change change) const {
    const Range mine = share(n * s.hidden);
    for (int64_t at = mine.first, end; at < mine.end; at = end) {
      const int64_t row = at / s.hidden;
      end = std::min(mine.end, (row + 1) * s.hidden);
      change(row, at, end);
    }
  }

  void inject(const Layer<W>& layer) const {
    change_stream([&](int64_t row, int64_t first, int64_t end) {
      const float factor = own(layer, sequence(row)).injection;
      if (factor != 0)
        for (int64_t i = first; i < end; i++) x[i] += factor * p.head_output[i];
    });
  }

  // The stream between what it was before the layer and what it is, times a factor.
  void gate_and_scale(const Layer<W>& layer) const {
    change_stream([&](int64_t row, int64_t first, int64_t end) {
      const Layer<W>& of_row = own(layer, sequence(row));
      const float gate = of_row.cycle_gate, factor = of_row.scale;
      if (gate != 1)
        for (int64_t i = first; i < end; i++) x[i] = earlier[i] + gate * (x[i] - earlier[i]);
      if (factor != 1)
        for (int64_t i = first; i < end; i++) x[i] *= factor;
    });
  }

  void feed(const float* from) const {
    const Range mine = share(p.context);
    for (int64_t row = mine.first; row < mine.end; row++)
      std::copy_n(from + row * p.feed_step, s.hidden, x + row * s.hidden);
  }

  // Every thread for itself: cheaper than waiting for each other.
  void norm(int64_t first, const float* gain) {
    for (int64_t row = first; row < n; row++) {
      const float* const from = x + row * s.hidden;
      factors[row] = 1.0f / std::sqrt(sum_of_squares(from, s.hidden) + s.floor * s.floor);
      if (gain)
        for (int64_t i = 0; i < s.hidden; i++) scaled[row * s.hidden + i] = from[i] * gain[i];
    }
    stream = gain ? scaled : x;
  }

  // The normed stream from a row on by a weight, with its bias; `done(place in rows of this stride, value)`.
  template <typename Done>
  void from_stream(int64_t from, const W* w, const float* bias, int64_t outputs, int64_t stride, Done done) const {
    product(stream + from * s.hidden, n - from, s.hidden, w, outputs, [&](int64_t row, int64_t first, int64_t count, const Vector* values) {
      const float factor = factors[from + row];
      each(values, count, [&](int64_t i, auto value) {
        value *= factor;
        if (bias) value += at(bias, first + i, value);
        done((from + row) * stride + first + i, value);
      });
    });
  }

  // The live rows of something by a weight, with its bias, added to the stream.
  void onto_stream(const float* from, int64_t k, const W* w, const float* bias) const {
    const int64_t outputs = s.hidden;
    product(from + live * k, n - live, k, w, outputs, [&](int64_t row, int64_t first, int64_t count, const Vector* values) {
      float* const to = x + (live + row) * outputs + first;
      each(values, count, [&](int64_t i, auto value) {
        if (bias) value += at(bias, first + i, value);
        put(to, i, value + at(to, i, value));
      });
    });
  }

  // Queries, keys and values of the stream, from one of their heads on.
  void project(const Layer<W>& layer, int64_t from) const {
    const int64_t skipped = from * d;
    from_stream(0, layer.qkv + skipped * s.hidden, layer.qkv_bias ? layer.qkv_bias + skipped : nullptr,
                qkv_width - skipped, qkv_width, [&](int64_t i, auto value) { put(qkv + skipped, i, value); });
  }

  // From one of the heads on: queries and keys are normed and turned, keys and values go to the cache.
  void turn_and_keep(int64_t index, const float* qk_gain, int64_t from) const {
    const int64_t count = qkv_heads - from;
    const Range heads = share(n * count);
    for (int64_t piece = heads.first; piece < heads.end; piece++) {
      const int64_t row = piece / count, head = from + piece % count;
      float* const made = qkv + row * qkv_width + head * d;
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

  // Some queries that share a head of keys: they are the lanes, slots are the rows.
  struct Block {
    int64_t sequence, kv_head, first, count, group, first_row;
    int64_t head_of(int64_t query) const { return kv_head * group + (first + query) % group; }
    int64_t row_of(int64_t query) const { return first_row + (first + query) / group; }
  };

  // `masses` gets the share of each query's attention on the zero token, (N, heads), if not null.
  void attend(int64_t index, const Layer<W>& layer, const float* mask, float* masses) {
    const int64_t most = (longest - live) * group;
    const int64_t blocks = (most + kPanel - 1) / kPanel, block = (most + blocks - 1) / blocks;
    const int64_t pieces = p.sequences * s.kv_heads * blocks, threads = omp_get_num_threads();
    for (int64_t piece = omp_get_thread_num(); piece < pieces; piece += threads) {
      const int64_t first = piece % blocks * block, sequence = piece / (s.kv_heads * blocks);
      const Range rows = rows_of(sequence);
      const int64_t all = (rows.end - rows.first - live) * group;
      const Block b{sequence, piece / blocks % s.kv_heads, first, std::min(block, all - first), group,
                    rows.first + live};
      if (b.count <= 0) continue;
      const float* const keys = kept(index, b.sequence, b.kv_head);
      const int64_t seen = p.causal ? place(b.row_of(b.count - 1)) + 1 : slots;
      score(b, keys, seen);
      hide(b, mask, seen);
      Vector zero[kVectors], inverse[kVectors];
      for (int v = 0; v < kVectors; v++) zero[v] = Vector{} - INFINITY;
      const Layer<W>& of_text = own(layer, sequence);
      if (of_text.zero) score_zero(b, of_text.zero + b.kv_head * d, of_text.zero_turns, zero);
      soften(seen, zero, inverse);
      for (int64_t query = 0; masses && query < b.count; query++)
        masses[b.row_of(query) * s.heads + b.head_of(query)] = zero[query / kLanes][query % kLanes];
      gather(b, keys + s.kv_heads * p.capacity * d, seen, inverse);
    }
  }

  // Scores of a block's queries at the slots that they may see.
  void score(const Block& b, const float* keys, int64_t seen) {
    std::fill(queries, queries + kPanel * d, 0.0f);
    for (int64_t query = 0; query < b.count; query++) {
      const float* const from = qkv + b.row_of(query) * qkv_width + b.head_of(query) * d;
      for (int64_t i = 0; i < d; i++) queries[i * kPanel + query] = from[i] * s.scale;
    }
    for (int64_t slot = 0; slot < seen; slot += kRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kRows, seen - slot));
      // a tile asks for its weights, which are the queries here; keys come from memory
      for (int64_t i = 0; i < rows * d; i += 16) __builtin_prefetch(keys + (slot + 2 * kRows) * d + i, 0, 2);
      tile_of<1>(rows, 1, keys + slot * d, d, 1, queries, 0, kPanel, d, sums);
      for (int m = 0; m < rows; m++)
        for (int v = 0; v < kVectors; v++) store(scores + (slot + m) * kPanel + v * kLanes, sums[m][0][v]);
    }
  }

  // The scores of the zero token, whose value is zero: it takes part in the softmax and adds nothing.
  void score_zero(const Block& b, const float* key, int64_t turns, Vector* zero) const {
    float products[kPanel] = {};
    for (int64_t query = 0; query < b.count; query++) {
      const float* const turn = p.turns + token(b.row_of(query)) * d;
      for (int64_t i = 0; i < d; i += 2) {
        float real = key[i], imaginary = key[i + 1];
        if (turns) {
          real = key[i] * turn[i] - key[i + 1] * turn[i + 1];
          imaginary = key[i] * turn[i + 1] + key[i + 1] * turn[i];
        }
        products[query] += queries[i * kPanel + query] * real + queries[(i + 1) * kPanel + query] * imaginary;
      }
    }
    for (int v = 0; v < kVectors; v++) zero[v] = load(products + v * kLanes);
  }

  // The mask is added, or what comes after a causal query is hidden.
  void hide(const Block& b, const float* mask, int64_t seen) const {
    for (int64_t query = 0; query < b.count; query++) {
      float* const column = scores + query;
      if (mask) {
        const float* const row = mask + token(b.row_of(query)) * slots;
        for (int64_t slot = p.masked_from; slot < seen; slot++) column[slot * kPanel] += row[slot];
      } else if (p.causal) {
        for (int64_t slot = place(b.row_of(query)) + 1; slot < seen; slot++) column[slot * kPanel] = -INFINITY;
      }
    }
  }

  // Scores become chances but for a factor, `inverse`; those of the zero token (minus infinity without one) become its
  // chances.
  void soften(int64_t seen, Vector* zero, Vector* inverse) const {
    for (int v = 0; v < kVectors; v++) {
      float* const column = scores + v * kLanes;
      Vector most = zero[v];
      for (int64_t slot = 0; slot < seen; slot++) {
        const Vector score = load(column + slot * kPanel);
        most = score > most ? score : most;
      }
      zero[v] = exp(zero[v] - most);
      Vector total = zero[v];
      for (int64_t slot = 0; slot < seen; slot++) {
        const Vector chance = exp(load(column + slot * kPanel) - most);
        total += chance;
        store(column + slot * kPanel, chance);
      }
      inverse[v] = 1.0f / total;
      zero[v] *= inverse[v];
    }
  }

  // Chances (queries, S) by values (S, D).
  void gather(const Block& b, const float* values, int64_t seen, const Vector* inverse) {
    for (int64_t query = 0; query < b.count; query += kRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kRows, b.count - query));
      for (int64_t i = 0; i < d; i += kPanel) {
        tile_of<1>(rows, 1, scores + query, 1, kPanel, values + i, 0, d, seen, sums);
        for (int m = 0; m < rows; m++) {
          const int64_t lane = query + m;
          const float factor = inverse[lane / kLanes][lane % kLanes];
          float* const to = attended + b.row_of(lane) * width + b.head_of(lane) * d + i;
          for (int v = 0; v < kVectors; v++) store(to + v * kLanes, sums[m][0][v] * factor);
        }
      }
    }
  }

  // All of a layer. `tap` gets what it leaves, before its gate and scale, if not null; `mask` and `masses` as in `attend`.
  void run(int64_t index, const Layer<W>& layer, const float* mask, float* tap, float* masses) {
    const bool apart = p.shifts, gated = apart ? s.gated : layer.cycle_gate != 1;
    if (index == s.head_layers && !apart) copy_stream(p.head_output);
    if (apart ? p.head_output != nullptr : layer.injection != 0) {
      inject(layer);
#pragma omp barrier
    }
    if (gated) copy_stream(earlier);
    norm(0, layer.before);
    project(layer, 0);
#pragma omp barrier
    turn_and_keep(index, layer.qk_gain, 0);
#pragma omp barrier
    attend(index, layer, mask, masses);
#pragma omp barrier
    onto_stream(attended, width, layer.out, layer.out_bias);
#pragma omp barrier
    norm(live, layer.after);
    from_stream(live, layer.gate, layer.gate_bias, s.inner, s.inner,
                [&](int64_t i, auto value) { put(inner, i, silu(value)); });
    // the same thread has the same panels again
    from_stream(live, layer.up, layer.up_bias, s.inner, s.inner,
                [&](int64_t i, auto value) { put(inner, i, value * at(inner, i, value)); });
#pragma omp barrier
    onto_stream(inner, s.inner, layer.down, layer.down_bias);
#pragma omp barrier
    if (tap) copy_stream(tap);
    if (apart || gated || layer.scale != 1) {
      gate_and_scale(layer);
#pragma omp barrier
    }
  }

  // Keys and values of a layer, and nothing else of it.
  void leave(int64_t index, const Layer<W>& layer) {
    norm(0, layer.before);
    project(layer, s.heads);
#pragma omp barrier
    turn_and_keep(index, layer.qk_gain, s.heads);
#pragma omp barrier
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
};

// The pass's layers. `masks[layer]` is added to the scores, (B, T, slots), or null; `taps[layer]` gets what the layer
// before it left, before its gate and scale, or null; `feeds[layer]` is what the context is at the layer, null: what it
// was; `masses[layer]` as in `attend`.
template <typename W>
void forward_of(const Shape* shape, const Layer<W>* layers, const Pass* pass, const float* const* masks,
                float* const* taps, const float* const* feeds, float* const* masses) {
#pragma omp parallel num_threads(pass->threads)
  {
    Worker<W> worker(shape, pass);
    // all rows leave keys and values alone, and no queries
    const bool leaves = pass->context == worker.n;
    if (pass->first == 0 && taps[0]) worker.copy_stream(taps[0]);
    for (int64_t index = pass->first; index < pass->last; index++) {
      const Layer<W>& layer = layers[index];
      if (index + 1 == pass->last) worker.live = pass->last_from;
      if (feeds[index]) {
        worker.feed(feeds[index]);
#pragma omp barrier
      }
      if (leaves)
        worker.leave(index, layer);
      else
        worker.run(index, layer, masks[index], index + 1 < shape->layers ? taps[index + 1] : nullptr, masses[index]);
    }
  }
}

// How the rows that run are scored in a cycle; every thread has its share of them.
template <typename W>
struct Judge {
  const Exits& e;
  const Shape& s;
  // the states in front of the cycle, (N, H); masses of a layer, (N, heads); scores, (N)
  float *const before, *const masses, *const scores;

  Judge(const Shape* shape, const Pass* pass, const Exits* exits)
      : e(*exits), s(*shape), before(pass->scratch + all_floats(shape, pass)),
        masses(before + pass->sequences * pass->tokens * s.hidden),
        scores(masses + pass->sequences * pass->tokens * s.heads) {}

  void begin(const Worker<W>& worker) const {
    if (e.score == kLatent) return worker.copy_stream(before);
    const Range mine = share(worker.n);
    std::fill(scores + mine.first, scores + mine.end, e.score == kLeast ? INFINITY : e.score == kMost ? -INFINITY : 0);
  }

  // Takes in the masses of a layer.
  void read(const Worker<W>& worker) const {
    const Range mine = share(worker.n);
    for (int64_t row = mine.first; row < mine.end; row++)
      for (int64_t head = 0; head < s.heads; head++) {
        const float mass = masses[row * s.heads + head];
        float& score = scores[row];
        score = e.score == kMean ? score + mass : e.score == kMost ? std::max(score, mass) : std::min(score, mass);
      }
  }

  float score(const Worker<W>& worker, int64_t row, bool has_masses) const {
    if (e.score == kLatent) return -moved(worker, row);
    if (!has_masses) return -INFINITY;
    return e.score == kMean ? scores[row] / (s.heads * (e.end_read - e.first_read)) : scores[row];
  }

  float moved(const Worker<W>& worker, int64_t row) const {
    const float *const x = worker.x + row * s.hidden, *const from = before + row * s.hidden;
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
  void judge(const Worker<W>& worker, float threshold, bool has_masses, Rows& rows) const {
    const Range mine = share(worker.n);
    for (int64_t row = mine.first; row < mine.end; row++) {
      const bool settled = threshold == threshold && score(worker, row, has_masses) >= threshold;
      rows.stops[row] = settled || e.depth[worker.token(row)] == 0;
    }
  }
};

// All layers of a Zero Token Transformer with early exit; `masks` and `taps` as in `forward_of`.
template <typename W>
void forward_with_exits_of(const Shape* shape, const Layer<W>* layers, const Pass* pass, const float* const* masks,
                           float* const* taps, const Exits* exits) {
  const Exits& e = *exits;
  const int64_t tail = e.head + e.cycles * e.shared;
  Rows rows(*pass);
#pragma omp parallel num_threads(pass->threads)
  {
    Worker<W> worker(shape, pass);
    const Judge<W> judge(shape, pass, exits);
    const auto run = [&](int64_t index, float* masses) {
      if (index >= tail && index + 1 == shape->layers) worker.live = pass->last_from;
      worker.run(index, layers[index], masks[index], index + 1 < shape->layers ? taps[index + 1] : nullptr, masses);
    };
    if (taps[0]) worker.copy_stream(taps[0]);
    for (int64_t index = 0; index < e.head; index++) run(index, nullptr);
    for (int64_t cycle = 1; cycle <= e.cycles && rows.running; cycle++) {
      const int64_t first = e.head + (cycle - 1) * e.shared, next = first + e.shared;
      const float threshold = cycle < e.cycles ? e.thresholds[cycle - 1] : NAN;
      const bool asks = threshold == threshold, has_masses = layers[first].zero;
      if (asks) judge.begin(worker);
      for (int64_t index = first; index < next; index++) {
        const bool reads = asks && has_masses && index - first >= e.first_read && index - first < e.end_read;
        run(index, reads ? judge.masses : nullptr);
        if (reads) judge.read(worker);
      }
      if (cycle == e.cycles) break;
      judge.judge(worker, threshold, has_masses, rows);
#pragma omp barrier
#pragma omp single
      {
        rows.part(*shape, *pass, judge.before);
        for (int64_t row = 0; row < rows.running; row++) e.depth[rows.tokens[row]] = cycle + 1;
      }
      worker.take(rows, rows.running, rows.stopped);
      for (int64_t place = 0; rows.stopped && place < e.shared; place++) {
        if (!e.latest) worker.leave(next + place, layers[next + place]);
        worker.repeat((e.latest ? first : next) + place, e.shared, tail);
      }
      worker.take(rows, 0, rows.running);
    }
    worker.take_all(rows, judge.before);
    for (int64_t index = tail; index < shape->layers; index++) run(index, nullptr);
  }
}

}  // namespace

extern "C" {

// With early exit or without.
int64_t scratch_floats(const Shape* shape, const Pass* pass, int64_t exits) {
  return all_floats(shape, pass) + exits * pass->sequences * pass->tokens * exit_floats(shape);
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
    forward_with_exits_of(shape, static_cast<const Layer<uint16_t>*>(layers), pass, masks, taps, exits);
  else
    forward_with_exits_of(shape, static_cast<const Layer<float>*>(layers), pass, masks, taps, exits);
}

// `forward_of` for weights of either type.
void forward(const Shape* shape, const void* layers, const Pass* pass, const float* const* masks, float* const* taps,
             const float* const* feeds, float* const* masses) {
  if (shape->narrow)
    forward_of(shape, static_cast<const Layer<uint16_t>*>(layers), pass, masks, taps, feeds, masses);
  else
    forward_of(shape, static_cast<const Layer<float>*>(layers), pass, masks, taps, feeds, masses);
}

// The number of floats that vectors of this build hold.
int64_t lanes() { return kLanes; }

}  // extern "C"
