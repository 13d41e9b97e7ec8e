// Vectors of floats as wide as the processor has them, and what is computed in them. Code that is written for both gets
// one float where a vector would reach too far.
#pragma once

#include <cmath>
#include <cstdint>

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

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
// bfloat16: a float's upper half
inline Vector load(const uint16_t* p) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Ints) << 16);
}

// Taylor's series around the nearest multiple of ln 2. Relative error below 3e-7; 0 below -87 (minus infinity
// included), infinity from where floats end, NaN for NaN.
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

inline Vector at(const float* p, int64_t i, Vector) { return load(p + i); }
inline float at(const float* p, int64_t i, float) { return p[i]; }
inline void put(float* p, int64_t i, Vector v) { store(p + i, v); }
inline void put(float* p, int64_t i, float v) { p[i] = v; }
inline Vector silu(Vector x) { return x / (1.0f + exp(-x)); }
inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

}  // namespace
