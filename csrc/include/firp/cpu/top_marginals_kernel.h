// One instruction set's kernel of top_marginals.h; included with FIRP_ISA and FIRP_VECTOR_BYTES defined. The plain loops
// over lanes are written for the compiler to vectorise.

namespace firp::cpu::FIRP_ISA {

// The largest of `count` scores; `broken` counts those that are NaN.
template <typename T>
static float peak_of(const T* logits, int64_t count, int32_t& broken) {
  float lanes[kLanes];
  int32_t unordered[kLanes] = {};
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const float x = to_float(logits[i + l]);
      lanes[l] = x > lanes[l] ? x : lanes[l];
      unordered[l] += x != x;
    }
  }
  for (; i < count; ++i) {
    const float x = to_float(logits[i]);
    lanes[0] = x > lanes[0] ? x : lanes[0];
    unordered[0] += x != x;
  }
  for (int64_t l = 1; l < kLanes; ++l) {
    lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
    unordered[0] += unordered[l];
  }
  broken += unordered[0];
  return lanes[0];
}

// Sum of exp(logits - peak).
template <typename T>
static float total_of(const T* logits, int64_t count, float peak) {
  Floats sums = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    float wide[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) wide[l] = to_float(logits[i + l]);
    sums += exponential(load(wide) - broadcast(peak));
  }
  float total = sum(sums);
  for (; i < count; ++i) total += exponential(broadcast(to_float(logits[i]) - peak))[0];
  return total;
}

template <typename T>
void top_marginals(const T* logits, int64_t vocab, int64_t ranks, float* probabilities, int64_t* candidates) {
  const int64_t blocks = (vocab + kPeakBlock - 1) / kPeakBlock;
  std::vector<float> peaks(blocks);
  int32_t broken = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    peaks[b] = peak_of(logits + b * kPeakBlock, std::min(kPeakBlock, vocab - b * kPeakBlock), broken);
  }
  const float peak = *std::max_element(peaks.begin(), peaks.end());
  if (broken != 0 || !std::isfinite(peak)) {
    for (int64_t r = 0; r < ranks; ++r) probabilities[r] = 0.0f, candidates[r] = r;
    return;
  }
  float enough = -std::numeric_limits<float>::infinity();
  if (ranks <= blocks) {
    std::vector<float> highest = peaks;
    std::nth_element(highest.begin(), highest.begin() + (ranks - 1), highest.end(), std::greater<float>());
    enough = highest[ranks - 1];
  }
  int64_t found = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (peaks[b] < enough) continue;
    const int64_t end = std::min((b + 1) * kPeakBlock, vocab);
    for (int64_t v = b * kPeakBlock; v < end; ++v) {
      const float x = to_float(logits[v]);
      if (found == ranks && !(x > probabilities[ranks - 1])) continue;
      int64_t place = found < ranks ? found++ : ranks - 1;
      for (; place > 0 && x > probabilities[place - 1]; --place) {
        probabilities[place] = probabilities[place - 1];
        candidates[place] = candidates[place - 1];
      }
      probabilities[place] = x;
      candidates[place] = v;
    }
  }
  const float total = total_of(logits, vocab, peak);
  for (int64_t r = 0; r < ranks; ++r) probabilities[r] = exponential(broadcast(probabilities[r] - peak))[0] / total;
}

}  // namespace firp::cpu::FIRP_ISA
