// draft_tree on a CPU, and the CUDA algorithm lane by lane, against a search over every child that could come next.
#include <algorithm>

#include "host_warp.h"

namespace firp::test {
namespace {

DraftResult search(const DraftCase& given) {
  DraftResult out(given);
  const int64_t n = given.num_nodes, words = (n + 31) / 32;
  std::vector<float> reach{1.0f}, mass{1.0f};
  std::vector<int64_t> children(n, 0), held(n, 0);
  const cpu::Marginals marginals = given.marginals();
  out.tokens.assign(n, 0);
  out.parents.assign(n, -1);
  out.depths.assign(n, 0);
  out.ancestors.assign(n * words, 0);
  out.lookahead.assign(given.num_lookahead, -1);
  out.tokens[0] = given.root_token;
  while (static_cast<int64_t>(reach.size()) < n) {
    float best = 0.0f;
    int64_t parent = -1;
    for (int64_t v = 0; v < static_cast<int64_t>(reach.size()); ++v) {
      if (out.depths[v] >= given.num_offsets || children[v] >= given.ranks) continue;
      const float product = reach[v] * given.probabilities[marginals.place(out.depths[v], held[v], children[v])];
      if (product > best) best = product, parent = v;
    }
    if (parent < 0) break;
    const int64_t node = static_cast<int64_t>(reach.size());
    const int64_t rank = children[parent]++;
    held[node] = given.order.empty() ? rank : given.order[marginals.place(out.depths[parent], held[parent], rank)];
    out.tokens[node] = given.candidates[out.depths[parent] * given.width + held[node]];
    out.parents[node] = static_cast<int32_t>(parent);
    out.depths[node] = out.depths[parent] + 1;
    mass[parent] -= best;
    reach.push_back(best);
    mass.push_back(best);
  }
  for (int64_t node = 0; node < n; ++node) {
    for (int64_t above = node; above >= 0; above = out.parents[above]) {
      out.ancestors[node * words + above / 32] |= static_cast<int32_t>(1u << (above % 32));
    }
  }
  std::vector<int32_t> order;
  for (int32_t node = 1; node < static_cast<int32_t>(reach.size()); ++node) order.push_back(node);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return mass[a] > mass[b]; });
  out.lookahead[0] = 0;
  for (int64_t slot = 1; slot < std::min<int64_t>(given.num_lookahead, order.size() + 1); ++slot) {
    out.lookahead[slot] = order[slot - 1];
  }
  return out;
}

void order_keys_follow_floats() {
  const float values[] = {-INFINITY, -1e30f, -1.0f, -1e-45f, 0.0f, 1e-45f, 1e-30f, 0.5f, 1.0f, INFINITY};
  for (const float a : values) {
    CHECK(cuda::order_key(a) > 0, a);
    for (const float b : values) CHECK((cuda::order_key(a) > cuda::order_key(b)) == (a > b), a, b);
  }
}

}  // namespace
}  // namespace firp::test

int main() {
  using namespace firp::test;
  order_keys_follow_floats();
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    const DraftCase given = draft_case(seed);
    const DraftResult exact = search(given);
    CHECK(run_cpu(given) == exact, seed);
    CHECK(run_warp(given, 0) == exact, seed);
    CHECK(run_warp(given, seed + 1) == exact, seed);
  }
}
