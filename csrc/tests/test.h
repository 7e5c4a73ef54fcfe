// What the standalone tests share: a check that says where and why it failed, random numbers, number types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <vector>

#include "firp/cpu/isa.h"
#include "firp/cpu/number.h"

// The remaining arguments, such as a seed, are printed with the failure.
#define CHECK(condition, ...) \
  if (!(condition)) firp::test::fail(#condition, __FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)

namespace firp::test {

template <typename... Details>
[[noreturn]] void fail(const char* condition, const char* file, int line, const Details&... details) {
  std::cerr << file << ":" << line << ": " << condition << " does not hold";
  ((std::cerr << ", " << details), ...);
  std::cerr << "\n";
  std::abort();
}

// splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t bits = state_ += 0x9e3779b97f4a7c15u;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    return bits ^ (bits >> 31);
  }

  int64_t below(int64_t bound) { return static_cast<int64_t>(next() % static_cast<uint64_t>(bound)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  int64_t choice(std::initializer_list<int64_t> values) { return values.begin()[below(static_cast<int64_t>(values.size()))]; }
  bool chance(double probability) { return uniform() < probability; }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  float normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - static_cast<double>(uniform())));
    return static_cast<float>(radius * std::cos(6.283185307179586 * static_cast<double>(uniform())));
  }

 private:
  uint64_t state_;
};

template <typename T>
T number(float value) {
  T out;
  cpu::store(value, &out);
  return out;
}

template <>
inline double number<double>(float value) {
  return value;
}

template <typename T>
std::vector<T> normals(Random& random, int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = number<T>(random.normal());
  return values;
}

template <typename T>
double real(T value) {
  return static_cast<double>(cpu::to_float(value));
}

// The instruction sets that this machine runs.
inline std::vector<cpu::Isa> instruction_sets() {
  std::vector<cpu::Isa> sets;
  for (int isa = 0; isa <= static_cast<int>(cpu::best_isa()); ++isa) sets.push_back(static_cast<cpu::Isa>(isa));
  return sets;
}

}  // namespace firp::test
