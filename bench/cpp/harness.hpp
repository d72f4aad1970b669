// What the microbenchmarks share: errors, device memory, random data, and timing in CUDA graphs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace bench {

inline void check(cudaError_t error, char const* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
  }
}

inline void require(bool condition, std::string const& message) {
  if (!condition)
    throw std::runtime_error(message);
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data_, 0, count * sizeof(T)), "cudaMemset");
    // The kernels' stream does not wait for the default one.
    check(cudaDeviceSynchronize(), "cudaMemset");
  }
  explicit DeviceArray(std::vector<T> const& host) : DeviceArray(host.size()) {
    check(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(DeviceArray const&) = delete;
  DeviceArray& operator=(DeviceArray const&) = delete;

  T* data() const { return data_; }
  int64_t size() const { return count_; }
  std::vector<T> to_host() const {
    std::vector<T> host(count_);
    check(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }

 private:
  T* data_ = nullptr;
  int64_t count_;
};

// Word i of a sequence without visible pattern. Zeros would draw less power, and could hide a byte
// that never came.
__host__ __device__ inline uint32_t random_word(uint64_t i) {
  uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>(z >> 32);
}

// The current device, which has to be a Hopper GPU.
inline cudaDeviceProp hopper() {
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, 0), "no usable GPU");
  require(gpu.major == 9 && gpu.minor == 0, std::string("needs compute capability 9.0 (Hopper), ") +
                                                gpu.name + " has " + std::to_string(gpu.major) +
                                                "." + std::to_string(gpu.minor));
  return gpu;
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(Stream const&) = delete;
  Stream& operator=(Stream const&) = delete;
  operator cudaStream_t() const { return stream_; }
  void synchronize(char const* what) const { check(cudaStreamSynchronize(stream_), what); }

 private:
  cudaStream_t stream_;
};

template <class Kernel>
void allow_shared_bytes(Kernel* kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "shared memory");
}

// Launches a kernel; `programmatic`: it may start while the one before it still runs.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...),
            int ctas,
            int threads,
            int shared_bytes,
            cudaStream_t stream,
            bool programmatic,
            Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = ctas;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = programmatic ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "launch");
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

constexpr int kReplays = 15;

// Weights that take turns, so that none is in the L2 cache when its turn comes.
inline int cold_copies(int64_t weight_bytes, cudaDeviceProp const& gpu) {
  return static_cast<int>(std::max<int64_t>(2, 3ll * gpu.l2CacheSize / weight_bytes + 1));
}

// Median µs of one call of enqueue(copy), which launches on `stream`, over replays of a CUDA graph
// that visits all copies equally often.
template <class Enqueue>
double graph_us(cudaStream_t stream, int copies, int at_least, Enqueue const& enqueue) {
  const int calls = (at_least + copies - 1) / copies * copies;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < calls; ++i)
    enqueue(i % copies);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamEndCapture(stream, &graph), "end of capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "instantiation");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int replay = -2; replay < kReplays; ++replay) {  // two to warm up
    check(cudaEventRecord(begin, stream), "event");
    check(cudaGraphLaunch(executable, stream), "replay");
    check(cudaEventRecord(end, stream), "event");
    check(cudaEventSynchronize(end), "replay");
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (replay >= 0)
      times.push_back(milliseconds * 1e3 / calls);
  }
  check(cudaEventDestroy(begin), "event");
  check(cudaEventDestroy(end), "event");
  check(cudaGraphExecDestroy(executable), "graph");
  check(cudaGraphDestroy(graph), "graph");
  return median(times);
}

struct Shape {
  int64_t n, k;
};

inline Shape parse_shape(char const* text) {
  Shape shape{};
  char rest = 0;
  const int fields = std::sscanf(text, "%" SCNd64 "x%" SCNd64 "%c", &shape.n, &shape.k, &rest);
  require(fields == 2 && shape.n > 0 && shape.k > 0,
          std::string("expected a shape NxK such as 4096x14336, got ") + text);
  return shape;
}

// The body of every main: what goes wrong is one line on stderr.
template <class Body>
int run(char const* program, Body const& body) {
  try {
    body();
    return EXIT_SUCCESS;
  } catch (std::exception const& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return EXIT_FAILURE;
  }
}

}  // namespace bench
