// The quantizer's search (liquidgemm/weights/quantize.py, whose operations these are, in the same
// order: the results are the same bits). Groups are searched side by side, one per lane of a
// vector.
#pragma once

#include "liquidgemm/cpu/activation.hpp"

namespace liquidgemm::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

// The grid, as in quantize.py.
inline constexpr float kClips[] = {1.f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f};
inline constexpr int kClipCount = sizeof(kClips) / sizeof(float);
inline constexpr int kStepOffsets[] = {0, -1, -2, 1};
inline constexpr int kCentreOffsets[] = {0, -1, 1};

inline Lanes all(float value) {
  return Lanes{} + value;
}
inline Lanes greater(Lanes a, Lanes b) {
  return a > b ? a : b;
}
inline Lanes lesser(Lanes a, Lanes b) {
  return a < b ? a : b;
}
inline Lanes clamped(Lanes x, float low, float high) {
  return lesser(greater(x, all(low)), all(high));
}

// x * y + z, rounded once, as torch.addcmul does where there is an instruction for it.
inline Lanes fused(Lanes x, Lanes y, Lanes z) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__FMA__)
  return (Lanes)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
  for (int lane = 0; lane < kLanes; ++lane)
    z[lane] = __builtin_fmaf(x[lane], y[lane], z[lane]);
  return z;
#endif
}

// Ties to even: adding it leaves no bits for a fraction. For magnitudes below 2^22.
inline constexpr float kShift = 0x1.8p23f;
inline Lanes rounded(Lanes x) {
  return (x + kShift) - kShift;
}
inline Lanes ceiling(Lanes x) {
  const Lanes nearest = rounded(x);
  return nearest < x ? nearest + 1.f : nearest;
}
// The nearest code of 0 ... kLargestOne, clamped as an integer, which the bits of the shifted
// number are.
template <int kLargestOne>
Lanes nearest_code(Lanes x) {
  constexpr int32_t kZero = 0x4b400000, kLargest = kZero + kLargestOne;
  IntLanes bits = (IntLanes)(x + kShift);
  bits = bits > kZero ? bits : IntLanes{} + kZero;
  bits = bits < kLargest ? bits : IntLanes{} + kLargest;
  return (Lanes)bits - kShift;
}

// Real-valued q = (x / clip - z) / s.
struct ToCode {
  Lanes shift, factor;
  ToCode(Lanes s, Lanes z, Lanes clip) : shift(-z / s), factor(1.f / (s * clip)) {}
  Lanes operator()(Lanes x) const { return fused(x, factor, shift); }
};

// The sum of term(0) ... term(count - 1) by halving. `memory` holds count / 2 + 1 terms.
template <class Term>
Lanes sum_by_halving(int64_t count, Lanes* memory, Term term) {
  if (count == 1)
    return term(0);
  int64_t half = count / 2;
  for (int64_t i = 0; i < half; ++i)
    memory[i] = term(i) + term(half + i);
  if (count % 2)
    memory[0] += term(count - 1);
  while (half > 1) {
    const int64_t length = half;
    half = length / 2;
    for (int64_t i = 0; i < half; ++i)
      memory[i] += memory[half + i];
    if (length % 2)
      memory[0] += memory[length - 1];
  }
  return memory[0];
}

inline float sum_by_halving(float* values, int64_t count) {
  while (count > 1) {
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half; ++i)
      values[i] += values[half + i];
    if (count % 2)
      values[0] += values[count - 1];
    count = half;
  }
  return values[0];
}

struct Best {
  Lanes error, s, z;
};

template <bool Weighted, int kLargest>
void try_candidate(Lanes const* x,
                   Lanes const* weight,
                   int64_t span,
                   Lanes clip,
                   Lanes s,
                   Lanes start,
                   Lanes* memory,
                   Best& best) {
  const Lanes z = lesser(greater(rounded(start), all(-128.f)), 127.f - float(kLargest) * s);
  const ToCode code(s, z, clip);
  const Lanes step = s * clip;
  const Lanes error = sum_by_halving(span, memory,
                                     [&](int64_t i) {
                                       const Lanes q = code(x[i]);
                                       const Lanes off = nearest_code<kLargest>(q) - q;
                                       return Weighted ? off * off * weight[i] : off * off;
                                     }) *
                      (step * step);
  const auto better = error < best.error;
  best.error = better ? error : best.error;
  best.s = better ? s : best.s;
  best.z = better ? z : best.z;
}

template <bool Weighted, int kLargest>
Best search_groups(Lanes const* x,
                   Lanes const* weight,
                   int64_t span,
                   Lanes low,
                   Lanes high,
                   float clip,
                   Lanes* memory) {
  Best best{all(__builtin_inff()), all(1.f), all(0.f)};
  low /= clip;
  high /= clip;
  constexpr float kMaxStep = float(255 / kLargest);
  const Lanes cover = ceiling((high - low) / float(kLargest)), centre = (high + low) / 2.f;
  for (int step : kStepOffsets) {
    const Lanes s = clamped(cover + float(step), 1.f, kMaxStep);
    for (int offset : kCentreOffsets) {
      const float shift = float(offset / 3.0 - kLargest / 2.0);
      try_candidate<Weighted, kLargest>(x, weight, span, all(clip), s, centre + s * shift, memory,
                                        best);
    }
    if (clip == 1.f && (step == 0 || step == -1))
      try_candidate<Weighted, kLargest>(x, weight, span, all(clip), s, low, memory, best);
  }
  return best;
}

// Columns [column, column + kLanes) of a matrix of `columns`; those past the end repeat the last.
inline void load_lanes(
    float const* matrix, int64_t span, int64_t columns, int64_t column, Lanes* to) {
  const int64_t inside = smaller(kLanes, columns - column);
  for (int64_t i = 0; i < span; ++i) {
    float const* const row = matrix + i * columns + column;
    float values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      values[lane] = row[lane < inside ? lane : inside - 1];
    memcpy(to + i, values, sizeof values);
  }
}

inline void store_lanes(Lanes const& lanes, int64_t columns, int64_t column, float* to) {
  memcpy(to + column, &lanes, sizeof(float) * size_t(smaller(kLanes, columns - column)));
}

template <bool Weighted, int kLargest>
void search_rows(Search const& a) {
  const int64_t groups = a.columns / a.rows;
  Lanes* const x = reinterpret_cast<Lanes*>(a.scratch);
  Lanes* const weight = x + a.span;
  Lanes* const memory = weight + a.span;
  float* const results = reinterpret_cast<float*>(memory + a.span / 2 + 1);
  const auto result = [&](int clip, int which) { return results + (3 * clip + which) * a.columns; };

  for (int64_t column = 0; column < a.columns; column += kLanes) {
    load_lanes(a.units, a.span, a.columns, column, x);
    if (Weighted)
      load_lanes(a.weight, a.span, a.columns, column, weight);
    Lanes low = x[0], high = x[0];
    for (int64_t i = 1; i < a.span; ++i) {
      low = lesser(low, x[i]);
      high = greater(high, x[i]);
    }
    for (int clip = 0; clip < kClipCount; ++clip) {
      const Best best =
          search_groups<Weighted, kLargest>(x, weight, a.span, low, high, kClips[clip], memory);
      store_lanes(best.error, a.columns, column, result(clip, 0));
      store_lanes(best.s, a.columns, column, result(clip, 1));
      store_lanes(best.z, a.columns, column, result(clip, 2));
    }
  }

  // The clip of each row, kept in place of the first errors.
  float* const clips = result(0, 0);
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t first = row * groups;
    float least = __builtin_inff(), clip = 1.f;
    for (int64_t g = first; g < first + groups; ++g) {
      a.s[g] = 1.f;
      a.z[g] = 0.f;
    }
    for (int i = 0; i < kClipCount; ++i) {
      const float error = sum_by_halving(result(i, 0) + first, groups);
      if (!(error < least))
        continue;
      least = error;
      clip = kClips[i];
      memcpy(a.s + first, result(i, 1) + first, sizeof(float) * size_t(groups));
      memcpy(a.z + first, result(i, 2) + first, sizeof(float) * size_t(groups));
    }
    for (int64_t g = first; g < first + groups; ++g)
      clips[g] = clip;
  }

  // Codes, and the least-squares fit of sigma to them.
  float* const numerators = result(1, 0);
  float* const denominators = result(2, 0);
  for (int64_t column = 0; column < a.columns; column += kLanes) {
    load_lanes(a.units, a.span, a.columns, column, x);
    if (Weighted)
      load_lanes(a.weight, a.span, a.columns, column, weight);
    Lanes s, z, clip;
    load_lanes(a.s, 1, a.columns, column, &s);
    load_lanes(a.z, 1, a.columns, column, &z);
    load_lanes(clips, 1, a.columns, column, &clip);
    const ToCode code(s, z, clip);
    const auto w8 = [&](int64_t i) { return fused(nearest_code<kLargest>(code(x[i])), s, z); };
    const auto weighted = [&](int64_t i) { return Weighted ? w8(i) * weight[i] : w8(i); };
    store_lanes(sum_by_halving(a.span, memory, [&](int64_t i) { return weighted(i) * x[i]; }),
                a.columns, column, numerators);
    store_lanes(sum_by_halving(a.span, memory, [&](int64_t i) { return weighted(i) * w8(i); }),
                a.columns, column, denominators);
    for (int64_t i = 0; i < a.span; ++i)
      store_lanes(nearest_code<kLargest>(code(x[i])), a.columns, column, a.q + i * a.columns);
  }
  for (int64_t row = 0; row < a.rows; ++row) {
    const float clip = clips[row * groups];
    const float numerator = sum_by_halving(numerators + row * groups, groups);
    const float denominator = sum_by_halving(denominators + row * groups, groups);
    const bool fits = numerator > 0.f && denominator > 0.f;
    a.refit[row] = fits ? numerator / denominator : clip;
  }
}

inline void search(Search const& arguments) {
  const bool weighted = arguments.weight != nullptr;
  if (arguments.largest_code == kLargestCode)
    (weighted ? search_rows<true, kLargestCode> : search_rows<false, kLargestCode>)(arguments);
  else
    (weighted ? search_rows<true, kLargestCode6> : search_rows<false, kLargestCode6>)(arguments);
}

}  // namespace
}  // namespace liquidgemm::cpu
