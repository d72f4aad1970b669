// What the algorithms of the CPU share: memory, sizes of elements, and parts of a loop in parallel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "liquidgemm/cpu/gemm.hpp"

namespace liquidgemm::cpu {

// Activations to quantize, arrange or combine that are worth a second thread: about 10
// microseconds.
inline constexpr int64_t kGrainActivations = 1 << 15;

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
template <class T>
using Memory = std::unique_ptr<T[], FreeAligned>;

template <class T>
Memory<T> allocate(int64_t count) {
  return Memory<T>(
      static_cast<T*>(::operator new(size_t(count) * sizeof(T), std::align_val_t{64})));
}

inline int64_t size_of(Element type) {
  switch (type) {
    case Element::kInt8:
      return 1;
    case Element::kBFloat16:
    case Element::kFloat16:
      return 2;
    default:
      return 4;
  }
}

template <class Function>
void run(ParallelFor parallel_for, int64_t count, int64_t grain, Function& function) {
  const Body body = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<Function*>(context))(begin, end);
  };
  parallel_for(count, grain, body, &function);
}

}  // namespace liquidgemm::cpu
