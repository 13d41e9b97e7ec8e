// Attention of the rows at work over what is cached, with zero tokens, masks and gaps.
#pragma once

#include <algorithm>
#include <cmath>

#include "stream.h"

namespace {

struct Attention : Stream {
  Sums sums;

  using Stream::Stream;

  // Some queries that share a head of keys: they are the lanes, slots are the rows.
  struct Block {
    int64_t sequence, kv_head, first, count, group, first_row;
    int64_t head_of(int64_t query) const { return kv_head * group + (first + query) % group; }
    int64_t row_of(int64_t query) const { return first_row + (first + query) / group; }
  };

  // `masses` gets the share of each query's attention on the zero token, (N, heads), if not null.
  template <typename W>
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
    std::fill(buffers.queries, buffers.queries + kPanel * d, 0.0f);
    for (int64_t query = 0; query < b.count; query++) {
      const float* const from = buffers.qkv + b.row_of(query) * qkv_width + b.head_of(query) * d;
      for (int64_t i = 0; i < d; i++) buffers.queries[i * kPanel + query] = from[i] * s.scale;
    }
    for (int64_t slot = 0; slot < seen; slot += kRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kRows, seen - slot));
      // a tile asks for its weights, which are the queries here; keys come from memory
      for (int64_t i = 0; i < rows * d; i += 16) __builtin_prefetch(keys + (slot + 2 * kRows) * d + i, 0, 2);
      tile_of<1>(rows, 1, keys + slot * d, d, 1, buffers.queries, 0, kPanel, d, sums);
      for (int m = 0; m < rows; m++)
        for (int v = 0; v < kVectors; v++) store(buffers.scores + (slot + m) * kPanel + v * kLanes, sums[m][0][v]);
    }
  }

  // The scores of the zero token, whose value is zero: it takes part in the softmax and adds nothing.
  void score_zero(const Block& b, const float* key, int64_t turns, Vector* zero) const {
    float products[kPanel] = {};
    for (int64_t query = 0; query < b.count; query++) {
      const float *const queries = buffers.queries + query, *const turn = p.turns + token(b.row_of(query)) * d;
      for (int64_t i = 0; i < d; i += 2) {
        float real = key[i], imaginary = key[i + 1];
        if (turns) {
          real = key[i] * turn[i] - key[i + 1] * turn[i + 1];
          imaginary = key[i] * turn[i + 1] + key[i + 1] * turn[i];
        }
        products[query] += queries[i * kPanel] * real + queries[(i + 1) * kPanel] * imaginary;
      }
    }
    for (int v = 0; v < kVectors; v++) zero[v] = load(products + v * kLanes);
  }

  // The mask is added, or what comes after a causal query is hidden.
  void hide(const Block& b, const float* mask, int64_t seen) const {
    for (int64_t query = 0; query < b.count; query++) {
      float* const column = buffers.scores + query;
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
      float* const column = buffers.scores + v * kLanes;
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
        tile_of<1>(rows, 1, buffers.scores + query, 1, kPanel, values + i, 0, d, seen, sums);
        for (int m = 0; m < rows; m++) {
          const int64_t lane = query + m;
          const float factor = inverse[lane / kLanes][lane % kLanes];
          float* const to = buffers.attended + b.row_of(lane) * width + b.head_of(lane) * d + i;
          for (int v = 0; v < kVectors; v++) store(to + v * kLanes, sums[m][0][v] * factor);
        }
      }
    }
  }
};

}  // namespace
