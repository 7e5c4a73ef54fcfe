// The most probable tokens of one row of scores, and their probabilities.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "firp/cpu/isa.h"
#include "firp/cpu/number.h"
#include "firp/cpu/vector.h"

namespace firp::cpu {

// Scores whose peak is kept: where it falls short of the ranks-th highest peak, the block holds no candidate.
constexpr int64_t kPeakBlock = 64;

}  // namespace firp::cpu

#define FIRP_KERNEL "firp/cpu/top_marginals_kernel.h"
#include "firp/cpu/for_each_isa.h"

namespace firp::cpu {

// logits [vocab] to the `ranks` (at most vocab) most probable tokens, in descending order, the lower token first among
// equals. A row without a finite peak, or with NaN, has probabilities 0 and the tokens 0, 1, ...
template <typename T>
void top_marginals(Isa isa, const T* logits, int64_t vocab, int64_t ranks, float* probabilities, int64_t* candidates) {
  FIRP_DISPATCH(top_marginals(logits, vocab, ranks, probabilities, candidates));
}

}  // namespace firp::cpu
