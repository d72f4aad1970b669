#pragma once

namespace liquidgemm {

// What a router has chosen: slot t * top_k + j is the j-th choice of token t.
struct ExpertIds {
  void const* ids;  // [slots], int32_t or int64_t
  bool are_64_bits;
  int experts;
};

}  // namespace liquidgemm
