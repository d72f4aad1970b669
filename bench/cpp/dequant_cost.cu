// Question: what does it cost to turn 4-bit codes into INT8 operands, in SM clocks, with nothing
// else to do? An SM that streams the weights of a GPU with 132 SMs at 3.3 TB/s gets one block of
// 64 x 64 weights every 150 clocks or so.
//
// What counts: 8 warp-groups per SM decode in registers; one block is 16 bytes of codes and one
// word of parameters per thread of a warp-group, which become 8 registers. Per four weights:
//   none       nothing: only what the loop itself takes, which is subtracted from the others
//   u8         and, multiply-add: q * s + a as unsigned bytes
//   s8         and, multiply-add, exclusive or: the library's own (LiquidQuant)
//   s8_signed  as s8, for codes that the load has expanded to signed bytes (ldmatrix s8.s4): one
//              and-xor instead of shift and and
//   qserve     and, multiply, byte-wise add (__vadd4, which is emulated): the two-level scheme of
//              QServe (arXiv 2405.04532)
//   g32        as s8, with steps and offsets of their own for each half of the columns (groups of
//              32): 4 PRMT more per block
//   planes6    as s8, with two more bits per code in a plane of its own: (4 q + p) * s + a
//   table      codes select bytes of a table of 16: per eight weights 6 PRMT, of which the last
//              chooses between the halves of the table; nothing else
//   table_s8   then the multiply-add and exclusive or of s8
// Every scheme but the first also unpacks the parameters (4 PRMT per block). A step ends with 4
// PRMT that make the next step's codes of its results, so that nothing can be left out.
//   clk           SM clocks per block
//   net_clk       the same less that of "none"
//   weights_TBps  packed weights (2176 bytes per block) that all SMs would get through, by clk
//
// Checked: the codes after a few steps, against the same steps byte by byte on the host.
//
// Build: nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -cudart=static -DNDEBUG
//             --expt-relaxed-constexpr -Icsrc -I$CUTLASS/include -o dequant_cost
//             bench/cpp/dequant_cost.cu
// Run:   dequant_cost
#include "harness.hpp"
#include "liquidgemm/formats/liquidquant.hpp"

namespace {

using namespace liquidgemm;
using bench::check;
using bench::require;

enum class Scheme {
  kNone,
  kUnsigned,
  kSigned,
  kSignedCodes,
  kQServe,
  kGroups32,
  kPlanes6,
  kTable,
  kTableSigned,
};
constexpr char const* kNames[] = {"none", "u8",      "s8",    "s8_signed", "qserve",
                                  "g32",  "planes6", "table", "table_s8"};
constexpr bool has_table(Scheme scheme) {
  return scheme == Scheme::kTable || scheme == Scheme::kTableSigned;
}

constexpr int kThreads = 8 * kWarpGroupThreads;
constexpr int kUnroll = 4;
constexpr uint32_t kSelector = 0x7250;  // bytes 0 and 2 of one operand, 1 and 3 of the other
constexpr uint32_t kLow = 0x0f0f0f0fu;

// Four weights of one row: `codes` in the low nibbles.
template <Scheme kScheme>
__device__ uint32_t decode(uint32_t codes, uint32_t step, uint32_t offsets) {
  if constexpr (kScheme == Scheme::kUnsigned)
    return codes * step + offsets;
  else if constexpr (kScheme == Scheme::kQServe)
    return __vadd4(codes * step, offsets);
  else
    return LiquidQuant::decode4(codes, step, offsets);
}

// Four weights by the codes in the low half of a word, and four by those in the high half: bits 0
// to 2 of a code select in either half of the table, bit 3 chooses between the two.
__device__ void look_up(uint4 table, uint32_t codes, uint32_t& low, uint32_t& high) {
  const uint32_t within = codes & 0x77777777u;
  const uint32_t halves = (codes >> 1 & 0x44444444u) | 0x32103210u;
  auto four = [&](uint32_t selector, uint32_t half) {
    return __byte_perm(__byte_perm(table.x, table.y, selector),
                       __byte_perm(table.z, table.w, selector), half);
  };
  low = four(within, halves);
  high = four(within >> 16, halves >> 16);
}

template <Scheme kScheme>
__global__ void __launch_bounds__(kThreads, 1) dequant_kernel(uint4 codes,
                                                              uint32_t params,
                                                              uint4 table,
                                                              uint32_t selector,
                                                              int iterations,
                                                              uint4* out,
                                                              long long* clocks) {
  uint32_t words[4] = {codes.x + threadIdx.x, codes.y + threadIdx.x, codes.z + threadIdx.x,
                       codes.w + threadIdx.x};
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int step = 0; step < kUnroll; ++step) {
      // Of the codes, so that it is new in every step.
      const uint32_t block_params =
          kScheme == Scheme::kNone ? 0 : params ^ (words[0] & 0x01000100u);
      const uint32_t steps[2] = {__byte_perm(block_params, 0, 0x4440),
                                 __byte_perm(block_params, 0, 0x4442)};
      const uint32_t offsets[2] = {__byte_perm(block_params, 0, 0x1111),
                                   __byte_perm(block_params, 0, 0x3333)};
      uint32_t high_steps[2] = {steps[0], steps[1]}, high_offsets[2] = {offsets[0], offsets[1]};
      if constexpr (kScheme == Scheme::kGroups32) {
        const uint32_t high_params = params ^ (words[1] & 0x01000100u);
        high_steps[0] = __byte_perm(high_params, 0, 0x4440);
        high_steps[1] = __byte_perm(high_params, 0, 0x4442);
        high_offsets[0] = __byte_perm(high_params, 0, 0x1111);
        high_offsets[1] = __byte_perm(high_params, 0, 0x3333);
      }
      // Two bits of each weight: as many as two words hold.
      const uint32_t planes[2] = {words[1], words[3]};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        uint32_t low = words[r], high = words[r];
        if constexpr (has_table(kScheme)) {
          look_up(table, words[r], low, high);
        } else if constexpr (kScheme == Scheme::kSignedCodes) {
          low = (low & kLow) ^ 0x08080808u;
          high = (high & kLow) ^ 0x07070707u;  // another constant: else it would be the same value
        } else if constexpr (kScheme != Scheme::kNone) {
          low &= kLow;
          high = (high >> 4) & kLow;
        }
        if constexpr (kScheme == Scheme::kPlanes6) {
          const uint32_t plane = planes[r / 2] >> 4 * (r % 2);
          auto decode6 = [&](uint32_t upper, uint32_t lower) {
            const uint32_t sum = lower * steps[r % 2] + offsets[r % 2];
            return (upper * (4 * steps[r % 2]) + sum) ^ 0x80808080u;
          };
          low = decode6(low, plane & 0x03030303u);
          high = decode6(high, plane >> 2 & 0x03030303u);
        } else if constexpr (kScheme != Scheme::kNone && kScheme != Scheme::kTable) {
          low = decode<kScheme>(low, steps[r % 2], offsets[r % 2]);
          high = decode<kScheme>(high, high_steps[r % 2], high_offsets[r % 2]);
        } else if constexpr (kScheme == Scheme::kNone) {
          high = words[(r + 1) % 4];
        }
        words[r] = __byte_perm(low, high, selector);
      }
    }
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0)
      *clocks = clock64() - start;
    out[threadIdx.x] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// One step on the host, byte by byte.
void step_on_host(Scheme scheme, uint32_t (&words)[4], uint32_t params, uint4 table) {
  const uint32_t before[4] = {words[0], words[1], words[2], words[3]};
  const uint32_t entries[4] = {table.x, table.y, table.z, table.w};
  for (int r = 0; r < 4; ++r) {
    auto byte = [&](int which, int half) -> uint32_t {
      const uint32_t varied = before[scheme == Scheme::kGroups32 ? half : 0] & 0x01000100u;
      const int scale = (params ^ varied) >> (16 * (r % 2)) & 0xff;
      const int offset = (params ^ varied) >> (16 * (r % 2) + 8) & 0xff;
      // "none" works in place: the neighbour of the last register has changed already.
      const uint32_t raw = (half == 0 ? before[r] : r == 3 ? words[0] : before[r + 1]) >> 8 * which;
      if (scheme == Scheme::kNone)
        return raw & 0xff;
      int code = before[r] >> (8 * which) & 0xff;
      if (has_table(scheme)) {
        code = before[r] >> (16 * half + 4 * which) & 15;
        code = entries[code / 4] >> 8 * (code % 4) & 0xff;
        if (scheme == Scheme::kTable)
          return code;
      } else if (scheme == Scheme::kSignedCodes)
        code = (code & 15) ^ (half ? 7 : 8);
      else
        code = half ? code >> 4 : code & 15;
      if (scheme == Scheme::kPlanes6)
        code = 4 * code + (before[r / 2 * 2 + 1] >> (8 * which + 4 * (r % 2) + 2 * half) & 3);
      const int value = code * scale + offset;
      return (scheme == Scheme::kUnsigned || scheme == Scheme::kQServe ? value : value ^ 0x80) &
             0xff;
    };
    words[r] = byte(0, 0) | byte(1, 1) << 8 | byte(2, 0) << 16 | byte(3, 1) << 24;
  }
}

struct Benchmark {
  int num_sms;
  bench::Stream stream{};
  bench::DeviceArray<uint4> out{kThreads};
  bench::DeviceArray<long long> clocks{1};
  double none_clk = 0;

  static constexpr uint4 kCodes = {0x1d3c5a79u, 0x9b8f2e46u, 0xd0c7b1a2u, 0x63748596u};
  static constexpr uint32_t kParams = 9u | 3u << 8 | 14u << 16 | 21u << 24;  // feasible for all
  static constexpr uint32_t kParams6 = 3u | 3u << 8 | 4u << 16 | 2u << 24;   // for codes up to 63
  // In any order; each at most 15, for the same reason.
  static constexpr uint4 kTable = {0x0b060d02u, 0x070e0109u, 0x030f0800u, 0x0c0a0504u};

  static constexpr uint32_t params_of(Scheme scheme) {
    return scheme == Scheme::kPlanes6 ? kParams6 : kParams;
  }

  template <Scheme kScheme>
  double enqueue(int iterations) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    check(cudaEventRecord(begin, stream), "event");
    bench::launch(dequant_kernel<kScheme>, num_sms, kThreads, 0, stream, false, kCodes,
                  params_of(kScheme), kTable, kSelector, iterations, out.data(), clocks.data());
    check(cudaEventRecord(end, stream), "event");
    check(cudaEventSynchronize(end), kNames[int(kScheme)]);
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    check(cudaEventDestroy(begin), "event");
    check(cudaEventDestroy(end), "event");
    return milliseconds * 1e3;
  }

  template <Scheme kScheme>
  void run() {
    constexpr int kIterations = 3;
    enqueue<kScheme>(kIterations);
    const auto got = out.to_host();
    for (uint32_t thread = 0; thread < kThreads; ++thread) {
      uint32_t words[4] = {kCodes.x + thread, kCodes.y + thread, kCodes.z + thread,
                           kCodes.w + thread};
      for (int i = 0; i < kIterations * kUnroll; ++i)
        step_on_host(kScheme, words, params_of(kScheme), kTable);
      const uint32_t device[4] = {got[thread].x, got[thread].y, got[thread].z, got[thread].w};
      for (int r = 0; r < 4; ++r) {
        require(words[r] == device[r],
                std::string(kNames[int(kScheme)]) + ", thread " + std::to_string(thread) +
                    ", register " + std::to_string(r) + ": expected " + std::to_string(words[r]) +
                    ", got " + std::to_string(device[r]));
      }
    }
    constexpr int kLong = 20000;
    enqueue<kScheme>(kLong);
    std::vector<double> us, clk;
    const double blocks = double(kLong) * kUnroll * (kThreads / kWarpGroupThreads);
    for (int i = 0; i < 7; ++i) {
      us.push_back(enqueue<kScheme>(kLong));
      clk.push_back(clocks.to_host()[0] / blocks);
    }
    if (kScheme == Scheme::kNone)
      none_clk = bench::median(clk);
    std::printf("%s\t%.2f\t%.2f\t%.2f\n", kNames[int(kScheme)], bench::median(clk),
                bench::median(clk) - none_clk,
                blocks * num_sms * LiquidQuant::kBlockBytes / bench::median(us) / 1e6);
    std::fflush(stdout);
  }
};

}  // namespace

int main() {
  return bench::run("dequant_cost", [] {
    const cudaDeviceProp gpu = bench::hopper();
    std::printf("# %s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
    std::printf("scheme\tclk\tnet_clk\tweights_TBps\n");
    Benchmark benchmark{gpu.multiProcessorCount};
    benchmark.run<Scheme::kNone>();
    benchmark.run<Scheme::kUnsigned>();
    benchmark.run<Scheme::kSigned>();
    benchmark.run<Scheme::kSignedCodes>();
    benchmark.run<Scheme::kQServe>();
    benchmark.run<Scheme::kGroups32>();
    benchmark.run<Scheme::kPlanes6>();
    benchmark.run<Scheme::kTable>();
    benchmark.run<Scheme::kTableSigned>();
  });
}
