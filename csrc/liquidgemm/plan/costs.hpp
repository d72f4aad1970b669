// The costs of each weight format's tiles.
#pragma once

#include "liquidgemm/formats/format_id.hpp"
#include "liquidgemm/plan/costs_h100.hpp"
#include "liquidgemm/plan/costs_h100_int8.hpp"

namespace liquidgemm {

inline Costs const& costs_of(FormatId format) {
  return format == FormatId::kInt8 ? kInt8CostsOfH100 : kCostsOfH100;
}

}  // namespace liquidgemm
