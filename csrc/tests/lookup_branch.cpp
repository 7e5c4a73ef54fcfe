// lookup_branch on a CPU: which match counts, where a branch joins the tree, and where it ends.
#include "firp/cpu/lookup_branch.h"

#include "test.h"

namespace firp::test {
namespace {

// A root with a child 3, and room for four nodes more.
struct Grown {
  std::vector<int64_t> tokens{0, 3, -7, -7, -7, -7};
  std::vector<int32_t> parents{-1, 0, -7, -7, -7, -7}, depths{0, 1, -7, -7, -7, -7}, ancestors{1, 3, 4, 8, 16, 32};
  int64_t num_nodes = 0;

  Grown(const std::vector<int64_t>& history, int64_t num_branch, int64_t least, int64_t most, int64_t replaced = 0) {
    cpu::GrownTree tree{tokens.data(), parents.data(), depths.data(), ancestors.data(), 2, 1};
    cpu::lookup_branch(history.data(), static_cast<int64_t>(history.size()) - 1, num_branch, least, most, replaced, tree);
    num_nodes = tree.num_nodes;
  }
};

void matches() {
  const std::vector<int64_t> text{1, 2, 9, 1, 2, 8, 5, 2};
  CHECK(cpu::longest_match(text.data(), 4, 8).length == 2 && cpu::longest_match(text.data(), 4, 8).end == 1);
  CHECK(cpu::longest_match(text.data(), 7, 8).length == 1 && cpu::longest_match(text.data(), 7, 8).end == 4);
  CHECK(cpu::longest_match(text.data(), 0, 8).length == 0);
}

void grows() {
  const Grown joined({1, 2, 3, 4, 5, 1, 2}, 4, 2, 8);
  CHECK(joined.num_nodes == 5 && joined.parents[2] == 1 && joined.tokens[2] == 4 && joined.depths[4] == 4);
  CHECK(joined.ancestors[4] == (1 | 2 | 4 | 8 | 16));
  const Grown beside({1, 2, 6, 6, 1, 2}, 2, 2, 8), looped({7, 7, 7}, 4, 2, 8), none({1, 2, 3, 4}, 4, 2, 8);
  CHECK(beside.num_nodes == 4 && beside.parents[2] == 0 && beside.tokens[3] == 6 && beside.parents[3] == 2);
  CHECK(looped.num_nodes == 6 && looped.tokens[5] == 7 && looped.depths[5] == 4);
  CHECK(none.num_nodes == 2);
  CHECK(Grown({1, 2, 6, 1, 2}, 0, 2, 8).num_nodes == 2 && Grown({1, 2, 6, 1, 2}, 4, 3, 8).num_nodes == 2);
}

void replaces() {
  const Grown other({1, 2, 6, 6, 1, 2}, 2, 2, 8, 1), same({1, 2, 3, 1, 2}, 1, 2, 8, 1), none({1, 2, 3, 4}, 4, 2, 8, 1);
  CHECK(other.num_nodes == 3 && other.tokens[1] == 6 && other.parents[1] == 0 && other.ancestors[1] == 3);
  CHECK(other.tokens[2] == 6 && other.parents[2] == 1 && other.ancestors[2] == 7);
  CHECK(same.num_nodes == 2 && same.tokens[1] == 3 && none.num_nodes == 2 && none.tokens[1] == 3);
}

}  // namespace
}  // namespace firp::test

int main() {
  firp::test::matches();
  firp::test::grows();
  firp::test::replaces();
}
