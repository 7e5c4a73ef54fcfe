// write_cache against slots indexed one by one.
#include "firp/cpu/cache.h"
#include "test.h"

int main() {
  using namespace firp;
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    test::Random random(seed);
    const int64_t batch = random.between(1, 3), rows = random.between(0, 6), heads = random.between(1, 4),
                  bytes = random.between(1, 40);
    const int64_t capacity = rows + 12, head_gap = random.below(3), cache_gap = random.below(3);
    // Rows as a transposed view: heads outermost.
    const int64_t rows_row = bytes + head_gap, rows_head = rows * rows_row, rows_batch = heads * rows_head;
    const int64_t cache_head = bytes, cache_slot = heads * cache_head + cache_gap, cache_batch = capacity * cache_slot;
    std::vector<char> from(batch * rows_batch), cache(batch * cache_batch);
    for (char& byte : from) byte = static_cast<char>(random.next());
    for (char& byte : cache) byte = static_cast<char>(random.next());
    std::vector<int32_t> lens;
    for (int64_t b = 0; b < batch; ++b) lens.push_back(static_cast<int32_t>(random.between(0, 12)));
    std::vector<char> exact = cache;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t i = 0; i < bytes; ++i) {
            exact[b * cache_batch + (lens[b] + r) * cache_slot + h * cache_head + i] =
                from[b * rows_batch + r * rows_row + h * rows_head + i];
          }
        }
      }
    }
    const cpu::WriteCache args{
        .rows = from.data(),
        .rows_batch = rows_batch,
        .rows_row = rows_row,
        .rows_head = rows_head,
        .cache = cache.data(),
        .cache_batch = cache_batch,
        .cache_slot = cache_slot,
        .cache_head = cache_head,
        .context_lens = lens.data(),
        .num_rows = rows,
        .heads = heads,
        .head_bytes = bytes,
    };
    for (int64_t b = 0; b < batch; ++b) cpu::write_cache(args, b);
    CHECK(cache == exact, seed);
  }
}
