#include "../check.hpp"
#include "liquidgemm/cpu/gemm.hpp"
#include "ops.hpp"

namespace liquidgemm::binding {

std::vector<std::string> cpu_kernels() {
  int count;
  cpu::Kernels const* const* const sets = cpu::supported_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i)
    names.push_back(sets[i]->name);
  return names;
}

std::string cpu_kernel() {
  cpu::Kernels const* const kernels = cpu::current_kernels();
  return kernels ? kernels->name : "reference";
}

void set_cpu_kernel(std::string name) {
  check(cpu::choose_kernels(name.c_str()), "name: no CPU kernel is called ", name);
}

}  // namespace liquidgemm::binding
