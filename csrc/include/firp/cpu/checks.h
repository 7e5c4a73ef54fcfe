// Checks of values that a CPU kernel trusts. Each returns what is wrong, the argument's name first, or nothing.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

namespace firp::cpu {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

constexpr int64_t kMaxNodes = 256;

inline std::string check_between(const char* name, int64_t value, int64_t low, int64_t high, const char* unit = "") {
  if (value >= low && value <= high) return {};
  return text(name, ": got ", value, unit, ", expected ", low, "..", high);
}

// Every length and the rows after it lie within the cache.
inline std::string check_room(const int32_t* context_lens, int64_t batch, int64_t rows, int64_t capacity) {
  for (int64_t b = 0; b < batch; ++b) {
    if (context_lens[b] < 0) return text("context_lens: got ", context_lens[b], ", expected at least 0");
    if (context_lens[b] + rows > capacity) {
      return text("context_lens: ", context_lens[b], " + ", rows, " rows exceed the cache capacity of ", capacity, " slots");
    }
  }
  return {};
}

// Every slot is empty (-1) or holds a node of the tree.
inline std::string check_lookahead(const int32_t* lookahead, int64_t count, int64_t num_nodes) {
  for (int64_t i = 0; i < count; ++i) {
    if (lookahead[i] < -1 || lookahead[i] >= num_nodes) {
      return text("lookahead: got ", lookahead[i], ", expected -1..", num_nodes - 1);
    }
  }
  return {};
}

// One tree: the root first, every other node after its parent or without one (padding). This excludes cycles.
inline std::string check_parents(const int32_t* parents, int64_t num_nodes) {
  if (parents[0] != -1) return text("parents: node 0 is the root, expected parent -1, got ", parents[0]);
  for (int64_t node = 1; node < num_nodes; ++node) {
    if (parents[node] < -1 || parents[node] >= node) {
      return text("parents: got ", parents[node], " for node ", node, ", a parent must be -1 or come before its child");
    }
  }
  return {};
}

// One accepted path: increasing nodes from the root, within the cache.
inline std::string check_path(const int32_t* path, int64_t length, int32_t accepted, int32_t start, int64_t capacity) {
  if (accepted < 0 || accepted >= length) {
    return text("num_accepted: got ", accepted, ", expected 0..", length - 1, " (path has ", length, " entries)");
  }
  for (int64_t i = 0; i <= accepted; ++i) {
    if (i == 0 ? path[0] != 0 : path[i] <= path[i - 1]) {
      return text("path: got ", path[i], " at entry ", i, ", expected increasing nodes from 0");
    }
  }
  return check_room(&start, 1, int64_t{path[accepted]} + 1, capacity);
}

}  // namespace firp::cpu
