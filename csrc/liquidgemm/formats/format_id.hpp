// A value for each weight format: its place in `Formats` of formats.hpp.
#pragma once

namespace liquidgemm {

enum class FormatId : int { kLiquidQuant, kInt8, kLiquidQuant6, kLiquidQuantG32 };

}  // namespace liquidgemm
