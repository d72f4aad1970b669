// RMSNorm, in words that host and device share.
//
// The order in which it sums squares is a function of K alone:
//
//   a vector is kSumVector neighbouring elements, a group kSumLanes neighbouring vectors, and what
//   is missing at the end of a row is zeros;
//   the squares of a vector, then the sums of a group's vectors are added by halves: the upper half
//   to the lower one until one is left;
//   group g is added to chain g % kSumChains, in ascending order from 0 on;
//   the chains are added by halves.
//
// So the lanes of a warp hold a group, and a CTA of any number of warps keeps the order.
#pragma once

namespace liquidgemm {

inline constexpr int kSumVector = 8, kSumLanes = 32, kSumChains = 32;

// Where the results of a norm are rounded, with R for the type of x: R(w * R(h * r)), or
// R((h * r) * (offset + w)).
enum class NormMode : int { kLlama, kGemma };

}  // namespace liquidgemm
