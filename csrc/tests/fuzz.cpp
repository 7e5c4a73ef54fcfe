// Any bytes become trees, bitmasks and lengths, sound or malformed. What the checks let through must run without a
// fault and, where integers come out, alike on the CPU and in the CUDA algorithm; what they refuse must be malformed.
//
// `fuzz SEED COUNT` makes its own bytes; with -fsanitize=fuzzer and FIRP_LIBFUZZER the same function is the target.
#include <algorithm>
#include <cstring>
#include <string>

#include "attention_case.h"
#include "firp/cpu/cache.h"
#include "firp/cpu/checks.h"
#include "firp/cpu/verify_tree.h"
#include "host_warp.h"

namespace firp::test {
namespace {

// Choices read from the input; zeros once it has run out.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint32_t word() {
    uint32_t bits = 0;
    const size_t taken = std::min(left_, sizeof(bits));
    if (taken) std::memcpy(&bits, data_, taken);
    data_ += taken;
    left_ -= taken;
    return bits;
  }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(word() % static_cast<uint64_t>(high - low + 1));
  }
  // In range, except for one in about `odds` that is any 32-bit number or just outside.
  int32_t doubtful(int64_t low, int64_t high, uint32_t odds) {
    const uint32_t bits = word();
    if (bits % odds != 0) return static_cast<int32_t>(between(low, high));
    return bits / odds % 2 ? static_cast<int32_t>(word()) : static_cast<int32_t>(bits / odds % 4 < 2 ? low - 1 : high + 1);
  }
  float any_float() {
    const uint32_t bits = word();
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  float fraction() { return static_cast<float>(word() % 9) / 8.0f; }

 private:
  const uint8_t* data_;
  size_t left_;
};

// The check's verdict is the oracle's, and a refusal names one of the arguments; true to go on.
bool passes(const std::string& problem, bool sound, std::initializer_list<const char*> arguments) {
  CHECK(problem.empty() == sound, problem);
  if (sound) return true;
  CHECK(
      std::any_of(
          arguments.begin(), arguments.end(), [&](const char* name) { return problem.starts_with(std::string(name) + ":"); }),
      problem);
  return false;
}

// Every node leads to a root in at most as many steps as there are nodes, and children come after their parents.
bool is_forest(const std::vector<int32_t>& parents) {
  for (size_t node = 0; node < parents.size(); ++node) {
    int64_t above = static_cast<int64_t>(node);
    while (above != -1) {
      if (above < 0 || above >= static_cast<int64_t>(parents.size()) || parents[above] >= above) return false;
      above = parents[above];
    }
  }
  return parents[0] == -1;
}

std::vector<int32_t> doubtful_parents(Source& source, int64_t nodes) {
  std::vector<int32_t> parents{source.doubtful(-1, -1, 40)};
  for (int64_t node = 1; node < nodes; ++node) parents.push_back(source.doubtful(-1, node - 1, 200));
  return parents;
}

void fuzz_verify(Source& source) {
  const int64_t nodes = source.between(1, 40), vocab = source.between(1, 20), slots = source.between(0, 3),
                max_depth = source.between(0, 6);
  const std::vector<int32_t> parents = doubtful_parents(source, nodes);
  std::vector<int32_t> lookahead;
  for (int64_t i = 0; i < slots; ++i) lookahead.push_back(source.doubtful(-1, nodes - 1, 40));
  const bool in_range =
      std::all_of(lookahead.begin(), lookahead.end(), [&](int32_t node) { return node >= -1 && node < nodes; });
  const bool sound = passes(cpu::check_parents(parents.data(), nodes), is_forest(parents), {"parents"}) &
      passes(cpu::check_lookahead(lookahead.data(), slots, nodes), in_range, {"lookahead"});
  if (!sound) return;
  std::vector<float> scores, uniforms;
  std::vector<int64_t> tokens;
  const bool wild = source.between(0, 3) == 0, samples = source.between(0, 1) == 0;
  for (int64_t i = 0; i < nodes * vocab; ++i) scores.push_back(wild ? source.any_float() : source.fraction());
  for (int64_t i = 0; i < nodes; ++i) tokens.push_back(source.between(0, vocab - 1));
  for (int64_t i = 0; i <= max_depth; ++i) uniforms.push_back(wild ? source.any_float() : source.fraction());
  std::vector<int32_t> path(max_depth + 1);
  cpu::Verified out{.path = path.data()};
  cpu::verify_tree(
      scores.data(), samples ? uniforms.data() : nullptr, tokens.data(), parents.data(), lookahead.data(), nodes, vocab, slots,
      max_depth, out);
  CHECK(out.num_accepted >= 0 && out.num_accepted <= max_depth);
  CHECK(out.status == (out.bonus == -1) && out.bonus < vocab && out.last_slot < std::max<int64_t>(slots, 1));
  CHECK(cpu::check_path(path.data(), max_depth + 1, out.num_accepted, 0, nodes).empty());
  for (int32_t i = 1; i <= out.num_accepted; ++i) CHECK(parents[path[i]] == path[i - 1]);
}

void fuzz_draft(Source& source) {
  DraftCase given{};
  given.k = source.between(1, 5);
  given.width = source.between(1, 8);
  const bool ordered = source.between(0, 1) == 0;
  given.ranks = ordered ? source.between(1, given.width) : given.width;
  given.num_nodes = source.between(1, source.between(0, 7) == 0 ? cpu::kMaxNodes : 40);
  given.num_lookahead = source.between(1, given.num_nodes);
  given.root_token = source.between(0, 100);
  given.num_offsets = source.doubtful(0, given.k, 20);
  if (!passes(
          cpu::check_between("num_offsets", given.num_offsets, 0, given.k),
          given.num_offsets >= 0 && given.num_offsets <= given.k, {"num_offsets"})) {
    return;
  }
  const bool wild = source.between(0, 3) == 0;
  for (int64_t i = 0; i < given.k * given.width; ++i) given.candidates.push_back(source.between(0, 100));
  for (int64_t i = 0; i < given.k * given.ranks * (ordered ? given.width : 1); ++i) {
    given.probabilities.push_back(wild ? source.any_float() : source.fraction());
    if (!ordered) continue;
    given.order.push_back(source.doubtful(0, given.width - 1, 2000));
    if (!passes(
            cpu::check_between("order", given.order.back(), 0, given.width - 1),
            given.order.back() >= 0 && given.order.back() < given.width, {"order"})) {
      return;
    }
  }
  const DraftResult out = run_cpu(given);
  CHECK(is_forest(out.parents) && out.lookahead[0] == 0);
  CHECK(cpu::check_lookahead(out.lookahead.data(), given.num_lookahead, given.num_nodes).empty());
  // Probabilities past one overflow to infinity, and infinity minus infinity has no order.
  if (std::all_of(given.probabilities.begin(), given.probabilities.end(), [](float p) { return !(p > 1.0f); })) {
    CHECK(run_warp(given, source.word()) == out);
  } else {
    run_warp(given, source.word());
  }
}

void fuzz_cache(Source& source) {
  const int64_t capacity = source.between(1, 24), rows = source.between(0, 8), bytes = source.between(1, 20);
  std::vector<char> from(rows * bytes, 'r'), cache(capacity * bytes, 'c');
  const int32_t length = source.doubtful(0, std::max<int64_t>(capacity - rows, 0), 8);
  const bool room = length >= 0 && int64_t{length} + rows <= capacity;
  if (passes(cpu::check_room(&length, 1, rows, capacity), room, {"context_lens"})) {
    cpu::write_cache({from.data(), 0, bytes, 0, cache.data(), 0, bytes, 0, &length, rows, 1, bytes}, 0);
  }
  const int64_t entries = source.between(1, 6);
  std::vector<int32_t> path{source.doubtful(0, 0, 30)};
  for (int64_t i = 1; i < entries; ++i) path.push_back(source.doubtful(int64_t{path.back()} + 1, int64_t{path.back()} + 3, 30));
  const int32_t accepted = source.doubtful(0, entries - 1, 20), start = source.doubtful(0, capacity - 1, 20);
  bool sound = accepted >= 0 && accepted < entries && path[0] == 0 && start >= 0;
  for (int32_t i = 1; sound && i <= accepted; ++i) sound = path[i] > path[i - 1];
  sound = sound && int64_t{start} + path[accepted] < capacity;
  const std::string problem = cpu::check_path(path.data(), entries, accepted, start, capacity);
  if (!passes(problem, sound, {"num_accepted", "path", "context_lens"})) return;
  std::vector<char> exact = cache;
  for (int32_t i = 0; i <= accepted; ++i) {
    std::copy_n(cache.begin() + (start + path[i]) * bytes, bytes, exact.begin() + (start + i) * bytes);
  }
  cpu::commit_cache(cache.data(), bytes, bytes, start, path.data(), int64_t{accepted} + 1);
  CHECK(cache == exact);
}

// Bitmasks are any bits at all: what they show may be wrong, what is read may not.
template <typename T>
void fuzz_attention(Source& source) {
  AttentionCase<T> made{};
  cpu::TreeAttention<T>& args = made.args;
  made.batch = 1;
  args.num_nodes = source.between(1, 40);
  args.num_lookahead = source.between(0, 3);
  args.num_offsets = source.between(1, 3);
  args.rows = args.num_nodes + (source.between(0, 1) ? args.num_lookahead * args.num_offsets : 0);
  args.kv_heads = source.between(1, 2);
  args.heads = args.kv_heads * source.between(1, 3);
  args.head_dim = source.between(1, 20);
  args.window = source.between(0, 3) ? 0 : source.between(1, 60);
  args.scale = 1.0;
  made.capacity = args.rows + source.between(0, 70);
  made.context_lens = {source.doubtful(0, made.capacity - args.rows, 10)};
  for (int64_t i = 0; i < args.num_nodes; ++i) made.depths.push_back(source.doubtful(0, i, 20));
  for (int64_t i = 0; i < args.num_nodes * ((args.num_nodes + 31) / 32); ++i)
    made.ancestors.push_back(static_cast<int32_t>(source.word()));
  for (int64_t i = 0; i < args.num_lookahead; ++i) made.lookahead.push_back(source.doubtful(-1, args.num_nodes - 1, 30));
  const bool room = made.context_lens[0] >= 0 && made.context_lens[0] + args.rows <= made.capacity;
  const bool nodes = std::all_of(
      made.lookahead.begin(), made.lookahead.end(), [&](int32_t node) { return node >= -1 && node < args.num_nodes; });
  const bool sound = passes(cpu::check_room(made.context_lens.data(), 1, args.rows, made.capacity), room, {"context_lens"}) &
      passes(cpu::check_lookahead(made.lookahead.data(), args.num_lookahead, args.num_nodes), nodes, {"lookahead"});
  if (!sound) return;
  made.query.assign(args.rows * args.heads * args.head_dim, number<T>(0.5f));
  made.key.assign(made.capacity * args.kv_heads * args.head_dim, number<T>(0.25f));
  made.value.assign(made.capacity * args.kv_heads * args.head_dim, number<T>(2.0f));
  point(made);
  const auto sets = instruction_sets();
  run(sets[source.between(0, static_cast<int64_t>(sets.size()) - 1)], made);
  // All values are alike, so is every row's weighted mean; a row that sees nothing has none.
  for (const T out : made.output) CHECK(std::isnan(real(out)) || std::abs(real(out) - 2.0) < 1e-5, real(out));
}

}  // namespace
}  // namespace firp::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace firp;
  test::Source source(data, size);
  switch (source.between(0, 4)) {
    case 0: test::fuzz_verify(source); break;
    case 1: test::fuzz_draft(source); break;
    case 2: test::fuzz_cache(source); break;
    case 3: test::fuzz_attention<float>(source); break;
    default: test::fuzz_attention<cpu::bfloat16>(source); break;
  }
  return 0;
}

#if !defined(FIRP_LIBFUZZER)
int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: fuzz SEED COUNT\n";
    return 2;
  }
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10), count = std::strtoull(argv[2], nullptr, 10);
  for (uint64_t input = 0; input < count; ++input) {
    firp::test::Random random(seed + input);
    // Sized to the byte, so that the sanitizers see a read past its end.
    std::vector<uint8_t> bytes(random.below(2000));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::cout << count << " inputs from seed " << seed << "\n";
}
#endif
