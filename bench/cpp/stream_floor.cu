// Question: how fast can this GPU pull the packed bytes of a weight into shared memory, with
// nothing else to do? No W4A8 GEMM that reads its weight once can be faster, so this is the floor
// that the library's times are divided by.
//
// What counts: ceil(N/64) * ceil(K/64) * 2176 bytes (4.25 bits per weight), split evenly over one
// CTA per SM, each pulling its share with 1-D bulk copies (cp.async.bulk) into a ring of about 200
// KB of shared memory. Activations, arithmetic and output are not counted. The L2 cache is cold:
// launches rotate over copies that add up to at least 3x its size. Times are medians over replays
// of a CUDA graph, per launch:
//   single  one ordinary launch after the other
//   pdl     programmatic dependent launches: a CTA asks for a first ring of bytes before it waits
//           for the kernel before it, as the GEMM does. The limit of a stream of GEMMs.
// TB/s are 1e12 packed bytes per second.
//
// Checked: a variant of the kernel that also adds up the words it was given must find the checksum
// of every copy; the timed kernel counts the bytes that its barriers waited for.
//
// Build: nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -cudart=static
//             -o stream_floor bench/cpp/stream_floor.cu   (or CMakeLists.txt beside this file)
// Run:   stream_floor 4096x4096 28672x4096 ...            (NxK; tab-separated lines on stdout)
#include "harness.hpp"

namespace {

using bench::check;
using bench::require;

constexpr int64_t kPanelRows = 64;
constexpr int64_t kBlockColumns = 64;
constexpr int64_t kBlockBytes = 2176;  // 64 x 64 weights of 4 bits, and 64 (scale, offset) pairs

constexpr int64_t kLine = 128;  // the unit in which a weight is divided among CTAs
constexpr int kStageBytes = 4 * kBlockBytes;
constexpr int kStages = 23;
constexpr int kThreads = 32;

constexpr int kLaunchesPerGraph = 48;  // at least; rounded up to whole rotations

struct alignas(128) Ring {
  uint8_t bytes[kStages][kStageBytes];
  uint64_t full[kStages];
};

__device__ uint32_t shared_address(void const* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
}

__device__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ void bulk_copy(void* target, uint8_t const* source, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ bool phase_is_over(uint64_t* barrier, uint32_t phase) {
  uint32_t over;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(over)
      : "r"(shared_address(barrier)), "r"(phase)
      : "memory");
  return over != 0;
}

// Both do nothing in an ordinary launch.
__device__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// One warp per CTA: lane 0 requests and waits; the other lanes only help to add up (kAddUp).
// counters[blockIdx.x] grows by the bytes requested, all of which have landed when the kernel ends,
// for a barrier's phase is over only when all of its bytes are there.
template <bool kAddUp>
__global__ void __launch_bounds__(kThreads, 1) copy_kernel(uint8_t const* weight,
                                                           int64_t bytes,
                                                           unsigned long long* counters,
                                                           unsigned long long* checksum) {
  extern __shared__ uint8_t shared_bytes[];
  auto& ring = *reinterpret_cast<Ring*>(shared_bytes);

  const int64_t lines = bytes / kLine;
  const int64_t begin = lines * blockIdx.x / gridDim.x * kLine;
  const int64_t end = lines * (blockIdx.x + 1) / gridDim.x * kLine;
  const int stages = static_cast<int>((end - begin + kStageBytes - 1) / kStageBytes);
  const bool leader = threadIdx.x == 0;

  auto stage_bytes = [&](int stage) {
    const int64_t left = end - begin - int64_t(stage) * kStageBytes;
    return static_cast<uint32_t>(left < kStageBytes ? left : kStageBytes);
  };
  auto request = [&](int stage) {
    const int slot = stage % kStages;
    expect_bytes(&ring.full[slot], stage_bytes(stage));
    bulk_copy(ring.bytes[slot], weight + begin + int64_t(stage) * kStageBytes, stage_bytes(stage),
              &ring.full[slot]);
  };

  if (leader) {
    for (int slot = 0; slot < kStages; ++slot)
      init_barrier(&ring.full[slot]);
    fence_barrier_init();
    for (int stage = 0; stage < min(stages, kStages); ++stage)
      request(stage);
  }
  __syncwarp();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (leader)
    atomicAdd(&counters[blockIdx.x], static_cast<unsigned long long>(end - begin));

  unsigned long long sum = 0;
  if (leader || kAddUp) {
    for (int stage = 0; stage < stages; ++stage) {
      const int slot = stage % kStages;
      while (!phase_is_over(&ring.full[slot], stage / kStages % 2)) {
      }
      if constexpr (kAddUp) {
        auto const* words = reinterpret_cast<uint32_t const*>(ring.bytes[slot]);
        for (uint32_t i = threadIdx.x; i < stage_bytes(stage) / 4; i += kThreads)
          sum += words[i];
        __syncwarp();
      }
      if (leader && stage + kStages < stages)
        request(stage + kStages);
    }
  }
  if constexpr (kAddUp)
    atomicAdd(checksum, sum);
}

__global__ void fill_kernel(uint32_t* words, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x)
    words[i] = bench::random_word(i);
}

__global__ void checksum_kernel(uint32_t const* words,
                                int64_t count,
                                unsigned long long* checksum) {
  unsigned long long sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    sum += words[i];
  }
  atomicAdd(checksum, sum);
}

int64_t packed_bytes(bench::Shape shape) {
  return (shape.n + kPanelRows - 1) / kPanelRows * ((shape.k + kBlockColumns - 1) / kBlockColumns) *
         kBlockBytes;
}

class StreamFloor {
 public:
  StreamFloor(bench::Shape shape, cudaDeviceProp const& gpu)
      : num_sms_(gpu.multiProcessorCount),
        bytes_(packed_bytes(shape)),
        copies_(bench::cold_copies(bytes_, gpu)),
        weights_(copies_ * bytes_),
        counters_(num_sms_) {
    fill_kernel<<<num_sms_ * 8, 256, 0, stream_>>>(reinterpret_cast<uint32_t*>(weights_.data()),
                                                   copies_ * bytes_ / 4);
    check(cudaGetLastError(), "fill");
    // A programmatic launch asks for bytes before it waits for whatever writes them.
    stream_.synchronize("fill");
  }

  void verify() const {
    bench::DeviceArray<unsigned long long> sums(2);
    for (int copy = 0; copy < copies_; ++copy)
      launch<true>(true, copy, sums.data());
    checksum_kernel<<<num_sms_ * 8, 256, 0, stream_>>>(
        reinterpret_cast<uint32_t const*>(weights_.data()), copies_ * bytes_ / 4, sums.data() + 1);
    check(cudaGetLastError(), "checksum");
    stream_.synchronize("verification");
    const auto host = sums.to_host();
    require(host[0] == host[1], "wrong checksum: the copies brought " + std::to_string(host[0]) +
                                    ", memory holds " + std::to_string(host[1]));
  }

  // Median µs per launch.
  double time(bool programmatic) const {
    const uint64_t counted = bytes_landed();
    uint64_t launches = 0;
    const double us = bench::graph_us(stream_, copies_, kLaunchesPerGraph, [&](int copy) {
      launch<false>(programmatic, copy, nullptr);
      ++launches;
    });
    const uint64_t landed = bytes_landed() - counted;
    const uint64_t expected = uint64_t(bytes_) * launches * (bench::kReplays + 2);
    require(landed == expected, "expected " + std::to_string(expected) + " bytes to land, got " +
                                    std::to_string(landed));
    return us;
  }

 private:
  template <bool kAddUp>
  void launch(bool programmatic, int copy, unsigned long long* checksum) const {
    bench::launch(copy_kernel<kAddUp>, num_sms_, kThreads, sizeof(Ring), stream_, programmatic,
                  weights_.data() + copy * bytes_, bytes_, counters_.data(), checksum);
  }

  uint64_t bytes_landed() const {
    stream_.synchronize("copies");
    uint64_t total = 0;
    for (unsigned long long count : counters_.to_host())
      total += count;
    return total;
  }

  int num_sms_;
  bench::Stream stream_;
  int64_t bytes_;
  int copies_;
  bench::DeviceArray<uint8_t> weights_;
  bench::DeviceArray<unsigned long long> counters_;
};

}  // namespace

int main(int argc, char** argv) {
  return bench::run("stream_floor", [&] {
    require(argc > 1, "usage: stream_floor NxK ...");
    std::vector<bench::Shape> shapes;
    for (int i = 1; i < argc; ++i)
      shapes.push_back(bench::parse_shape(argv[i]));
    const cudaDeviceProp gpu = bench::hopper();
    bench::allow_shared_bytes(copy_kernel<false>, sizeof(Ring));
    bench::allow_shared_bytes(copy_kernel<true>, sizeof(Ring));
    std::printf("# %s, %d SMs, ring of %d x %d bytes per SM\n", gpu.name, gpu.multiProcessorCount,
                kStages, kStageBytes);
    std::printf("N\tK\tbytes\tsingle_us\tpdl_us\tsingle_TBps\tpdl_TBps\n");
    for (bench::Shape shape : shapes) {
      const StreamFloor floor(shape, gpu);
      floor.verify();
      const double single = floor.time(false);
      const double pdl = floor.time(true);
      const double mega = packed_bytes(shape) / 1e6;  // bytes per µs are TB/s
      std::printf("%" PRId64 "\t%" PRId64 "\t%" PRId64 "\t%.3f\t%.3f\t%.3f\t%.3f\n", shape.n,
                  shape.k, packed_bytes(shape), single, pdl, mega / single, mega / pdl);
      std::fflush(stdout);
    }
  });
}
