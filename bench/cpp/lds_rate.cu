// Question: how fast can warps read packed weights from shared memory, and does the packed layout
// pass without bank conflicts?
//
// What counts: 8 warp-groups per SM each read blocks of 64 x 64 weights (2048 bytes of codes, 128
// bytes of parameters) into registers in operand order. Shared memory delivers at most 128 bytes
// per clock.
//   codes      one LDS.128 per thread and block
//   packed     the same and one LDS.32 for the parameters, as the library reads a block
//   row_major  the codes of a row-major [64, 32]-byte block, for contrast: eight LDS.U16 per thread
//   expand     two ldmatrix.s8.s4 per thread and block, which expand codes to signed bytes on the
//              way; only if this was compiled by nvcc 13.4 or later
//   clk            SM clocks per block
//   bytes_per_clk  useful bytes per SM clock
//   pct            of 128
//
// Checked: the sums of all words that were read, against the host's.
//
// Build: nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -cudart=static -DNDEBUG
//             --expt-relaxed-constexpr -Icsrc -I$CUTLASS/include -o lds_rate bench/cpp/lds_rate.cu
// Run:   lds_rate
#include "harness.hpp"
#include "liquidgemm/formats/liquidquant.hpp"

namespace {

using namespace liquidgemm;
using bench::check;
using bench::require;

enum class Pattern { kCodes, kPacked, kRowMajor, kExpand };
constexpr char const* kNames[] = {"codes", "packed", "row_major", "expand"};
#define CAN_EXPAND (__CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1304)

constexpr int kGroups = 8;
constexpr int kThreads = kGroups * kWarpGroupThreads;
constexpr int kUnroll = 4;  // blocks per iteration
constexpr int kBlocks = 8;  // per warp-group
constexpr int kSharedBytes = kGroups * kBlocks * LiquidQuant::kBlockBytes;
constexpr int kRowBytes = kBlockK / 2;

// Two 4-bit codes of a byte as signed bytes, in the low half.
__host__ __device__ uint32_t expand(uint8_t codes) {
  const uint32_t low = (codes & 15 ^ 8) - 8, high = (codes >> 4 ^ 8) - 8;
  return (low & 0xff) | (high & 0xff) << 8;
}

// What a thread adds up of one block: its reads, in the order of the registers.
template <Pattern kPattern>
__host__ __device__ uint32_t read_block(uint8_t const* block, int thread) {
  uint32_t sum = 0;
  if constexpr (kPattern == Pattern::kExpand) {
    // A warp's part is 512 bytes: two times four matrices of 8 rows of 8 bytes.
    uint8_t const* const from = block + thread / 32 * 512;
    const int lane = thread % 32;
#ifdef __CUDA_ARCH__
#if CAN_EXPAND
    for (int half = 0; half < 2; ++half) {
      uint32_t r[4];
      asm volatile(
          "ldmatrix.sync.aligned.m8n16.x4.shared.s8.s4 {%0, %1, %2, %3}, [%4];"
          : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
          : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from + half * 256 + lane * 8))));
      sum += r[0] + r[1] + r[2] + r[3];
    }
#endif
#else
    for (int matrix = 0; matrix < 8; ++matrix) {
      uint8_t const* const pair = from + matrix * 64 + lane / 4 * 8 + lane % 4 * 2;
      sum += expand(pair[0]) | expand(pair[1]) << 16;
    }
#endif
  } else if constexpr (kPattern == Pattern::kRowMajor) {
    const int row = thread / 32 * 16 + thread % 32 / 4;
    for (int r = 0; r < 8; ++r) {
      const int byte = (row + r % 2 * 8) * kRowBytes + r / 2 * 8 + thread % 4 * 2;
      sum += *reinterpret_cast<uint16_t const*>(block + byte);
    }
  } else {
    const uint4 codes = reinterpret_cast<uint4 const*>(block)[thread];
    sum = codes.x + codes.y + codes.z + codes.w;
    if constexpr (kPattern == Pattern::kPacked)
      sum += reinterpret_cast<uint32_t const*>(
          block + LiquidQuant::kCodeBytes)[LiquidQuant::param_word(thread)];
  }
  return sum;
}

// first_byte moves on by a run-time `stride`, modulo the warp-group's blocks: no read can be left
// out.
template <Pattern kPattern>
__global__ void __launch_bounds__(kThreads, 1) lds_kernel(
    uint8_t const* packed, int iterations, uint32_t stride, uint32_t* out, long long* clocks) {
  extern __shared__ __align__(16) uint8_t shared_bytes[];
  for (int i = threadIdx.x; i < kSharedBytes; i += kThreads)
    shared_bytes[i] = packed[i];
  uint8_t const* const mine =
      shared_bytes + threadIdx.x / kWarpGroupThreads * kBlocks * LiquidQuant::kBlockBytes;
  const int thread = threadIdx.x % kWarpGroupThreads;
  uint32_t sum = 0, first_byte = 0;
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int block = 0; block < kUnroll; ++block)
      sum += read_block<kPattern>(mine + first_byte + block * LiquidQuant::kBlockBytes, thread);
    first_byte = first_byte == 0 ? stride : 0;
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0)
      *clocks = clock64() - start;
    out[threadIdx.x] = sum;
  }
}

struct Benchmark {
  int num_sms;
  std::vector<uint8_t> host = std::vector<uint8_t>(kSharedBytes);
  bench::Stream stream;
  bench::DeviceArray<uint8_t> packed{kSharedBytes};
  bench::DeviceArray<uint32_t> out{kThreads};
  bench::DeviceArray<long long> clocks{1};

  explicit Benchmark(int sms) : num_sms(sms) {
    for (int i = 0; i < kSharedBytes; ++i)
      host[i] = static_cast<uint8_t>(bench::random_word(i));
    check(cudaMemcpy(packed.data(), host.data(), kSharedBytes, cudaMemcpyHostToDevice), "packed");
  }

  template <Pattern kPattern>
  double clocks_of(int iterations) {
    bench::launch(lds_kernel<kPattern>, num_sms, kThreads, kSharedBytes, stream, false,
                  packed.data(), iterations, uint32_t(kUnroll * LiquidQuant::kBlockBytes),
                  out.data(), clocks.data());
    stream.synchronize(kNames[int(kPattern)]);
    return double(clocks.to_host()[0]);
  }

  template <Pattern kPattern>
  void run() {
    bench::allow_shared_bytes(lds_kernel<kPattern>, kSharedBytes);
    constexpr int kIterations = 2 * 3;  // three times around
    clocks_of<kPattern>(kIterations);
    const auto got = out.to_host();
    for (int thread = 0; thread < kThreads; ++thread) {
      uint32_t expected = 0;
      for (int block = 0; block < kBlocks; ++block) {
        uint8_t const* const from =
            &host[(thread / kWarpGroupThreads * kBlocks + block) * LiquidQuant::kBlockBytes];
        expected += 3 * read_block<kPattern>(from, thread % kWarpGroupThreads);
      }
      require(got[thread] == expected, std::string(kNames[int(kPattern)]) + ", thread " +
                                           std::to_string(thread) + ": expected " +
                                           std::to_string(expected) + ", got " +
                                           std::to_string(got[thread]));
    }
    constexpr int kLong = 20000;
    std::vector<double> clk;
    for (int i = 0; i < 7; ++i)
      clk.push_back(clocks_of<kPattern>(kLong) / (double(kLong) * kUnroll * kGroups));
    const double bytes =
        kPattern == Pattern::kPacked ? LiquidQuant::kBlockBytes : LiquidQuant::kCodeBytes;
    const double rate = bytes / bench::median(clk);
    std::printf("%s\t%.2f\t%.1f\t%.1f\n", kNames[int(kPattern)], bench::median(clk), rate,
                rate / 1.28);
    std::fflush(stdout);
  }
};

}  // namespace

int main() {
  return bench::run("lds_rate", [] {
    const cudaDeviceProp gpu = bench::hopper();
    std::printf("# %s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
    std::printf("pattern\tclk\tbytes_per_clk\tpct\n");
    Benchmark benchmark(gpu.multiProcessorCount);
    benchmark.run<Pattern::kCodes>();
    benchmark.run<Pattern::kPacked>();
    benchmark.run<Pattern::kRowMajor>();
#if CAN_EXPAND
    benchmark.run<Pattern::kExpand>();
#endif
  });
}
