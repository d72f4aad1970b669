#include "liquidgemm/cpu/gemm.hpp"

#include <algorithm>
#include <cstring>

#include "liquidgemm/cpu/layout.hpp"
#include "liquidgemm/cpu/work.hpp"

namespace liquidgemm::cpu {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Work that is worth a second thread: about 10 microseconds.
constexpr int64_t kGrainWeights = 1 << 18;  // times tokens, of a product

// Arranged activations of one round should stay in a core's second cache while all weights pass.
constexpr int64_t kRoundBytes = 1 << 20;

// Tokens [first, first + count) of the arguments, arranged from `to`'s first token on.
void arrange(Kernels const& kernels,
             Product const& product,
             GemmArguments const& a,
             int64_t first,
             int64_t count,
             float* scales,
             Activations const& to,
             ParallelFor parallel_for) {
  const int64_t columns = to.groups * kGroup;
  const int64_t row_bytes = a.k * size_of(a.x_type);
  auto tiles = [&](int64_t begin, int64_t end) {
    const Memory<int8_t> rows(product.tile * columns);
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t t = 0; t < product.tile; ++t) {
        int8_t* const row = rows.get() + t * columns;
        const int64_t token = tile * product.tile + t;
        if (token >= count) {
          std::memset(row, 0, size_t(columns));
          continue;
        }
        char const* const x = static_cast<char const*>(a.x) + (first + token) * row_bytes;
        if (a.x_scale)
          std::memcpy(row, x, size_t(a.k));
        else
          scales[token] = kernels.quantize(x, a.x_type, a.k, row);
        std::memset(row + a.k, 0, size_t(columns - a.k));
      }
      product.arrange(rows.get(), tile * product.tile, to);
    }
  };
  const int64_t grain = std::max<int64_t>(1, kGrainActivations / (product.tile * columns));
  run(parallel_for, to.tokens / product.tile, grain, tiles);
}

}  // namespace

void gemm(Kernels const& kernels, GemmArguments const& a, ParallelFor parallel_for) {
  if (a.m == 0)
    return;
  const int64_t groups = ceil_div(a.k, kGroup), bands = ceil_div(a.n, kBand);
  Product const& product = kernels.product(a.format, a.m);
  const int64_t in_a_round =
      std::max<int64_t>(64, kRoundBytes / (groups * product.bytes_per_group) / 64 * 64);
  const int64_t round = std::min(in_a_round, ceil_div(a.m, product.tile) * product.tile);

  const Memory<int8_t> x(round * groups * product.bytes_per_group);
  const Memory<int32_t> sums(round * (2 * groups + 1));
  const Memory<float> scales(round);
  for (int64_t first = 0; first < a.m; first += round) {
    const int64_t count = std::min(round, a.m - first);
    const Activations arranged{x.get(), sums.get() + round, sums.get(),
                               ceil_div(count, product.tile) * product.tile, groups};
    arrange(kernels, product, a, first, count, scales.get(), arranged, parallel_for);
    const Output out{static_cast<char*>(a.y) + first * a.n * size_of(a.y_type),
                     a.y_type,
                     count,
                     a.n,
                     a.x_scale ? a.x_scale + first : scales.get(),
                     a.weight_scale,
                     a.bias};
    auto multiply = [&](int64_t begin, int64_t end) {
      product.multiply(a.weight, begin, end, arranged, out);
    };
    const int64_t work = count * groups * kGroup * kBand;
    run(parallel_for, bands, std::max<int64_t>(1, kGrainWeights / work), multiply);
  }
}

void quantize_activation(Kernels const& kernels,
                         QuantizeArguments const& a,
                         ParallelFor parallel_for) {
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      char const* const x = static_cast<char const*>(a.x) + row * a.k * size_of(a.x_type);
      a.scale[row] = kernels.quantize(x, a.x_type, a.k, a.out + row * a.k);
    }
  };
  run(parallel_for, a.m, std::max<int64_t>(1, kGrainActivations / a.k), rows);
}

}  // namespace liquidgemm::cpu
