// emit_tokens on a CPU: where a sequence is cut and finished, and what its draft takes.
#include "firp/cpu/emit_tokens.h"

#include "test.h"

namespace firp::test {
namespace {

// One sequence whose path takes nodes 0, 2, 3 of a tree with tokens 10, 11, 12, 13; the bonus is token 14.
struct Sequence {
  std::vector<int32_t> path{0, 2, 3, -1};
  std::vector<int64_t> tokens{10, 11, 12, 13}, stop_tokens;
  int32_t num_accepted = 2, last_slot = 1, levels_up = 1, status = 0, context = 5, kept = -7, usable = -7;
  int64_t bonus = 14, remaining = 9, counts = -7, root = -7, num_embeddings = 100, max_context = 50;
  bool finished = false, out_finished = false;
  std::vector<int64_t> emitted = std::vector<int64_t>(4, -7), rows = std::vector<int64_t>(3, -7),
                       packed = std::vector<int64_t>(7, -7);

  Sequence& run() {
    const cpu::EmitTokens args{
        .path = path.data(),
        .num_accepted = &num_accepted,
        .bonus = &bonus,
        .last_slot = &last_slot,
        .levels_up = &levels_up,
        .status = &status,
        .tokens = tokens.data(),
        .stop_tokens = stop_tokens.data(),
        .context_lens = &context,
        .finished = &finished,
        .remaining = &remaining,
        .out_tokens = emitted.data(),
        .counts = &counts,
        .kept = &kept,
        .out_finished = &out_finished,
        .root = &root,
        .rows = rows.data(),
        .usable = &usable,
        .packed = packed.data(),
        .width = 4,
        .num_nodes = 4,
        .num_stops = static_cast<int64_t>(stop_tokens.size()),
        .num_offsets = 3,
        .num_embeddings = num_embeddings,
        .max_context = max_context,
    };
    cpu::emit_tokens(args, 0);
    return *this;
  }
};

using Tokens = std::vector<int64_t>;

void whole_path() {
  const Sequence out = Sequence{}.run();
  CHECK((out.emitted == Tokens{12, 13, 14, -1}) && out.counts == 3 && out.kept == 2 && out.remaining == 6);
  CHECK(!out.out_finished && out.root == 14 && out.usable == 2);
  CHECK((out.rows == Tokens{4, 5, 5}) && (out.packed == Tokens{12, 13, 14, -1, 3, 0, 0}));
}

void cuts() {
  Sequence stop, limit, full, frozen, broken;
  stop.stop_tokens = {-1, 13};
  stop.run();
  CHECK((stop.emitted == Tokens{12, 13, -1, -1}) && stop.kept == 1 && stop.out_finished);
  limit.remaining = 1;
  limit.run();
  CHECK((limit.emitted == Tokens{12, -1, -1, -1}) && limit.kept == 0 && limit.remaining == 0 && limit.out_finished);
  full.max_context = 7;
  full.run();
  CHECK(full.counts == 3 && full.out_finished);
  frozen.finished = true;
  frozen.run();
  CHECK(frozen.counts == 0 && frozen.kept == 0 && frozen.remaining == 9 && frozen.out_finished);
  broken.status = 1;
  broken.bonus = -1;
  broken.run();
  CHECK(broken.counts == 0 && broken.out_finished && broken.root == 0 && broken.packed.back() == 1);
}

}  // namespace
}  // namespace firp::test

int main() {
  firp::test::whole_path();
  firp::test::cuts();
}
