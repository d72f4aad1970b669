// The weight formats, in the order of FormatId. tests/cpp/test_formats.cpp tests all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "liquidgemm/formats/format_id.hpp"
#include "liquidgemm/formats/int8.hpp"
#include "liquidgemm/formats/liquidquant.hpp"
#include "liquidgemm/formats/liquidquant6.hpp"
#include "liquidgemm/formats/liquidquant_g32.hpp"

namespace liquidgemm {

using Formats = std::tuple<LiquidQuant, Int8, LiquidQuant6, LiquidQuantG32>;

template <FormatId id>
using FormatOf = std::tuple_element_t<static_cast<size_t>(id), Formats>;
static_assert(std::is_same_v<FormatOf<FormatId::kLiquidQuant>, LiquidQuant>);
static_assert(std::is_same_v<FormatOf<FormatId::kInt8>, Int8>);
static_assert(std::is_same_v<FormatOf<FormatId::kLiquidQuant6>, LiquidQuant6>);
static_assert(std::is_same_v<FormatOf<FormatId::kLiquidQuantG32>, LiquidQuantG32>);

// visitor(std::type_identity<Format>{}) for the format that a value names.
template <size_t kFirst = 0, class Visitor>
constexpr auto visit_format(FormatId id, Visitor const& visitor) {
  if constexpr (kFirst + 1 < std::tuple_size_v<Formats>) {
    if (static_cast<size_t>(id) != kFirst)
      return visit_format<kFirst + 1>(id, visitor);
  }
  return visitor(std::type_identity<std::tuple_element_t<kFirst, Formats>>{});
}

constexpr int block_bytes(FormatId id) {
  return visit_format(id, [](auto format) { return decltype(format)::type::kBlockBytes; });
}

// The format whose blocks have so many bytes: the last dimension of a packed weight tells it.
constexpr std::optional<FormatId> format_with(int64_t bytes) {
  for (size_t i = 0; i < std::tuple_size_v<Formats>; ++i) {
    if (block_bytes(static_cast<FormatId>(i)) == bytes)
      return static_cast<FormatId>(i);
  }
  return std::nullopt;
}

constexpr bool block_bytes_differ() {
  for (size_t i = 0; i < std::tuple_size_v<Formats>; ++i) {
    const FormatId id = static_cast<FormatId>(i);
    if (format_with(block_bytes(id)) != id)
      return false;
  }
  return true;
}
static_assert(block_bytes_differ(), "a packed weight would not tell its format");

}  // namespace liquidgemm
