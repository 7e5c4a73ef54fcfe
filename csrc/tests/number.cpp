// The storage types, exhaustively: every value survives the way through float, and rounding goes to the nearest even.
#include <cmath>

#include "test.h"

int main() {
  using namespace firp;
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const cpu::bfloat16 given{static_cast<uint16_t>(bits)};
    const float value = cpu::to_float(given);
    cpu::bfloat16 back;
    cpu::store(value, &back);
    if (std::isnan(value)) {
      CHECK(std::isnan(cpu::to_float(back)), bits);
      continue;
    }
    CHECK(back.bits == given.bits, bits);
    const float next = cpu::to_float(cpu::bfloat16{static_cast<uint16_t>(bits + 1)});
    if (!std::isfinite(value) || !std::isfinite(next)) continue;
    const float middle = value + (next - value) / 2, below = std::nextafter(middle, value),
                above = std::nextafter(middle, next);
    cpu::bfloat16 rounded;
    cpu::store(middle, &rounded);
    CHECK(rounded.bits == (bits % 2 == 0 ? bits : bits + 1), bits);
    cpu::store(below, &rounded);
    CHECK(rounded.bits == bits, bits);
    cpu::store(above, &rounded);
    CHECK(rounded.bits == bits + 1, bits);
  }
}
