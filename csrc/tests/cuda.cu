// The CUDA kernels on a GPU against the CPU; exit code 77 (skipped) where there is none.

#include "draft_case.h"
#include "firp/cpu/cache.h"
#include "firp/cuda/commit_cache.cuh"
#include "firp/cuda/draft_tree.cuh"
#include "test.h"

namespace firp::test {

// A device copy of a vector, freed at the end of its life.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : count_(values.size()) {
    CHECK(cudaMalloc(&data_, count_ * sizeof(T) + 1) == cudaSuccess);
    CHECK(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> out(count_);
    CHECK(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return out;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

namespace {

constexpr int kSkipped = 77;

void draft_tree_equals_the_cpu(uint64_t seed) {
  const DraftCase given = draft_case(seed);
  const DraftResult blank(given);
  const OnDevice probabilities(given.probabilities);
  const OnDevice candidates(given.candidates), root(std::vector{given.root_token}), tokens(blank.tokens);
  const OnDevice offsets(std::vector{given.num_offsets}), order(given.order), parents(blank.parents), depths(blank.depths);
  const OnDevice ancestors(blank.ancestors), lookahead(blank.lookahead);
  const cuda::DraftTree args{
      .probabilities = probabilities.data(),
      .candidates = candidates.data(),
      .order = given.order.empty() ? nullptr : order.data(),
      .root_token = root.data(),
      .num_offsets = offsets.data(),
      .tokens = tokens.data(),
      .parents = parents.data(),
      .depths = depths.data(),
      .ancestors = ancestors.data(),
      .lookahead = lookahead.data(),
      .k = static_cast<int32_t>(given.k),
      .width = static_cast<int32_t>(given.width),
      .ranks = static_cast<int32_t>(given.ranks),
      .num_nodes = static_cast<int32_t>(given.num_nodes),
      .num_lookahead = static_cast<int32_t>(given.num_lookahead),
  };
  CHECK(cuda::draft_tree(args, 1, nullptr) == cudaSuccess, seed);
  const DraftResult exact = run_cpu(given);
  CHECK(tokens.values() == exact.tokens && parents.values() == exact.parents && depths.values() == exact.depths, seed);
  CHECK(ancestors.values() == exact.ancestors && lookahead.values() == exact.lookahead, seed);
}

void commit_cache_equals_the_cpu(uint64_t seed) {
  Random random(seed);
  const int32_t layers = static_cast<int32_t>(random.between(1, 40)), batch = static_cast<int32_t>(random.between(1, 5));
  const int64_t bytes = random.choice({2, 4, 6, 8, 24, 48, 384, 2048}), capacity = 40, sequence = capacity * bytes;
  const int32_t entries = static_cast<int32_t>(random.between(1, 9));
  std::vector<char> memory(2 * layers * batch * sequence), finished;
  for (char& byte : memory) byte = static_cast<char>(random.next());
  std::vector<int32_t> lens, accepted, path;
  for (int32_t b = 0; b < batch; ++b) {
    lens.push_back(static_cast<int32_t>(random.between(0, 12)));
    accepted.push_back(static_cast<int32_t>(random.below(entries)));
    finished.push_back(random.chance(0.3));
    for (int32_t i = 0, node = 0; i < entries; ++i, node += static_cast<int32_t>(random.between(1, 3))) path.push_back(node);
  }
  const OnDevice cache(memory), done(finished);
  const OnDevice lengths(lens), counts(accepted), nodes(path);
  const cuda::CommitCache args{
      .cache = cache.data(),
      .layer = 2 * batch * sequence,
      .plane = batch * sequence,
      .sequence = sequence,
      .slot = bytes,
      .context_lens = lengths.data(),
      .path = nodes.data(),
      .num_accepted = counts.data(),
      .finished = reinterpret_cast<const bool*>(done.data()),
      .layers = layers,
      .slot_bytes = static_cast<int32_t>(bytes),
      .path_length = entries,
  };
  CHECK(cuda::commit_cache(args, batch, nullptr) == cudaSuccess, seed);
  for (int32_t b = 0; b < batch; ++b) {
    if (finished[b]) continue;
    for (int64_t plane = 0; plane < 2 * layers; ++plane) {
      cpu::commit_cache(
          memory.data() + (plane * batch + b) * sequence, bytes, bytes, lens[b], path.data() + b * entries, accepted[b] + 1);
    }
    lens[b] += accepted[b] + 1;
  }
  CHECK(cache.values() == memory && lengths.values() == lens, seed);
}

}  // namespace
}  // namespace firp::test

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::cout << "no GPU: the CUDA kernels were compiled, not run\n";
    return firp::test::kSkipped;
  }
  for (uint64_t seed = 0; seed < 500; ++seed) {
    firp::test::draft_tree_equals_the_cpu(seed);
    firp::test::commit_cache_equals_the_cpu(seed);
  }
}
