// commit_cache on a CPU, and the CUDA columns in a random order, against a copy of the rows made beforehand.
#include "firp/cuda/commit_cache.cuh"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "firp/cpu/cache.h"
#include "test.h"

namespace firp::test {
namespace {

struct alignas(16) Word16 {
  char bytes[16];
};

struct CommitCase {
  int64_t layers, batch, capacity, slot_bytes, slot, offset, path_length;
  std::vector<char> memory;
  std::vector<int32_t> context_lens, path, num_accepted;
  std::vector<char> finished;

  char* cache(std::vector<char>& bytes) const { return bytes.data() + offset; }
  int64_t plane(int64_t plane, int64_t b) const { return (plane * batch + b) * capacity * slot; }
};

CommitCase commit_case(uint64_t seed) {
  Random random(seed);
  CommitCase made{};
  made.layers = random.between(1, 3);
  made.batch = random.between(1, 3);
  made.slot_bytes = random.choice({1, 2, 4, 6, 8, 12, 16, 24, 48, 96, 384});
  made.slot = made.slot_bytes + (random.chance(0.3) ? random.choice({2, 4, 8, 16}) : 0);
  made.offset = random.choice({0, 0, 0, 2, 4, 8, 16});
  made.path_length = random.between(1, 9);
  made.capacity = 40;
  made.memory.resize(made.offset + 2 * made.layers * made.batch * made.capacity * made.slot);
  for (char& byte : made.memory) byte = static_cast<char>(random.next());
  for (int64_t b = 0; b < made.batch; ++b) {
    made.context_lens.push_back(static_cast<int32_t>(random.between(0, 12)));
    made.num_accepted.push_back(static_cast<int32_t>(random.below(made.path_length)));
    made.finished.push_back(random.chance(0.3));
    int32_t node = 0;
    for (int64_t i = 0; i < made.path_length; ++i) {
      made.path.push_back(i <= made.num_accepted[b] ? node : -1);
      node += static_cast<int32_t>(random.between(1, 3));
    }
  }
  return made;
}

using Outcome = std::pair<std::vector<char>, std::vector<int32_t>>;

Outcome copied(const CommitCase& given) {
  Outcome out{given.memory, given.context_lens};
  for (int64_t b = 0; b < given.batch; ++b) {
    if (given.finished[b]) continue;
    for (int64_t plane = 0; plane < 2 * given.layers; ++plane) {
      for (int32_t i = 0; i <= given.num_accepted[b]; ++i) {
        const int64_t start = given.offset + given.plane(plane, b), length = given.context_lens[b];
        const char* from = given.memory.data() + start + (length + given.path[b * given.path_length + i]) * given.slot;
        std::copy(from, from + given.slot_bytes, out.first.data() + start + (length + i) * given.slot);
      }
    }
    out.second[b] += given.num_accepted[b] + 1;
  }
  return out;
}

Outcome run_cpu(const CommitCase& given) {
  Outcome out{given.memory, given.context_lens};
  for (int64_t b = 0; b < given.batch; ++b) {
    if (given.finished[b]) continue;
    for (int64_t plane = 0; plane < 2 * given.layers; ++plane) {
      cpu::commit_cache(
          given.cache(out.first) + given.plane(plane, b), given.slot, given.slot_bytes, given.context_lens[b],
          given.path.data() + b * given.path_length, given.num_accepted[b] + 1);
    }
    out.second[b] += given.num_accepted[b] + 1;
  }
  return out;
}

template <typename Word>
void move_columns(const cuda::CommitCache& args, int64_t sequence, int32_t length, int32_t rows, Random& random) {
  const int32_t words = args.slot_bytes / static_cast<int32_t>(sizeof(Word));
  std::vector<int32_t> columns(2 * args.layers * words);
  std::iota(columns.begin(), columns.end(), 0);
  for (size_t i = columns.size(); i > 1; --i) std::swap(columns[i - 1], columns[random.below(static_cast<int64_t>(i))]);
  for (const int32_t column : columns) cuda::move_column<Word>(args, sequence, length, rows, words, column);
}

// Blocks arrive one after another; whichever comes last advances the length.
Outcome run_columns(const CommitCase& given, Random& random) {
  Outcome out{given.memory, given.context_lens};
  const int64_t sequence = given.capacity * given.slot, plane = given.batch * sequence;
  const cuda::CommitCache args{
      .cache = given.cache(out.first),
      .layer = 2 * plane,
      .plane = plane,
      .sequence = sequence,
      .slot = given.slot,
      .context_lens = out.second.data(),
      .path = given.path.data(),
      .num_accepted = given.num_accepted.data(),
      .finished = reinterpret_cast<const bool*>(given.finished.data()),
      .layers = static_cast<int32_t>(given.layers),
      .slot_bytes = static_cast<int32_t>(given.slot_bytes),
      .path_length = static_cast<int32_t>(given.path_length),
  };
  const int64_t bytes = cuda::word_bytes(args);
  CHECK(given.slot_bytes % bytes == 0 && given.slot % bytes == 0);
  CHECK(reinterpret_cast<uint64_t>(args.cache) % bytes == 0);
  for (int64_t b = 0; b < given.batch; ++b) {
    if (args.finished[b]) continue;
    const int32_t parts = static_cast<int32_t>(random.between(1, cuda::kMaxParts)), rows = args.num_accepted[b] + 1;
    for (int32_t part = 0; part < parts; ++part) {
      const int32_t found = args.context_lens[b];
      const cuda::Arrival arrival = cuda::arrive(found, parts, rows);
      CHECK(arrival.length == given.context_lens[b]);
      CHECK((arrival.advance != 0) == (part == parts - 1));
      args.context_lens[b] = found + (1 << cuda::kLengthBits);
      args.context_lens[b] += arrival.advance;
    }
    const int32_t length = given.context_lens[b];
    if (bytes == 16) move_columns<Word16>(args, b, length, rows, random);
    if (bytes == 8) move_columns<uint64_t>(args, b, length, rows, random);
    if (bytes == 4) move_columns<uint32_t>(args, b, length, rows, random);
    if (bytes == 2) move_columns<uint16_t>(args, b, length, rows, random);
    if (bytes == 1) move_columns<uint8_t>(args, b, length, rows, random);
  }
  return out;
}

void the_longest_cache_still_counts() {
  const int32_t length = cuda::kMaxCapacity - 2;
  int32_t counter = length;
  for (int32_t part = 0; part < cuda::kMaxParts; ++part) {
    const cuda::Arrival arrival = cuda::arrive(counter, cuda::kMaxParts, 1);
    CHECK(arrival.length == length, part);
    counter += (1 << cuda::kLengthBits) + arrival.advance;
  }
  CHECK(counter == length + 1);
}

}  // namespace
}  // namespace firp::test

int main() {
  using namespace firp::test;
  the_longest_cache_still_counts();
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    const CommitCase given = commit_case(seed);
    const Outcome exact = copied(given);
    CHECK(run_cpu(given) == exact, seed);
    Random random(seed);
    CHECK(run_columns(given, random) == exact, seed);
  }
}
