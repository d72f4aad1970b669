// What the algorithms of the CPU share: memory, sizes of elements, and parts of a loop in parallel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "liquidgemm/cpu/gemm.hpp"

namespace liquidgemm::cpu {

// Activations to quantize, arrange or combine that are worth a second thread: about 10
// microseconds.
inline constexpr int64_t kGrainActivations = 1 << 15;

// Uninitialized, aligned to a cache line. Not by the aligned operator new: glibc maps such memory
// anew for every call, and each page of it is a fault.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) : bytes_(new unsigned char[size_t(count) * sizeof(T) + kLine]) {}

  T* get() const {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.get());
    return reinterpret_cast<T*>((address + kLine - 1) / kLine * kLine);
  }

  T& operator[](int64_t i) const { return get()[i]; }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<unsigned char[]> bytes_;
};

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
