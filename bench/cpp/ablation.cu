// Question: which part of the kernel's speed comes from the number format, and which from how
// dequantization and multiplication are overlapped? The ablation of the LiquidGEMM paper
// (arXiv 2509.01229, figure 13), on one skeleton that is a small copy of this library's kernel.
//
// What counts: y^T = W x^T from packed weights and INT8 tokens to bf16, scaled per channel and per
// token, in tiles of up to 128 tokens. In every variant a producer warp-group keeps a ring of
// stages full with bulk copies, CTAs are persistent, and launches are programmatic; the groups of a
// 64-channel panel share its K. What differs:
//   baseline  dequantization by multiply and byte-wise add (QServe's), not overlapped: all
//             warp-groups dequantize, meet, multiply, wait and meet again
//   lqq       the same with LiquidQuant's multiply-add and exclusive or
//   excp      lqq with explicit coarse-grained pipelining: half of the warp-groups dequantize into
//             shared memory, the other half multiply from there
//   imfp      lqq with implicit fine-grained pipelining, the library's own: every warp-group
//             dequantizes its next block while the tensor cores multiply the last one; no
//             synchronization among them
// Activations come pre-swizzled from global memory, in the order of the stages: quantizing them is
// no part of this. Launches rotate over copies of the weight that add up to at least 3x the L2
// cache; the variants take turns; medians over replays of CUDA graphs, per launch.
//
// Checked, before anything is timed: all values of a small product against one thread per value,
// to the last bit, with several tiles per CTA and launches that overlap.
//
// Build: nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -cudart=static -DNDEBUG
//             --expt-relaxed-constexpr -Icsrc -I$CUTLASS/include -o ablation bench/cpp/ablation.cu
// Run:   ablation 4096x4096 28672x4096 ...
#include "ablation.hpp"

#include "harness.hpp"
#include "weights.hpp"

namespace {

using namespace ablation;
using bench::check;
using bench::require;

constexpr int kBatches[] = {4, 8, 16, 32, 64, 128, 256};
constexpr int kMostTokens = 256;
constexpr int kRounds = 3;

// x [tiles * tokens, k] -> [tiles][k / 128][tokens][128], each row of 128 bytes swizzled as wgmma
// wants it.
__global__ void tile_tokens_kernel(int8_t const* x, int tiles, int tokens, int k, int8_t* tiled) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(tiles) * tokens * k)
    return;
  const int tile = static_cast<int>(i / k / tokens), token = static_cast<int>(i / k % tokens);
  const int column = static_cast<int>(i % k);
  const int swizzled = (column % 128) ^ (token % 8 * 16);
  const int64_t row = (int64_t(tile) * (k / 128) + column / 128) * tokens + token;
  tiled[row * 128 + swizzled] = x[i];
}

// One weight with its copies, and the activations of the largest batch.
class Problem {
 public:
  Problem(int n, int k, int copies, int num_sms)
      : n(n),
        k(k),
        copies(copies),
        num_sms(num_sms),
        weight_bytes(int64_t(n / kBlockRows) * (k / kBlockK) * LiquidQuant::kBlockBytes),
        weights(copies * weight_bytes),
        x(int64_t(kMostTokens) * k),
        tiled(int64_t(kMostTokens) * k),
        x_scale(scales(kMostTokens, 1)),
        weight_scale(scales(n, 2)),
        y(int64_t(kMostTokens) * n) {
    bench::fill_weights(weights.data(), copies * weight_bytes, stream);
    bench::fill_tokens_kernel<<<1024, 256, 0, stream>>>(x.data(), x.size());
    stream.synchronize("random data");
  }

  // The activations of tiles * tokens <= kMostTokens tokens, for the launches to come.
  void tile_tokens(int tiles, int tokens) {
    token_tiles = tiles;
    const int64_t count = int64_t(tiles) * tokens * k;
    tile_tokens_kernel<<<static_cast<int>((count + 255) / 256), 256, 0, stream>>>(
        x.data(), tiles, tokens, k, tiled.data());
    stream.synchronize("activations");
  }

  template <class C>
  void enqueue(int copy) const {
    Params params{};
    params.weight = weights.data() + copy * weight_bytes;
    params.tokens = tiled.data();
    params.x_scale = x_scale.data();
    params.weight_scale = weight_scale.data();
    params.y = y.data();
    params.tiles = n / kBlockRows / C::kPanels * token_tiles;
    params.token_tiles = token_tiles;
    params.slabs = k / C::kStageK;
    bench::launch(gemm_kernel<C>, std::min(num_sms, params.tiles), C::kThreads, sizeof(Shared<C>),
                  stream, true, params);
  }

  const int n, k, copies, num_sms;
  const int64_t weight_bytes;
  int token_tiles = 1;
  bench::Stream stream;
  bench::DeviceArray<uint8_t> weights;
  bench::DeviceArray<int8_t> x, tiled;
  bench::DeviceArray<float> x_scale, weight_scale;
  bench::DeviceArray<__nv_bfloat16> y;  // [n, tokens of the tile]

 private:
  static std::vector<float> scales(int count, int seed) {
    std::vector<float> values;
    for (int i = 0; i < count; ++i)
      values.push_back(1e-3f * (1 + bench::random_word(seed * 1000003 + i) % 1000));
    return values;
  }
};

template <class C>
void verify() {
  constexpr int kSmallSms = 3;
  constexpr int kTokenTiles = 2, kAllTokens = kTokenTiles * C::kTokens;
  // Tiles and slabs that the CTAs and the groups of a panel do not share evenly.
  Problem p(14 * kBlockRows, 5 * 256, 3, kSmallSms);
  bench::allow_shared_bytes(gemm_kernel<C>, sizeof(Shared<C>));
  p.tile_tokens(kTokenTiles, C::kTokens);
  check(cudaMemsetAsync(p.y.data(), 0xff, p.y.size() * 2, p.stream), "poison");
  for (int i = 0; i < 2 * p.copies; ++i)
    p.enqueue<C>(i % p.copies);
  bench::DeviceArray<int32_t> sums(int64_t(kAllTokens) * p.n);
  bench::reference(p.weights.data() + (p.copies - 1) * p.weight_bytes, p.x.data(), kAllTokens, p.n,
                   p.k, sums.data(), p.stream);
  p.stream.synchronize("verification");
  const auto y = p.y.to_host();
  const auto expected = sums.to_host();
  const auto x_scale = p.x_scale.to_host(), weight_scale = p.weight_scale.to_host();
  for (int channel = 0; channel < p.n; ++channel) {
    for (int token = 0; token < kAllTokens; ++token) {
      const float scaled = static_cast<float>(expected[int64_t(token) * p.n + channel]) *
                           x_scale[token] * weight_scale[channel];
      const float want = __bfloat162float(__float2bfloat16_rn(scaled));
      const float got = __bfloat162float(y[int64_t(channel) * kAllTokens + token]);
      require(got == want, std::string(kVariantNames[int(C::kVariant)]) + ", " +
                               std::to_string(C::kTokens) + " tokens, channel " +
                               std::to_string(channel) + ", token " + std::to_string(token) +
                               ": expected " + std::to_string(want) + ", got " +
                               std::to_string(got));
    }
  }
}

template <int Tokens>
void verify_variants() {
  verify<Config<Tokens, Variant::kBaseline>>();
  verify<Config<Tokens, Variant::kLiquidQuant>>();
  verify<Config<Tokens, Variant::kExCP>>();
  verify<Config<Tokens, Variant::kImFP>>();
}

template <class C>
double time_us(Problem const& p) {
  return bench::graph_us(p.stream, p.copies, 48, [&](int copy) { p.enqueue<C>(copy); });
}

template <int Tokens>
void time_variants(Problem& p, int batch) {
  p.tile_tokens((batch + Tokens - 1) / Tokens, Tokens);
  std::vector<double> us[4];
  for (int round = 0; round < kRounds; ++round) {
    us[0].push_back(time_us<Config<Tokens, Variant::kBaseline>>(p));
    us[1].push_back(time_us<Config<Tokens, Variant::kLiquidQuant>>(p));
    us[2].push_back(time_us<Config<Tokens, Variant::kExCP>>(p));
    us[3].push_back(time_us<Config<Tokens, Variant::kImFP>>(p));
  }
  for (int variant = 0; variant < 4; ++variant) {
    std::printf("%d\t%d\t%d\t%s\t%.3f\n", p.n, p.k, batch, kVariantNames[variant],
                bench::median(us[variant]));
  }
  std::fflush(stdout);
}

void time_batch(Problem& p, int batch) {
  if (batch <= 8)
    time_variants<8>(p, batch);
  else if (batch <= 16)
    time_variants<16>(p, batch);
  else if (batch <= 32)
    time_variants<32>(p, batch);
  else if (batch <= 64)
    time_variants<64>(p, batch);
  else
    time_variants<128>(p, batch);
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run("ablation", [&] {
    require(argc > 1, "usage: ablation NxK ...");
    const cudaDeviceProp gpu = bench::hopper();
    verify_variants<8>();
    verify_variants<16>();
    verify_variants<32>();
    verify_variants<64>();
    verify_variants<128>();
    std::printf("# %s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
    std::printf("N\tK\tM\tvariant\tus\n");
    for (int i = 1; i < argc; ++i) {
      const bench::Shape shape = bench::parse_shape(argv[i]);
      require(shape.n % 128 == 0 && shape.k % 256 == 0,
              std::string("N has to be a multiple of 128 and K of 256: ") + argv[i]);
      const int64_t bytes = shape.n / kBlockRows * (shape.k / kBlockK) * LiquidQuant::kBlockBytes;
      Problem problem(static_cast<int>(shape.n), static_cast<int>(shape.k),
                      bench::cold_copies(bytes, gpu), gpu.multiProcessorCount);
      for (int batch : kBatches)
        time_batch(problem, batch);
    }
  });
}
