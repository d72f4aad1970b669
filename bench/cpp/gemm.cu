// Question: how fast is the library's GEMM, called through its C++ API with no torch in sight?
//
// What counts: one launch of liquidgemm::gemm with the plan that the library selects, bf16 out.
// Launches rotate over copies of the weight that add up to at least 3x the L2 cache; activations,
// scales and output stay where the launch before left them. Medians over replays of a CUDA graph,
// per launch; what a launch does in the shadow of the one before it counts.
//   weights_TBps  packed weights (4.25 bits each) per second, 1e12 bytes
//   tops          2 M N K / time, 1e12 operations per second
//
// Checked: the INT32 sums of the same plan at min(M, 64) tokens, bit by bit, against one thread per
// sum.
//
// Build: CMakeLists.txt beside this file, with the target of csrc/CMakeLists.txt.
// Run:   gemm 4096x4096 28672x4096 ...
#include "liquidgemm/gemm.hpp"

#include "harness.hpp"
#include "liquidgemm/device.hpp"
#include "liquidgemm/plan/select.hpp"
#include "weights.hpp"

namespace {

using namespace liquidgemm;
using bench::check;
using bench::require;

constexpr int64_t kTokens[] = {1, 16, 64, 128, 256, 1024, 4096};
constexpr int64_t kMostTokens = 4096;
constexpr int kCheckedTokens = 64;

class Benchmark {
 public:
  Benchmark(bench::Shape shape, cudaDeviceProp const& gpu)
      : n_(shape.n),
        k_(shape.k),
        num_sms_(gpu.multiProcessorCount),
        memory_bytes_per_us_(memory_bandwidth()),
        weight_bytes_(ceil_div(n_, kBlockRows) * (k_ / kBlockK) * LiquidQuant::kBlockBytes),
        copies_(bench::cold_copies(weight_bytes_, gpu)),
        weights_(copies_ * weight_bytes_),
        x_(kMostTokens * k_),
        x_scale_(std::vector<float>(kMostTokens, 0.01f)),
        weight_scale_(std::vector<float>(n_, 0.02f)),
        y_(kMostTokens * n_) {
    require(k_ % kBlockK == 0, "K has to be a multiple of " + std::to_string(kBlockK));
    bench::fill_weights(weights_.data(), copies_ * weight_bytes_, stream_);
    bench::fill_tokens_kernel<<<1024, 256, 0, stream_>>>(x_.data(), x_.size());
    // A product asks for weights before it waits for whatever writes them.
    stream_.synchronize("random data");
  }

  void run(int64_t m) const {
    const LaunchPlan plan = plan_gemm({m, n_, k_, num_sms_, memory_bytes_per_us_});
    verify(plan.plan, static_cast<int>(std::min<int64_t>(m, kCheckedTokens)));
    const double us = bench::graph_us(stream_, copies_, m > 256 ? 8 : 48, [&](int copy) {
      enqueue(arguments(copy, y_.data(), Element::kBFloat16), plan);
    });
    std::printf("%" PRId64 "\t%" PRId64 "\t%" PRId64 "\t%s\t%.3f\t%.3f\t%.1f\n", n_, k_, m,
                name(plan.plan).c_str(), us, weight_bytes_ / us / 1e6, 2e-6 * m * n_ * k_ / us);
    std::fflush(stdout);
  }

 private:
  static double memory_bandwidth() {
    DeviceInfo info;
    check(query_device(info), "query_device");
    return info.memory_bytes_per_us;
  }

  GemmArguments arguments(int copy, void* y, Element y_type) const {
    GemmArguments a{};
    a.x = x_.data();
    a.x_type = Element::kInt8;
    a.x_stride = k_;
    a.x_scale = x_scale_.data();
    a.weight = weights_.data() + copy * weight_bytes_;
    a.weight_scale = weight_scale_.data();
    a.y = y;
    a.y_stride = n_;
    a.y_type = y_type;
    return a;
  }

  void enqueue(GemmArguments const& a, LaunchPlan const& plan) const {
    check(gemm(a, plan, stream_), "gemm");
  }

  void verify(Plan const& plan, int m) const {
    bench::DeviceArray<int32_t> sums(m * n_), expected(m * n_);
    enqueue(arguments(copies_ - 1, sums.data(), Element::kInt32),
            complete({m, n_, k_, num_sms_, memory_bytes_per_us_}, plan, Activations::kReady));
    bench::reference(weights_.data() + (copies_ - 1) * weight_bytes_, x_.data(), m,
                     static_cast<int>(n_), static_cast<int>(k_), expected.data(), stream_);
    stream_.synchronize("verification");
    const auto got = sums.to_host(), want = expected.to_host();
    for (size_t i = 0; i < got.size(); ++i) {
      require(got[i] == want[i], "token " + std::to_string(i / n_) + ", channel " +
                                     std::to_string(i % n_) + ": expected " +
                                     std::to_string(want[i]) + ", got " + std::to_string(got[i]));
    }
  }

  int64_t n_, k_;
  int num_sms_;
  double memory_bytes_per_us_;
  int64_t weight_bytes_;
  int copies_;
  bench::Stream stream_;
  bench::DeviceArray<uint8_t> weights_;
  bench::DeviceArray<int8_t> x_;
  bench::DeviceArray<float> x_scale_, weight_scale_;
  bench::DeviceArray<uint16_t> y_;
};

}  // namespace

int main(int argc, char** argv) {
  return bench::run("gemm", [&] {
    require(argc > 1, "usage: gemm NxK ...");
    const cudaDeviceProp gpu = bench::hopper();
    std::printf("# %s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
    std::printf("N\tK\tM\tplan\tus\tweights_TBps\ttops\n");
    for (int i = 1; i < argc; ++i) {
      const Benchmark benchmark(bench::parse_shape(argv[i]), gpu);
      for (int64_t m : kTokens)
        benchmark.run(m);
    }
  });
}
