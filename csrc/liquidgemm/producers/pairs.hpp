// Arithmetic of two neighbouring elements of a vector, each operation rounded to the element's
// type.
//
// For 16 bits it is one instruction where eager torch computes in float32 and rounds the result: a
// sum or product that is rounded to float32 first is the same, since float32 has more than twice
// the bits of a significand, and two.
#pragma once

#include "liquidgemm/common/rounded.hpp"
#include "liquidgemm/producers/quantizer.hpp"

namespace liquidgemm {

template <class T>
struct Pair;

template <>
struct Pair<float> {
  using Type = float2;
  CUTE_DEVICE static float2 to_floats(float2 a) { return a; }
  CUTE_DEVICE static float2 round(float2 a) { return a; }
  CUTE_DEVICE static float2 add(float2 a, float2 b) {
    return make_float2(rounded::add(a.x, b.x), rounded::add(a.y, b.y));
  }
  CUTE_DEVICE static float2 multiply(float2 a, float2 b) {
    return make_float2(rounded::multiply(a.x, b.x), rounded::multiply(a.y, b.y));
  }
};

template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  CUTE_DEVICE static float2 to_floats(Type a) { return __bfloat1622float2(a); }
  CUTE_DEVICE static Type round(float2 a) { return __float22bfloat162_rn(a); }
  CUTE_DEVICE static Type add(Type a, Type b) { return __hadd2_rn(a, b); }
  CUTE_DEVICE static Type multiply(Type a, Type b) { return __hmul2_rn(a, b); }
};

template <>
struct Pair<__half> {
  using Type = __half2;
  CUTE_DEVICE static float2 to_floats(Type a) { return __half22float2(a); }
  CUTE_DEVICE static Type round(float2 a) { return __float22half2_rn(a); }
  CUTE_DEVICE static Type add(Type a, Type b) { return __hadd2_rn(a, b); }
  CUTE_DEVICE static Type multiply(Type a, Type b) { return __hmul2_rn(a, b); }
};

inline constexpr int kPairs = kVector / 2;

template <class T>
CUTE_DEVICE auto& pairs(Vector<T>& vector) {
  return reinterpret_cast<typename Pair<T>::Type(&)[kPairs]>(vector.values);
}
template <class T>
CUTE_DEVICE auto& pairs(Vector<T> const& vector) {
  return reinterpret_cast<typename Pair<T>::Type const(&)[kPairs]>(vector.values);
}

// Stores the first `count` elements.
template <class T>
CUTE_DEVICE void store(T* to, Vector<T> const& vector, int64_t count, bool aligned) {
  if (aligned && count >= kVector) {
    CUTE_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(vector) / sizeof(uint4)); ++i)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<uint4 const*>(vector.values)[i];
  } else {
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (i < count)
        to[i] = vector.values[i];
    }
  }
}

}  // namespace liquidgemm
