// linear with every instruction set of this machine against sums in double precision; and a row's bits in any company,
// and for any ranges of outputs.
#include "firp/cpu/linear.h"

#include "test.h"

namespace firp::test {
namespace {

// Outputs by three threads' worth of calls, the first up to `split`; rows of weight, input and output lie further apart
// than they are long.
template <typename T>
std::vector<T> run(
    cpu::Isa isa, const std::vector<T>& input, int64_t input_stride, const std::vector<T>& weight, int64_t weight_stride,
    const T* bias, int64_t rows, int64_t width, int64_t outputs, int64_t output_stride, int64_t split = 0) {
  std::vector<float> prepared(rows * cpu::prepared_width(width)), scratch(cpu::scratch_size(width));
  std::vector<T> output(rows * output_stride, number<T>(-7.0f));
  const cpu::Rows<T> from{input.data(), input_stride, rows, width};
  const int64_t cut = rows * (split + 1) / (outputs + 1);
  cpu::prepare(isa, from, cut, rows, prepared.data());
  cpu::prepare(isa, from, 0, cut, prepared.data());
  const cpu::Linear<T> args{
      .prepared = prepared.data(),
      .weight = weight.data(),
      .bias = bias,
      .output = output.data(),
      .rows = rows,
      .width = width,
      .outputs = outputs,
      .weight_stride = weight_stride,
      .output_stride = output_stride,
  };
  const int64_t half = std::max(split, outputs / 8 * 4);
  cpu::linear(isa, args, scratch.data(), 0, split);
  cpu::linear(isa, args, scratch.data(), split, half);
  cpu::linear(isa, args, scratch.data(), half, outputs);
  return output;
}

template <typename T>
void one_case(uint64_t seed, double rounding) {
  Random random(seed);
  const int64_t width = random.choice({0, 1, 5, 16, 31, 32, 33, 64, 100, 257, 3001}),
                outputs = random.choice({1, 3, 4, 7, 8, 13, 22, 50});
  const int64_t rows = random.between(1, random.choice({30, 30, 30, 30, 30, 70, 140})), weight_stride = width + random.below(3),
                input_stride = width + random.below(3);
  const int64_t output_stride = outputs + random.below(3);
  const std::vector<T> weight = normals<T>(random, outputs * weight_stride), input = normals<T>(random, rows * input_stride);
  const std::vector<T> added = normals<T>(random, outputs);
  const T* bias = random.chance(0.5) ? added.data() : nullptr;
  for (const cpu::Isa isa : instruction_sets()) {
    const std::vector<T> all = run(isa, input, input_stride, weight, weight_stride, bias, rows, width, outputs, output_stride);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < outputs; ++o) {
        double exact = bias ? real(bias[o]) : 0.0, size = std::abs(exact);
        for (int64_t i = 0; i < width; ++i) {
          const double product = real(input[r * input_stride + i]) * real(weight[o * weight_stride + i]);
          exact += product;
          size += std::abs(product);
        }
        CHECK(std::abs(real(all[r * output_stride + o]) - exact) <= rounding * size, seed, cpu::isa_name(isa), r, o);
      }
      for (int64_t o = outputs; o < output_stride; ++o) CHECK(real(all[r * output_stride + o]) == -7.0, seed, r, o);
    }
    for (int64_t split = 1; split <= outputs; ++split) {
      const std::vector<T> other =
          run(isa, input, input_stride, weight, weight_stride, bias, rows, width, outputs, output_stride, split);
      CHECK(std::memcmp(other.data(), all.data(), all.size() * sizeof(T)) == 0, seed, cpu::isa_name(isa), split);
    }
    for (int64_t some = 1; some < rows; some += 1 + rows / 40) {
      const std::vector<T> part =
          run(isa, input, input_stride, weight, weight_stride, bias, some, width, outputs, output_stride);
      CHECK(std::memcmp(part.data(), all.data(), some * output_stride * sizeof(T)) == 0, seed, cpu::isa_name(isa), some);
    }
  }
}

}  // namespace
}  // namespace firp::test

int main() {
  using namespace firp;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    test::one_case<float>(seed, 0x1p-21);
    test::one_case<cpu::bfloat16>(seed, 0x1p-8);
  }
}
