// Where a pass has its buffers: all in the scratch that Python allocates for it.
#pragma once

#include <omp.h>

#include "structures.h"
#include "vectors.h"

namespace {

// Of every row, in `Buffers` of all threads.
int64_t row_floats(const Shape& s) {
  return (s.heads + 2 * s.kv_heads + s.heads) * s.head_dim + s.inner + s.gated * s.hidden;
}

// Rows, filled up so that what lies behind them begins where a panel could.
int64_t whole_panels(int64_t rows) { return (rows + kPanel - 1) / kPanel * kPanel; }

// Of every thread, in its own `Buffers`.
int64_t thread_floats(const Shape& s, const Pass& p) {
  const int64_t rows = p.sequences * p.tokens;
  return whole_panels(rows) + kPanel * (s.head_dim + p.seen) + rows * s.hidden;
}

int64_t buffer_floats(const Shape& s, const Pass& p) {
  return p.sequences * p.tokens * row_floats(s) + p.threads * thread_floats(s, p);
}

// Of every row, in `ExitBuffers`.
int64_t exit_floats(const Shape& s) { return s.hidden + s.heads + 1; }

struct Buffers {
  // of all threads: (N, heads of queries, keys and values, D), (N, heads, D), (N, inner), and, if layers have gates,
  // (N, H)
  float *const qkv, *const attended, *const inner, *const earlier;
  // of this one: a factor a row, (D, 16), (S, 16), (N, H)
  float *const factors, *const queries, *const scores, *const scaled;

  Buffers(const Shape& s, const Pass& p) : Buffers(s, p, p.sequences * p.tokens) {}

 private:
  Buffers(const Shape& s, const Pass& p, int64_t n)
      : qkv(p.scratch), attended(qkv + n * (s.heads + 2 * s.kv_heads) * s.head_dim),
        inner(attended + n * s.heads * s.head_dim), earlier(inner + n * s.inner),
        factors(p.scratch + n * row_floats(s) + omp_get_thread_num() * thread_floats(s, p)),
        queries(factors + whole_panels(n)), scores(queries + kPanel * s.head_dim), scaled(scores + kPanel * p.seen) {}
};

// Of all threads, behind the others.
struct ExitBuffers {
  // the states in front of the cycle, (N, H); masses of a layer, (N, heads); scores, (N)
  float *const before, *const masses, *const scores;

  ExitBuffers(const Shape& s, const Pass& p)
      : before(p.scratch + buffer_floats(s, p)), masses(before + p.sequences * p.tokens * s.hidden),
        scores(masses + p.sequences * p.tokens * s.heads) {}
};

}  // namespace
