// Integer arithmetic that host and device share.
#pragma once

#include <cstdint>

#include <cute/config.hpp>

namespace liquidgemm {

CUTE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace liquidgemm
