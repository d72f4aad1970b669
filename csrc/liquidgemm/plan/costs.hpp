// The costs of each weight format's tiles.
#pragma once

#include "liquidgemm/formats/format_id.hpp"
#include "liquidgemm/plan/costs_h100.hpp"
#include "liquidgemm/plan/costs_h100_int8.hpp"
#include "liquidgemm/plan/costs_h100_liquidquant6.hpp"
#include "liquidgemm/plan/costs_h100_liquidquant_g32.hpp"

namespace liquidgemm {

inline Costs const& costs_of(FormatId format) {
  switch (format) {
    case FormatId::kInt8:
      return kInt8CostsOfH100;
    case FormatId::kLiquidQuant6:
      return kLiquidQuant6CostsOfH100;
    case FormatId::kLiquidQuantG32:
      return kLiquidQuantG32CostsOfH100;
    default:
      return kCostsOfH100;
  }
}

}  // namespace liquidgemm
