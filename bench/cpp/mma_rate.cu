// Question: how fast can an SM issue INT8 WGMMAs when one operand is 4-bit weights, and what does
// the dequantization in front of them cost? It is the ceiling of every main loop, whatever the
// memory does.
//
// What counts: an SM multiplies blocks of 64 channels x 64 k by `tokens` tokens, `groups`
// warp-groups at a time, each its own channels; all operands wait in shared memory, and no barrier
// is passed. 2 * 64 * 64 * tokens operations per block; the tensor cores of an SM need at least
// `tokens` clocks for it. Operand A, the weights, is
//   shared     int8 in shared memory: no dequantization
//   registers  int8 in registers, loaded once: no dequantization
//   u8         LDS, then one multiply-add per four weights: q * s + a, as unsigned bytes
//   s8         LDS, then one multiply-add and one exclusive or: the library's own
// The loop is the library's: two A buffers, the multiplication of a block under the dequantization
// of the next.
//   tops           1e12 operations per second on all SMs, at whatever the clock was
//   clk            SM clocks per block
//   peak_pct       tokens / clk: share of what the tensor cores could do at that clock
//   weights_TBps   packed weights (2176 bytes per block) that all SMs get through, 1e12 bytes/s
//   sustained_tops with --sustain SECONDS: the same after so long, when the power limit acts
//
// Checked: the sums of a short run against plain loops on the host.
//
// Build: nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -cudart=static -DNDEBUG
//             --expt-relaxed-constexpr -Icsrc -I$CUTLASS/include -o mma_rate bench/cpp/mma_rate.cu
// Run:   mma_rate [--sustain 2]
#include <cstring>

#include <cutlass/arch/barrier.h>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "harness.hpp"
#include "liquidgemm/formats/liquidquant.hpp"

namespace {

using namespace liquidgemm;
using bench::check;
using bench::require;

enum class Operand { kShared, kRegisters, kUnsigned, kSigned };
constexpr char const* kNames[] = {"shared", "registers", "u8", "s8"};

constexpr int kBlocks = 4;  // per group, visited again and again
constexpr int kK = kBlocks * kBlockK;

template <int Tokens, int Groups, Operand kind>
struct Config {
  static constexpr int kTokens = Tokens;
  static constexpr int kGroups = Groups;
  static constexpr Operand kOperand = kind;
  static constexpr int kThreads = Groups * kWarpGroupThreads;
  static constexpr bool kDequantizes = kind == Operand::kUnsigned || kind == Operand::kSigned;

  using Element = std::conditional_t<kind == Operand::kUnsigned, uint8_t, int8_t>;
  using TileMNK = cute::Shape<cute::_64, cute::Int<kTokens>, cute::Int<kMmaK>>;
  static CUTE_HOST_DEVICE auto atom() {
    if constexpr (kind == Operand::kShared)
      return cute::SM90::GMMA::ss_op_selector<int8_t, int8_t, int32_t, TileMNK>();
    else
      return cute::SM90::GMMA::rs_op_selector<Element, int8_t, int32_t, TileMNK>();
  }
  using Mma = decltype(cute::make_tiled_mma(atom()));
  using Atom = cute::GMMA::Layout_K_SW128_Atom<int8_t>;
  using TokenLayout =
      decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kTokens>, cute::Int<kK>>{}));
  using WeightLayout =
      decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::_64, cute::Int<kK>>{}));

  struct Shared {
    alignas(1024) int8_t tokens[kTokens * kK];
    alignas(1024) int8_t weights[kind == Operand::kShared ? kGroups : 1][kBlockRows * kK];
    alignas(16) uint8_t packed[kGroups][kBlocks][LiquidQuant::kBlockBytes];
  };
};

// weights [groups][64][kK] and tokens [tokens][kK] row-major; out [groups][64][tokens] of CTA 0.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) rate_kernel(uint8_t const* packed,
                                                              int8_t const* weights,
                                                              int8_t const* tokens,
                                                              int iterations,
                                                              int32_t* out,
                                                              long long* clocks) {
  using namespace cute;
  extern __shared__ uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename C::Shared*>(shared_bytes);
  const int group = threadIdx.x / kWarpGroupThreads;
  const int thread = threadIdx.x % kWarpGroupThreads;

  Tensor sX = make_tensor(make_smem_ptr(shared.tokens), typename C::TokenLayout{});
  Tensor sW =
      make_tensor(make_smem_ptr(shared.weights[C::kOperand == Operand::kShared ? group : 0]),
                  typename C::WeightLayout{});
  for (int i = threadIdx.x; i < C::kTokens * kK; i += C::kThreads)
    sX(i / kK, i % kK) = tokens[i];
  if constexpr (C::kOperand == Operand::kShared) {
    for (int i = thread; i < kBlockRows * kK; i += kWarpGroupThreads)
      sW(i / kK, i % kK) = weights[group * kBlockRows * kK + i];
  }
  for (int i = thread; i < kBlocks * LiquidQuant::kBlockBytes; i += kWarpGroupThreads)
    shared.packed[group][0][i] = packed[group * kBlocks * LiquidQuant::kBlockBytes + i];
  cutlass::arch::fence_view_async_shared();
  __syncthreads();

  typename C::Mma mma;
  auto thread_mma = mma.get_thread_slice(thread);
  Tensor tCrX = thread_mma.make_fragment_B(thread_mma.partition_B(sX));  // (MMA, 1, k step)
  Tensor acc = partition_fragment_C(mma, Shape<_64, Int<C::kTokens>>{});
  clear(acc);

  // Registers: two blocks of operand A, (MMA, 1, k step, buffer). Shared: descriptors of all.
  auto registers = make_tensor<typename C::Element>(
      make_layout(make_shape(Shape<_4, _2, _2>{}, _1{}, _2{}, _2{})));
  auto dequantize = [&](int block, int buffer) {
    uint8_t const* const from = shared.packed[group][block];
    const uint4 codes = reinterpret_cast<uint4 const*>(from)[thread];
    const uint32_t params = reinterpret_cast<uint32_t const*>(
        from + LiquidQuant::kCodeBytes)[LiquidQuant::param_word(thread)];
    const uint32_t step[2] = {__byte_perm(params, 0, 0x4440), __byte_perm(params, 0, 0x4442)};
    const uint32_t offsets[2] = {__byte_perm(params, 0, 0x1111), __byte_perm(params, 0, 0x3333)};
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    constexpr uint32_t kFlip = C::kOperand == Operand::kUnsigned ? 0 : 0x80808080u;
    auto target = recast<uint32_t>(registers);
    CUTE_UNROLL
    for (int r = 0; r < 4; ++r) {
      target(r, 0, 0, buffer) = ((words[r] & 0x0f0f0f0fu) * step[r % 2] + offsets[r % 2]) ^ kFlip;
      target(r, 0, 1, buffer) =
          (((words[r] >> 4) & 0x0f0f0f0fu) * step[r % 2] + offsets[r % 2]) ^ kFlip;
    }
  };
  if constexpr (C::kOperand == Operand::kRegisters) {
    dequantize(0, 0);
    dequantize(1, 1);
  }

  __syncthreads();
  const long long start = clock64();
  CUTE_NO_UNROLL
  for (int i = 0; i < iterations; ++i) {
    CUTE_UNROLL
    for (int block = 0; block < kBlocks; ++block) {
      if constexpr (C::kDequantizes)
        dequantize(block, block % 2);
      warpgroup_fence_operand(acc);
      if constexpr (C::kOperand == Operand::kShared) {
        Tensor tCrW = thread_mma.make_fragment_A(thread_mma.partition_A(sW));
        warpgroup_arrive();
        gemm(mma, tCrW(_, _, 2 * block), tCrX(_, _, 2 * block), acc);
        gemm(mma, tCrW(_, _, 2 * block + 1), tCrX(_, _, 2 * block + 1), acc);
      } else {
        Tensor tCrW = registers(_, _, _, block % 2);
        warpgroup_fence_operand(tCrW);
        warpgroup_arrive();
        gemm(mma, tCrW(_, _, 0), tCrX(_, _, 2 * block), acc);
        gemm(mma, tCrW(_, _, 1), tCrX(_, _, 2 * block + 1), acc);
      }
      warpgroup_commit_batch();
      warpgroup_wait<1>();
    }
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(acc);
  __syncthreads();
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0)
      *clocks = clock64() - start;
    Tensor at = thread_mma.partition_C(make_identity_tensor(Shape<_64, Int<C::kTokens>>{}));
    CUTE_UNROLL
    for (int i = 0; i < size(acc); ++i) {
      out[(group * kBlockRows + get<0>(at(i))) * C::kTokens + get<1>(at(i))] = acc(i);
    }
  }
}

// Random operands of the largest configuration, and the decoded weights as plain matrices.
struct Data {
  static constexpr int kMaxGroups = 4, kMaxTokens = 256;
  std::vector<uint8_t> packed =
      std::vector<uint8_t>(kMaxGroups * kBlocks * LiquidQuant::kBlockBytes);
  std::vector<int8_t> weights = std::vector<int8_t>(kMaxGroups * kBlockRows * kK);
  std::vector<int8_t> tokens = std::vector<int8_t>(kMaxTokens * kK);

  Data() {
    for (size_t i = 0; i < packed.size(); ++i)
      packed[i] = static_cast<uint8_t>(bench::random_word(i));
    for (size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = static_cast<int8_t>(bench::random_word(i + packed.size()));
    for (int group = 0; group < kMaxGroups; ++group) {
      for (int row = 0; row < kBlockRows; ++row) {
        for (int k = 0; k < kK; ++k) {
          uint8_t* const block =
              &packed[(group * kBlocks + k / kBlockK) * LiquidQuant::kBlockBytes];
          uint8_t& step = block[LiquidQuant::param_position(row)];
          uint8_t& offset = block[LiquidQuant::param_position(row) + 1];
          if (k % kBlockK == 0) {
            step = 1 + step % 16;
            offset %= 256 - LiquidQuant::kMaxCode * step;  // feasible, whatever the code
          }
          const LiquidQuant::CodePosition at = LiquidQuant::code_position(row, k % kBlockK);
          const int code = block[at.byte] >> at.shift & 15;
          weights[(group * kBlockRows + row) * kK + k] =
              static_cast<int8_t>(code * step + offset - LiquidQuant::kOffsetBias);
        }
      }
    }
  }

  // Sum over one pass through all blocks. "registers" multiplies by blocks 0 and 1 in turn.
  int32_t sum(Operand operand, int channel, int token) const {
    int32_t result = 0;
    for (int k = 0; k < kK; ++k) {
      const int from = operand == Operand::kRegisters ? k % (2 * kBlockK) : k;
      const int bias = operand == Operand::kUnsigned ? LiquidQuant::kOffsetBias : 0;
      result += (weights[channel * kK + from] + bias) * tokens[token * kK + k];
    }
    return result;
  }
};

class Benchmark {
 public:
  Benchmark(int num_sms, double sustain)
      : num_sms_(num_sms),
        sustain_(sustain),
        packed_(data_.packed),
        weights_(data_.weights),
        tokens_(data_.tokens),
        out_(Data::kMaxGroups * kBlockRows * Data::kMaxTokens),
        clocks_(1) {}

  template <class C>
  void run() const {
    bench::allow_shared_bytes(rate_kernel<C>, sizeof(typename C::Shared));
    verify<C>();
    enqueue<C>(100);
    const double probe_us = time_us<C>(1000);
    const int iterations = static_cast<int>(1e6 / probe_us) + 1;  // about 1 ms
    std::vector<double> times;
    for (int i = 0; i < 7; ++i)
      times.push_back(time_us<C>(iterations));
    const double us = bench::median(times);
    const double blocks = double(iterations) * kBlocks * C::kGroups;  // of an SM
    const double clk = clocks_.to_host()[0] / blocks;
    std::printf("%s\t%d\t%d\t%.1f\t%.2f\t%.1f\t%.2f\t", kNames[int(C::kOperand)], C::kTokens,
                C::kGroups, tops<C>(blocks, us), clk, 100 * C::kTokens / clk,
                blocks * num_sms_ * LiquidQuant::kBlockBytes / us / 1e6);
    if (sustain_ > 0 && C::kTokens == 256 && C::kGroups == 2) {
      time_us<C>(static_cast<int>(iterations * sustain_ * 1e6 / us));
      std::printf("%.1f\n", tops<C>(blocks, time_us<C>(iterations)));
    } else {
      std::printf("-\n");
    }
    std::fflush(stdout);
  }

 private:
  template <class C>
  double tops(double blocks, double us) const {
    return blocks * num_sms_ * 2.0 * kBlockRows * kBlockK * C::kTokens / us / 1e6;
  }

  template <class C>
  void enqueue(int iterations) const {
    bench::launch(rate_kernel<C>, num_sms_, C::kThreads, sizeof(typename C::Shared), stream_, false,
                  packed_.data(), weights_.data(), tokens_.data(), iterations, out_.data(),
                  clocks_.data());
  }

  template <class C>
  double time_us(int iterations) const {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    check(cudaEventRecord(begin, stream_), "event");
    enqueue<C>(iterations);
    check(cudaEventRecord(end, stream_), "event");
    check(cudaEventSynchronize(end), kNames[int(C::kOperand)]);
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    check(cudaEventDestroy(begin), "event");
    check(cudaEventDestroy(end), "event");
    return milliseconds * 1e3;
  }

  template <class C>
  void verify() const {
    constexpr int kIterations = 3;
    check(cudaMemsetAsync(out_.data(), 0xa5, out_.size() * 4, stream_), "poison");
    enqueue<C>(kIterations);
    stream_.synchronize("verification");
    const auto out = out_.to_host();
    for (int channel = 0; channel < C::kGroups * kBlockRows; ++channel) {
      for (int token = 0; token < C::kTokens; ++token) {
        const int32_t expected = kIterations * data_.sum(C::kOperand, channel, token);
        const int32_t got = out[channel * C::kTokens + token];
        require(got == expected, std::string(kNames[int(C::kOperand)]) + ", " +
                                     std::to_string(C::kTokens) + " tokens, channel " +
                                     std::to_string(channel) + ", token " + std::to_string(token) +
                                     ": expected " + std::to_string(expected) + ", got " +
                                     std::to_string(got));
      }
    }
  }

  int num_sms_;
  double sustain_;
  Data data_;
  bench::Stream stream_;
  bench::DeviceArray<uint8_t> packed_;
  bench::DeviceArray<int8_t> weights_, tokens_;
  bench::DeviceArray<int32_t> out_;
  bench::DeviceArray<long long> clocks_;
};

template <int Tokens, int Groups>
void run_operands(Benchmark const& benchmark) {
  benchmark.run<Config<Tokens, Groups, Operand::kShared>>();
  benchmark.run<Config<Tokens, Groups, Operand::kRegisters>>();
  benchmark.run<Config<Tokens, Groups, Operand::kUnsigned>>();
  benchmark.run<Config<Tokens, Groups, Operand::kSigned>>();
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run("mma_rate", [&] {
    double sustain = 0;
    if (argc > 1) {
      require(argc == 3 && std::strcmp(argv[1], "--sustain") == 0,
              "usage: mma_rate [--sustain SECONDS]");
      sustain = std::atof(argv[2]);
    }
    const cudaDeviceProp gpu = bench::hopper();
    std::printf("# %s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
    std::printf("operand\ttokens\tgroups\ttops\tclk\tpeak_pct\tweights_TBps\tsustained_tops\n");
    const Benchmark benchmark(gpu.multiProcessorCount, sustain);
    run_operands<8, 2>(benchmark);
    run_operands<8, 4>(benchmark);
    run_operands<16, 2>(benchmark);
    run_operands<16, 4>(benchmark);
    run_operands<32, 2>(benchmark);
    run_operands<32, 4>(benchmark);
    run_operands<64, 2>(benchmark);
    run_operands<64, 3>(benchmark);
    run_operands<64, 4>(benchmark);
    run_operands<128, 2>(benchmark);
    run_operands<128, 3>(benchmark);
    run_operands<256, 2>(benchmark);  // 128 accumulators a thread: no registers for more groups
  });
}
