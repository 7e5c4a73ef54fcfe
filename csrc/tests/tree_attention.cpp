// tree_attention with every instruction set of this machine against brute force; and a node's bits in any tree.
#include "attention_case.h"

namespace firp::test {
namespace {

template <typename T>
void equals_brute_force(double bound, uint64_t cases) {
  for (uint64_t seed = 0; seed < cases; ++seed) {
    AttentionCase<T> made = attention_case<T>(seed);
    const std::vector<double> exact = brute_force(made);
    for (const cpu::Isa isa : instruction_sets()) {
      std::fill(made.output.begin(), made.output.end(), number<T>(-7.0f));
      run(isa, made);
      for (size_t i = 0; i < exact.size(); ++i) {
        CHECK(std::abs(real(made.output[i]) - exact[i]) <= bound, seed, cpu::isa_name(isa), i, exact[i], real(made.output[i]));
      }
    }
  }
}

// A chain decoded as one tree equals the chain decoded token by token; windows may be shorter than the chain.
template <typename T>
void has_the_bits_of_a_chain(int64_t window) {
  for (const int64_t length : {0, 3, 60, 64, 127}) {
    Random random(length);
    AttentionCase<T> tree{}, step{};
    tree.batch = step.batch = 1;
    tree.capacity = step.capacity = length + 8;
    tree.args.rows = tree.args.num_nodes = 8;
    step.args.rows = step.args.num_nodes = 1;
    for (auto* made : {&tree, &step}) {
      made->args.heads = 6;
      made->args.kv_heads = 2;
      made->args.head_dim = 64;
      made->args.scale = 0.125;
      made->args.window = window;
    }
    tree.query = normals<T>(random, 8 * 6 * 64);
    step.key = tree.key = normals<T>(random, tree.capacity * 2 * 64);
    step.value = tree.value = normals<T>(random, tree.capacity * 2 * 64);
    tree.context_lens = {static_cast<int32_t>(length)};
    for (int32_t node = 0; node < 8; ++node) {
      tree.depths.push_back(node);
      tree.ancestors.push_back((2 << node) - 1);
    }
    point(tree);
    for (const cpu::Isa isa : instruction_sets()) {
      run(isa, tree);
      for (int32_t node = 0; node < 8; ++node) {
        const int64_t row = 6 * 64;
        step.query.assign(tree.query.begin() + node * row, tree.query.begin() + (node + 1) * row);
        step.context_lens = {static_cast<int32_t>(length) + node};
        step.depths = {0};
        step.ancestors = {1};
        point(step);
        run(isa, step);
        CHECK(std::memcmp(step.output.data(), tree.output.data() + node * row, row * sizeof(T)) == 0, length, node);
      }
    }
  }
}

}  // namespace
}  // namespace firp::test

int main() {
  using namespace firp;
  test::equals_brute_force<float>(3e-6, 80);
  test::equals_brute_force<cpu::bfloat16>(1.6e-2, 80);
  test::equals_brute_force<cpu::float16>(2e-3, 20);
  test::equals_brute_force<double>(1e-12, 20);
  for (const int64_t window : {0, 1, 2, 3, 5, 64}) {
    test::has_the_bits_of_a_chain<float>(window);
    test::has_the_bits_of_a_chain<cpu::bfloat16>(window);
  }
}
