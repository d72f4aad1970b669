// Question: would 4-bit activations (W4A4) be faster on Hopper? WGMMA knows no 4-bit integers, so
// they would need the older mma.sync, which knows them.
//
// What counts: every warp of an SM issues mma.sync on operands in registers, with nothing else to
// do, into kChains independent accumulators; operations are two per multiply-add.
//   s4   m16n8k64 of 4-bit integers
//   s8   m16n8k32 of 8-bit integers
// `mma_rate` has the rate of INT8 WGMMA to compare with: operand "shared", 256 tokens.
//   warps      of an SM
//   tops       1e12 operations per second on all SMs, at whatever the clock was
//   ops_clk    operations per clock and SM; INT8 WGMMA: 8192
//
// Checked: all sums of a short run against plain loops on the host.
//
// Build: nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -cudart=static -DNDEBUG
//             -o mma_int4 bench/cpp/mma_int4.cu
// Run:   mma_int4
#include "harness.hpp"

namespace {

using bench::check;
using bench::require;

constexpr int kChains = 8;
constexpr int kWarp = 32;
constexpr int kRows = 16, kColumns = 8;

// Elements of a register: K of one mma is eight times as many.
template <int kBits>
constexpr int kElements = 32 / kBits;
template <int kBits>
constexpr int kK = 8 * kElements<kBits>;

template <int kBits>
__device__ void mma(int32_t (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  if constexpr (kBits == 4) {
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Register of operand A of a lane, and of operand B of a chain and a lane.
__host__ __device__ uint32_t word_a(int index, int lane) {
  return bench::random_word(index * kWarp + lane);
}
__host__ __device__ uint32_t word_b(int chain, int index, int lane) {
  return bench::random_word((4 + 2 * chain + index) * kWarp + lane);
}

// out [chain][lane][4] of warp 0 of CTA 0.
template <int kBits>
__global__ void rate_kernel(int iterations, int32_t* out, long long* clocks) {
  const int lane = threadIdx.x % kWarp;
  uint32_t a[4], b[kChains][2];
  int32_t c[kChains][4] = {};
  for (int i = 0; i < 4; ++i)
    a[i] = word_a(i, lane);
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain)
    for (int i = 0; i < 2; ++i)
      b[chain][i] = word_b(chain, i, lane);
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain)
      mma<kBits>(c[chain], a, b[chain]);
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *clocks = clock64() - start;
  // Every warp writes, so that the work of none can be left out; those of warp 0 are read.
  int32_t* const to = out + int64_t(blockIdx.x * blockDim.x + threadIdx.x) * kChains * 4;
#pragma unroll
  for (int chain = 0; chain < kChains; ++chain)
    for (int i = 0; i < 4; ++i)
      to[chain * 4 + i] = c[chain][i];
}

template <int kBits>
int element(uint32_t word, int i) {
  const int shift = 32 - kBits * (i + 1);
  return int32_t(word << shift) >> (32 - kBits);
}

struct Benchmark {
  static constexpr int kMaxWarps = 16;
  int num_sms;
  bench::Stream stream{};
  bench::DeviceArray<int32_t> out{int64_t(num_sms) * kMaxWarps * kWarp * kChains * 4};
  bench::DeviceArray<long long> clocks{1};

  template <int kBits>
  double enqueue(int warps, int iterations) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    check(cudaEventRecord(begin, stream), "event");
    bench::launch(rate_kernel<kBits>, num_sms, warps * kWarp, 0, stream, false, iterations,
                  out.data(), clocks.data());
    check(cudaEventRecord(end, stream), "event");
    check(cudaEventSynchronize(end), "mma");
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    check(cudaEventDestroy(begin), "event");
    check(cudaEventDestroy(end), "event");
    return milliseconds * 1e3;
  }

  template <int kBits>
  void verify(int warps) {
    constexpr int kIterations = 3;
    check(cudaMemsetAsync(out.data(), 0xa5, out.size() * 4, stream), "poison");
    enqueue<kBits>(warps, kIterations);
    const auto got = out.to_host();
    for (int chain = 0; chain < kChains; ++chain) {
      for (int row = 0; row < kRows; ++row) {
        for (int column = 0; column < kColumns; ++column) {
          int32_t sum = 0;
          for (int k = 0; k < kK<kBits>; ++k) {
            constexpr int e = kElements<kBits>;
            const int quad = k / e % 4, half = k / (4 * e);
            const uint32_t a = word_a(row / 8 + 2 * half, 4 * (row % 8) + quad);
            const uint32_t b = word_b(chain, half, 4 * column + quad);
            sum += element<kBits>(a, k % e) * element<kBits>(b, k % e);
          }
          const int lane = 4 * (row % 8) + column / 2;
          for (int warp : {0, warps * num_sms - 1}) {
            const int64_t thread = int64_t(warp) * kWarp + lane;
            const int32_t found = got[(thread * kChains + chain) * 4 + 2 * (row / 8) + column % 2];
            require(found == kIterations * sum,
                    std::to_string(kBits) + " bits, row " + std::to_string(row) + ", column " +
                        std::to_string(column) + ": expected " + std::to_string(kIterations * sum) +
                        ", got " + std::to_string(found));
          }
        }
      }
    }
  }

  template <int kBits>
  void run(int warps) {
    verify<kBits>(warps);
    const int iterations = static_cast<int>(1e3 / enqueue<kBits>(warps, 1000) * 1000) + 1;
    std::vector<double> us, clk;
    for (int i = 0; i < 7; ++i) {
      us.push_back(enqueue<kBits>(warps, iterations));
      clk.push_back(clocks.to_host()[0]);
    }
    const double operations =
        2.0 * kRows * kColumns * kK<kBits> * kChains * iterations * warps;  // of an SM
    std::printf("s%d\t%d\t%.1f\t%.0f\n", kBits, warps,
                operations * num_sms / bench::median(us) / 1e6, operations / bench::median(clk));
    std::fflush(stdout);
  }
};

}  // namespace

int main() {
  return bench::run("mma_int4", [] {
    const cudaDeviceProp gpu = bench::hopper();
    std::printf("# %s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
    std::printf("operand\twarps\ttops\tops_clk\n");
    Benchmark benchmark{gpu.multiProcessorCount};
    for (int warps : {4, 8, 16}) {
      benchmark.run<4>(warps);
      benchmark.run<8>(warps);
    }
  });
}
