// The kernel's own decode function over every step, offset and code.
#include <cstdio>

#include "liquidgemm/formats/liquidquant.hpp"

using namespace liquidgemm;

int main() {
  int failures = 0;
  long checked = 0;
  for (int step = 0; step <= 255; ++step) {
    for (int offset = 0; offset <= 255; ++offset) {
      for (int code = 0; code <= LiquidQuant::kMaxCode; ++code) {
        if (!LiquidQuant::is_feasible(code, step, offset))
          continue;
        // Beside the code under test, codes that are feasible too: the neighbours must not leak in.
        for (int other : {0, code}) {
          for (int byte = 0; byte < 4; ++byte) {
            uint32_t codes = 0x01010101u * static_cast<uint32_t>(other);
            codes = (codes & ~(0xffu << 8 * byte)) | static_cast<uint32_t>(code) << 8 * byte;
            const uint32_t weights = LiquidQuant::decode4(codes, step, 0x01010101u * offset);
            for (int b = 0; b < 4; ++b) {
              const int expected =
                  (b == byte ? code : other) * step + offset - LiquidQuant::kOffsetBias;
              const int actual = static_cast<int8_t>(weights >> 8 * b);
              if (actual != expected && ++failures <= 10) {
                std::printf("FAILED: q=%d s=%d a=%d byte %d: got %d, expected %d\n", code, step,
                            offset, b, actual, expected);
              }
              ++checked;
            }
          }
        }
      }
    }
  }
  std::printf("decode: %ld weights checked, %d wrong\n", checked, failures);
  return failures != 0;
}
