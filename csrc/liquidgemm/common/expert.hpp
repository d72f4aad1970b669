// Which expert a slot is for.
#pragma once

#include <cstdint>

#include <cute/config.hpp>

#include "liquidgemm/common/expert_ids.hpp"

namespace liquidgemm {

// -1 where the id is none of 0 to experts - 1.
CUTE_DEVICE int expert_of(ExpertIds const& chosen, int64_t slot) {
  // Not from L1: it may hold what was there before the ids were written.
  const int64_t id =
      chosen.are_64_bits
          ? static_cast<int64_t>(__ldcg(static_cast<long long const*>(chosen.ids) + slot))
          : __ldcg(static_cast<int32_t const*>(chosen.ids) + slot);
  return id >= 0 && id < chosen.experts ? static_cast<int>(id) : -1;
}

}  // namespace liquidgemm
