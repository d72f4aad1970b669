// Every set of CPU kernels that this processor has against plain loops. Each buffer has exactly the
// size that is promised, so that a sanitizer sees any access beyond it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "liquidgemm/cpu/gemm.hpp"
#include "liquidgemm/cpu/layout.hpp"
#include "liquidgemm/formats/formats.hpp"

using namespace liquidgemm;

namespace {

int failures = 0;

template <class T>
void expect_equal(T got, T expected, char const* what, std::string const& where, int64_t at) {
  if (std::memcmp(&got, &expected, sizeof got) == 0 || (got != got && expected != expected))
    return;
  if (++failures <= 10)
    std::printf("FAILED: %s, %s, at %lld: got %g, expected %g\n", what, where.c_str(),
                static_cast<long long>(at), double(got), double(expected));
}

struct Random {
  uint32_t state;
  uint32_t operator()(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return static_cast<uint32_t>(uint64_t{state} * below >> 32);
  }
};

void serially(int64_t count, int64_t, cpu::Body body, void* context) {
  // In two parts that begin in the middle of a panel.
  const int64_t middle = count / 3;
  if (middle > 0)
    body(context, 0, middle);
  if (middle < count)
    body(context, middle, count);
}

constexpr FormatId kFormats[] = {FormatId::kLiquidQuant, FormatId::kInt8, FormatId::kLiquidQuant6,
                                 FormatId::kLiquidQuantG32};
static_assert(std::size(kFormats) == std::tuple_size_v<Formats>, "every format is tested");

struct Problem {
  int64_t m, n, k, groups;
  FormatId format;
  std::vector<uint8_t> packed;
  std::vector<int8_t> x;
  std::vector<float> x_scale, weight_scale, bias;
  std::vector<int32_t> sums;

  // `extreme`: groups with s = 255 or q * s + a = 255, weights of INT8 at the ends of their range,
  // and x = +-127.
  Problem(int64_t m, int64_t n, int64_t k, bool extreme, uint32_t seed, FormatId format)
      : m(m), n(n), k(k), groups((k + 63) / 64), format(format) {
    Random random{seed};
    const std::vector<int> weights =
        format == FormatId::kInt8             ? pack_int8(extreme, random)
        : format == FormatId::kLiquidQuant6   ? pack_liquidquant6(extreme, random)
        : format == FormatId::kLiquidQuantG32 ? pack_liquidquant(extreme, random, 32)
                                              : pack_liquidquant(extreme, random, 64);
    x.resize(m * k);
    for (int8_t& value : x)
      value = int8_t(extreme ? (random(2) ? 127 : -127) : int(random(255)) - 127);
    const auto fill = [&](std::vector<float>& values, int64_t count) {
      for (int64_t i = 0; i < count; ++i)
        values.push_back((float(random(1000)) + 1.f) * 1e-5f);
    };
    fill(x_scale, m);
    fill(weight_scale, n);
    fill(bias, n);
    sums.resize(m * n);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        int64_t sum = 0;
        for (int64_t c = 0; c < k; ++c)
          sum += weights[j * groups * 64 + c] * x[i * k + c];
        sums[i * n + j] = int32_t(sum);
      }
    }
  }

  template <class Format>
  void pack(typename Format::Logical const& logical) {
    const int64_t panels = (n + 63) / 64;
    packed.resize(panels * groups * Format::kBlockBytes);
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t g = 0; g < groups; ++g) {
        for (int row = 0; row < 64; ++row)
          Format::pack_row(logical, panel, g, Format::row(row),
                           packed.data() + (panel * groups + g) * Format::kBlockBytes);
      }
    }
  }

  // Both return the weights [n, groups * 64].
  std::vector<int> pack_int8(bool extreme, Random& random) {
    std::vector<int8_t> qweight(n * groups * 64);
    for (int8_t& w : qweight)
      w = int8_t(extreme ? (random(2) ? 127 : -128) : int(random(256)) - 128);
    pack<Int8>({qweight.data(), n, groups});
    return {qweight.begin(), qweight.end()};
  }

  std::vector<int> pack_liquidquant6(bool extreme, Random& random) {
    std::vector<uint8_t> qweight(n * groups * 48), qscale(n * groups), qoffset(n * groups);
    std::vector<int> weights(n * groups * 64);
    for (int64_t g = 0; g < n * groups; ++g) {
      const int largest = extreme && g % 3 == 0 ? 1 : 63;
      const int step = largest == 1 ? 255 : extreme ? 4 : 1 + random(4);
      const int room = 255 - largest * step;
      qscale[g] = uint8_t(step);
      qoffset[g] = uint8_t(extreme ? (g % 2 ? room : 0) : random(room + 1));
      for (int i = 0; i < 64; ++i) {
        const int code = extreme ? largest * int(random(2)) : int(random(largest + 1));
        for (int bit = 0; bit < 6; ++bit)
          qweight[48 * g + (6 * i + bit) / 8] |= uint8_t((code >> bit & 1) << (6 * i + bit) % 8);
        weights[64 * g + i] = code * step + qoffset[g] - 128;
      }
    }
    pack<LiquidQuant6>({{qweight.data(), qscale.data(), qoffset.data(), n, groups}});
    return weights;
  }

  std::vector<int> pack_liquidquant(bool extreme, Random& random, int size) {
    const int64_t count = n * groups * 64 / size;
    std::vector<uint8_t> qweight(n * groups * 32), qscale(count), qoffset(count);
    for (int64_t g = 0; g < count; ++g) {
      const int largest = extreme ? (g % 3 ? 15 : 1) : 15;
      const int step = extreme ? (g % 3 ? 17 : 255) : 1 + random(17);
      const int room = 255 - largest * step;
      qscale[g] = uint8_t(step);
      qoffset[g] = uint8_t(extreme ? (g % 2 ? room : 0) : random(room + 1));
      for (int i = 0; i < size / 2; ++i) {
        const auto code = [&] {
          return extreme ? largest * int(random(2)) : int(random(largest + 1));
        };
        const int low = code();
        qweight[size / 2 * g + i] = uint8_t(low | code() << 4);
      }
    }
    const LogicalWeight logical{qweight.data(), qscale.data(), qoffset.data(), n, groups};
    if (size == 32)
      pack<LiquidQuantG32>({logical});
    else
      pack<LiquidQuant>(logical);
    std::vector<int> weights(n * groups * 64);
    for (size_t i = 0; i < weights.size(); ++i) {
      const int code = qweight[i / 2] >> 4 * (i % 2) & 15;
      weights[i] = code * qscale[i / size] + qoffset[i / size] - 128;
    }
    return weights;
  }

  cpu::GemmArguments arguments() const {
    cpu::GemmArguments a{};
    a.x = x.data();
    a.x_type = Element::kInt8;
    a.x_scale = x_scale.data();
    a.weight = packed.data();
    a.weight_scale = weight_scale.data();
    a.m = m;
    a.n = n;
    a.k = k;
    a.format = format;
    return a;
  }
};

void test_gemm(cpu::Kernels const& kernels, Problem const& p) {
  const std::string where =
      std::string(kernels.name) + " " + std::to_string(p.m) + " x " + std::to_string(p.n) + " x " +
      std::to_string(p.k) +
      visit_format(p.format, [](auto of) { return std::string(" ") + decltype(of)::type::kName; });
  std::vector<int32_t> sums(p.m * p.n, -1);
  cpu::GemmArguments a = p.arguments();
  a.y = sums.data();
  a.y_type = Element::kInt32;
  cpu::gemm(kernels, a, serially);
  for (size_t i = 0; i < sums.size(); ++i)
    expect_equal(sums[i], p.sums[i], "sum", where, i);

  std::vector<float> y(p.m * p.n, -1.f);
  a.y = y.data();
  a.y_type = Element::kFloat32;
  a.bias = p.bias.data();
  cpu::gemm(kernels, a, serially);
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    volatile float expected = float(p.sums[i]);
    expected = expected * p.x_scale[i / p.n];
    expected = expected * p.weight_scale[i % p.n];
    expected = expected + p.bias[i % p.n];
    expect_equal(y[i], float(expected), "result", where, i);
  }
  for (Element type : {Element::kBFloat16, Element::kFloat16}) {
    std::vector<uint16_t> halves(p.m * p.n);
    a.y = halves.data();
    a.y_type = type;
    cpu::gemm(kernels, a, serially);
  }
}

void test_quantize(cpu::Kernels const& kernels, int64_t k) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Random random{uint32_t(k)};
  std::vector<std::vector<float>> rows(6, std::vector<float>(k));
  for (float& value : rows[0])
    value = float(int(random(2001)) - 1000) * 0.37f;
  for (float& value : rows[1])
    value = float(int(random(2001)) - 1000) * 1e-44f;
  rows[2][k / 2] = kInfinity;
  rows[3][k - 1] = std::nanf("");
  rows[5].assign(k, 190 * 0x1p-149f);
  for (std::vector<float> const& row : rows) {
    std::vector<int8_t> out(k, 99);
    const float scale = kernels.quantize(row.data(), Element::kFloat32, k, out.data());
    float most = 0;
    for (float value : row)
      most = std::isnan(value) || std::isnan(most) ? NAN : std::fmax(most, std::fabs(value));
    const float expected = std::isfinite(most) ? most / 127.f : NAN;
    expect_equal(scale, expected, "scale", kernels.name, k);
    for (int64_t i = 0; i < k; ++i) {
      float q = expected > 0.f ? std::nearbyint(row[i] / expected) : 0.f;
      q = std::fmin(std::fmax(q, -127.f), 127.f);
      expect_equal(int(out[i]), int(q), "quantized", kernels.name, i);
    }
  }
  for (Element type : {Element::kBFloat16, Element::kFloat16}) {
    const std::vector<uint16_t> ones(k, type == Element::kBFloat16 ? 0x3f80 : 0x3c00);
    std::vector<int8_t> out(k);
    expect_equal(kernels.quantize(ones.data(), type, k, out.data()), 1.f / 127.f, "scale of ones",
                 kernels.name, k);
    for (int64_t i = 0; i < k; ++i)
      expect_equal(int(out[i]), 127, "quantized one", kernels.name, i);
  }
}

// All sets against the last one, which is portable.
void test_search(cpu::Kernels const& kernels,
                 cpu::Kernels const& portable,
                 int64_t span,
                 int64_t rows,
                 int64_t groups,
                 bool weighted,
                 int largest_code) {
  Random random{uint32_t(span + rows)};
  const int64_t columns = rows * groups;
  std::vector<float> units(span * columns), weight(span * columns);
  for (size_t i = 0; i < units.size(); ++i) {
    units[i] = float(int(random(20001)) - 10000) * 0.0119f;
    weight[i] = float(random(100)) * 0.01f;
  }
  struct Result {
    std::vector<float> s, z, q, refit;
  };
  const auto run = [&](cpu::Kernels const& set) {
    Result result;
    for (auto* vector : {&result.s, &result.z})
      vector->resize(columns);
    result.q.resize(span * columns);
    result.refit.resize(rows);
    const int64_t bytes = cpu::search_scratch(span, columns);
    std::unique_ptr<char[]> memory(new char[bytes + 63]);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.get());
    set.search({units.data(), weighted ? weight.data() : nullptr, span, columns, rows,
                result.s.data(), result.z.data(), result.q.data(), result.refit.data(),
                reinterpret_cast<void*>((begin + 63) / 64 * 64), largest_code});
    return result;
  };
  const Result got = run(kernels), expected = run(portable);
  const auto compare = [&](std::vector<float> const& a, std::vector<float> const& b,
                           char const* what) {
    for (size_t i = 0; i < a.size(); ++i)
      expect_equal(a[i], b[i], what, kernels.name, i);
  };
  compare(got.s, expected.s, "s");
  compare(got.z, expected.z, "z");
  compare(got.q, expected.q, "q");
  compare(got.refit, expected.refit, "refit");
}

}  // namespace

int main() {
  int count;
  cpu::Kernels const* const* const sets = cpu::supported_kernels(&count);
  std::vector<Problem> problems;
  uint32_t seed = 1;
  for (int64_t m : {1, 2, 5, 8, 9, 16, 17, 33, 50}) {
    for (auto [n, k] : {std::pair<int, int>{1, 1}, {16, 64}, {70, 100}, {130, 577}, {33, 700}}) {
      for (FormatId format : kFormats)
        problems.emplace_back(m, n, k, seed % 2, seed, format);
      ++seed;
    }
  }
  for (FormatId format : kFormats)
    problems.emplace_back(300, 17, 4200, true, 7, format);  // in several rounds
  for (int i = 0; i < count; ++i) {
    for (Problem const& problem : problems)
      test_gemm(*sets[i], problem);
    for (int64_t k : {1, 15, 64, 1000})
      test_quantize(*sets[i], k);
    for (bool weighted : {false, true}) {
      for (int largest : {cpu::kLargestCode, cpu::kLargestCode6}) {
        test_search(*sets[i], *sets[count - 1], 64, 3, 9, weighted, largest);
        test_search(*sets[i], *sets[count - 1], 1, 1, 1, weighted, largest);
        test_search(*sets[i], *sets[count - 1], 77, 5, 1, weighted, largest);
      }
    }
    std::printf("%s: %s\n", sets[i]->name, failures ? "FAILED" : "ok");
  }
  return failures != 0;
}
