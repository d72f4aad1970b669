// The weight formats. tests/cpp/test_formats.cpp tests each of them.
#pragma once

#include <tuple>

#include "liquidgemm/formats/liquidquant.hpp"

namespace liquidgemm {

using Formats = std::tuple<LiquidQuant>;

}  // namespace liquidgemm
