// verify_tree against the walk written out over whole rows.
#include "firp/cpu/verify_tree.h"

#include <algorithm>

#include "test.h"

namespace firp::test {
namespace {

template <typename T>
int64_t choose(const T* row, int64_t vocab, const float* uniform) {
  std::vector<double> scores;
  for (int64_t v = 0; v < vocab; ++v) scores.push_back(real(row[v]));
  if (std::any_of(scores.begin(), scores.end(), [](double s) { return std::isnan(s); })) return -1;
  if (!uniform) return std::max_element(scores.begin(), scores.end()) - scores.begin();
  double total = 0.0, cumulative = 0.0;
  for (const double p : scores) total += p;
  int64_t last = vocab - 1;
  for (int64_t v = 0; v < vocab; ++v) {
    if (scores[v] <= 0.0) continue;
    last = v;
    cumulative = 0.0;
    for (int64_t u = 0; u <= v; ++u) cumulative += scores[u];
    if (cumulative > static_cast<double>(*uniform) * total) return v;
  }
  return last;
}

template <typename T>
void one_case(uint64_t seed) {
  Random random(seed);
  const int64_t nodes = random.between(1, 20), vocab = random.choice({1, 3, 5, 16, 17, 40}), max_depth = random.between(0, 5);
  const int64_t slots = random.between(0, 3);
  const bool samples = random.chance(0.5), coarse = random.chance(0.5);
  std::vector<T> scores;
  for (int64_t i = 0; i < nodes * vocab; ++i) {
    const float score = samples ? random.uniform() : random.normal();
    scores.push_back(number<T>(coarse ? std::round(score * 2) / 2 : score));
  }
  if (random.chance(0.2)) scores[random.below(nodes * vocab)] = number<T>(NAN);
  std::vector<float> uniforms;
  // Coarse uniforms fall on the very sums of coarse probabilities.
  for (int64_t i = 0; i <= max_depth; ++i) {
    uniforms.push_back(coarse ? static_cast<float>(random.below(8)) / 8 : random.uniform());
  }
  std::vector<int32_t> parents{-1}, lookahead;
  std::vector<int64_t> tokens{0};
  for (int64_t node = 1; node < nodes; ++node) {
    parents.push_back(static_cast<int32_t>(random.chance(0.1) ? -1 : random.below(node)));
    const bool hit = parents[node] >= 0 && random.chance(0.6);
    const int64_t level = random.between(0, max_depth);
    const int64_t choice = hit ? choose(&scores[parents[node] * vocab], vocab, samples ? &uniforms[level] : nullptr) : -1;
    tokens.push_back(choice >= 0 ? choice : random.below(vocab));
  }
  for (int64_t slot = 0; slot < slots; ++slot) lookahead.push_back(static_cast<int32_t>(random.between(-1, nodes - 1)));

  std::vector<int32_t> path{0};
  int32_t status = 0;
  int64_t bonus = -1;
  while (true) {
    const int64_t node = path.back(), level = static_cast<int64_t>(path.size()) - 1;
    bonus = choose(&scores[node * vocab], vocab, samples ? &uniforms[level] : nullptr);
    if (bonus < 0) status = 1;
    int32_t next = -1;
    for (int32_t child = static_cast<int32_t>(nodes) - 1; child > 0; --child) {
      if (parents[child] == node && tokens[child] == bonus) next = child;
    }
    if (bonus < 0 || next < 0 || level == max_depth) break;
    path.push_back(next);
  }
  const int32_t accepted = static_cast<int32_t>(path.size()) - 1;
  int32_t slot = -1, levels_up = 0;
  for (int32_t up = accepted; slots && slot < 0 && up >= 0; --up) {
    const auto found = std::find(lookahead.begin(), lookahead.end(), path[up]);
    if (found != lookahead.end()) slot = static_cast<int32_t>(found - lookahead.begin()), levels_up = accepted - up;
  }
  if (slots && slot < 0) levels_up = static_cast<int32_t>(max_depth) + 1;
  path.resize(max_depth + 1, -1);

  std::vector<int32_t> walked(max_depth + 1, -7);
  cpu::Verified out{.path = walked.data()};
  cpu::verify_tree(
      scores.data(), samples ? uniforms.data() : nullptr, tokens.data(), parents.data(), lookahead.data(), nodes, vocab, slots,
      max_depth, out);
  CHECK(walked == path, seed);
  CHECK(out.num_accepted == accepted && out.bonus == bonus && out.status == status, seed);
  CHECK(out.last_slot == slot && out.levels_up == levels_up, seed, out.levels_up, levels_up);
}

}  // namespace
}  // namespace firp::test

int main() {
  using namespace firp;
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    test::one_case<float>(seed);
    test::one_case<double>(seed);
    test::one_case<cpu::float16>(seed);
    test::one_case<cpu::bfloat16>(seed);
  }
}
