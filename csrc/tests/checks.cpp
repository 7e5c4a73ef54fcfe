// Values that would lead a CPU kernel astray are refused, the argument named; sound ones pass.
#include "firp/cpu/checks.h"

#include <string>

#include "test.h"

namespace firp::test {
namespace {

bool names(const std::string& problem, const std::string& argument) { return problem.starts_with(argument + ":"); }

std::string parents(std::vector<int32_t> links) { return cpu::check_parents(links.data(), static_cast<int64_t>(links.size())); }

std::string room(std::vector<int32_t> lens, int64_t rows) {
  return cpu::check_room(lens.data(), static_cast<int64_t>(lens.size()), rows, 10);
}

std::string lookahead(std::vector<int32_t> nodes) {
  return cpu::check_lookahead(nodes.data(), static_cast<int64_t>(nodes.size()), 4);
}

std::string path(std::vector<int32_t> nodes, int32_t accepted, int32_t start) {
  return cpu::check_path(nodes.data(), static_cast<int64_t>(nodes.size()), accepted, start, 10);
}

void trees() {
  CHECK(parents({-1}).empty());
  CHECK(parents({-1, 0, 0, 2, -1, -1}).empty());
  CHECK(names(parents({0, 0}), "parents"));      // the root has a parent
  CHECK(names(parents({-1, 1}), "parents"));     // its own parent
  CHECK(names(parents({-1, 2, 1}), "parents"));  // a cycle
  CHECK(names(parents({-1, 2, 0}), "parents"));  // a parent after its child
  CHECK(names(parents({-1, -2}), "parents"));
  CHECK(names(parents({-1, INT32_MAX}), "parents"));
  CHECK(lookahead({}).empty() && lookahead({0, -1, 3}).empty());
  CHECK(names(lookahead({0, 4}), "lookahead") && names(lookahead({-2}), "lookahead"));
}

void lengths() {
  CHECK(room({0, 7}, 3).empty() && room({10}, 0).empty());
  CHECK(names(room({0, 8}, 3), "context_lens") && names(room({-1}, 3), "context_lens"));
  CHECK(names(room({INT32_MAX}, 3), "context_lens") && names(room({INT32_MIN}, 3), "context_lens"));
}

void paths() {
  CHECK(path({0, 2, 5}, 2, 4).empty() && path({0, -1, -1}, 0, 9).empty());
  CHECK(names(path({0, 2, 5}, 3, 0), "num_accepted") && names(path({0, 2, 5}, -1, 0), "num_accepted"));
  CHECK(names(path({1, 2, 5}, 2, 0), "path") && names(path({0, 2, 2}, 2, 0), "path") && names(path({0, 3, 1}, 2, 0), "path"));
  CHECK(names(path({0, 2, 5}, 2, 5), "context_lens") && names(path({0, 2, 5}, 2, -1), "context_lens"));
  CHECK(names(path({0, INT32_MAX}, 1, INT32_MAX), "context_lens"));
}

void ranges() {
  CHECK(cpu::check_between("num_nodes", 256, 1, 256).empty());
  CHECK(cpu::check_between("num_nodes", 257, 1, 256) == "num_nodes: got 257, expected 1..256");
  CHECK(cpu::check_between("depths", 0, 1, 256, " nodes") == "depths: got 0 nodes, expected 1..256");
}

}  // namespace
}  // namespace firp::test

int main() {
  firp::test::trees();
  firp::test::lengths();
  firp::test::paths();
  firp::test::ranges();
}
