// The choice rule at one row (easyspec/speculation/sampling.py): bias, penalties, grammar mask, temperature, top-k,
// top-p, min-p, then the largest of score + noise, or of the logits alone.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "api.h"
#include "engine.h"

using namespace easyspec;

namespace {

constexpr float MAX_NOISE = 22.873857f;
constexpr float MIN_TEMPERATURE = 1.17549435e-38f;  // the smallest normal number
constexpr int64_t BLOCK = 1024;  // tokens whose largest logit is kept, so that most are looked at once
constexpr float INFINITE = std::numeric_limits<float>::infinity();

uint64_t element(uint64_t index, uint64_t state) { return (index + 1) * uint64_t(NOISE_STEP) + state; }

// The noise of all tokens at one position of one request (easyspec/speculation/coupling.py).
class Noise {
 public:
  Noise(uint64_t seed, int64_t position) : stream_(mixed(element(uint64_t(position), mixed(element(seed, 0))))) {}

  uint64_t state(int64_t token) const { return element(uint64_t(token), stream_); }

  uint32_t bits(int64_t token) const { return noise_bits(state(token)); }

  static float of_bits(uint32_t bits) {
    const double uniform = (double(bits) + 0.5) * 0x1p-32;
    return float(-std::log(-std::log(uniform)));
  }

  // The largest noise of bits that begin with so many ones.
  static float most(int num_ones) {
    static const auto largest = [] {
      std::array<float, 33> noise;
      for (int ones = 0; ones < 32; ones++) noise[size_t(ones)] = of_bits(~uint32_t(0) - (uint32_t(1) << (31 - ones)));
      noise[32] = of_bits(~uint32_t(0));
      return noise;
    }();
    return largest[size_t(num_ones)];
  }

  // The least bits whose noise may reach `noise`.
  static uint64_t least_bits(float noise) {
    const double uniform = std::exp(-std::exp(-(double(noise) - 1e-4)));
    const double bits = std::floor(uniform * 0x1p32) - 1.0;
    return bits <= 0.0 ? 0 : uint64_t(bits);
  }

 private:
  uint64_t stream_;
};

// A row's logits as bias and penalties make them, for as long as this lives.
class Adjusted {
 public:
  Adjusted(const EasyspecChoice& c, std::vector<std::pair<int64_t, float>>& before) : logits_(c.logits), before_(before) {
    before_.clear();
    for (int64_t i = 0; i < c.num_biased; i++) set(c.bias_ids[i], logits_[c.bias_ids[i]] + c.bias_values[i]);
    if (c.repetition == 1.0f && c.presence == 0.0f && c.frequency == 0.0f) return;
    std::vector<int64_t> slots(c.path_slots, c.path_slots + c.num_path);
    std::sort(slots.begin(), slots.end());
    auto slot = std::lower_bound(slots.begin(), slots.end(), int64_t(0));
    for (int64_t i = 0; i < c.num_seen; i++) {
      if (i + 16 < c.num_seen) __builtin_prefetch(logits_ + c.seen_ids[i + 16], 1);
      float count = c.counts[i];
      for (; slot != slots.end() && *slot == i; ++slot) count += 1.0f;
      penalise(c, c.seen_ids[i], count);
    }
    for (int64_t i = 0; i < c.num_path; i++) {
      const int64_t* end = c.path_ids + c.num_path;
      const bool is_first = std::find(c.path_ids, c.path_ids + i, c.path_ids[i]) == c.path_ids + i;
      if (c.path_slots[i] < 0 && is_first) penalise(c, c.path_ids[i], float(std::count(c.path_ids, end, c.path_ids[i])));
    }
  }

  ~Adjusted() {
    for (auto it = before_.rbegin(); it != before_.rend(); ++it) logits_[it->first] = it->second;
  }

 private:
  void penalise(const EasyspecChoice& c, int64_t token, float count) {
    float value = logits_[token];
    value = value > 0.0f ? value / c.repetition : value * c.repetition;
    value -= count * c.frequency;
    value -= (count > 0.0f ? 1.0f : 0.0f) * c.presence;
    set(token, value);
  }

  void set(int64_t token, float value) {
    before_.emplace_back(token, logits_[token]);
    logits_[token] = value;
  }

  float* logits_;
  std::vector<std::pair<int64_t, float>>& before_;
};

class Chooser {
 public:
  Chooser(const Kernels& kernels, const EasyspecChoice& choice, const float* logits, ChoiceScratch& scratch)
      : k_(kernels),
        c_(choice),
        logits_(logits),
        size_(choice.vocab_size),
        found_(scratch.found),
        scores_(scratch.scores),
        masses_(scratch.masses),
        block_tops_(scratch.block_tops) {
    if (int64_t(found_.size()) < size_) found_.resize(size_t(size_));
    block_tops_.clear();
    for (int64_t first = 0; first < size_; first += BLOCK)
      block_tops_.push_back(k_.largest(logits_ + first, std::min(BLOCK, size_ - first)));
    top_ = *std::max_element(block_tops_.begin(), block_tops_.end());
  }

  int64_t choose() {
    if (!(top_ > -INFINITE)) return -1;
    if (c_.temperature == 0.0f) {
      const int64_t first = BLOCK * (std::find(block_tops_.begin(), block_tops_.end(), top_) - block_tops_.begin());
      k_.collect(logits_ + first, std::min(BLOCK, size_ - first), top_, INFINITE, found_.data());
      return first + found_.front();
    }
    temperature_ = std::max(c_.temperature, MIN_TEMPERATURE);
    float least = -INFINITE;
    if (c_.top_k > 0 && c_.top_k < size_) least = top_k_cutoff();
    if (c_.top_p < 1.0) least = std::max(least, top_p_cutoff(least));
    if (c_.min_p > 0.0f) least = std::max(least, std::log(c_.min_p));
    return noisiest(least);
  }

 private:
  float score(int64_t token) const { return (logits_[token] - top_) / temperature_; }

  // A logit near that of `score`, further up or down than rounding can be wrong.
  float logit_near(float score, float direction) const {
    const double exact = double(top_) + double(score) * double(temperature_);
    const double slack = 1e-5 * (std::abs(double(top_)) + std::abs(double(score) * double(temperature_))) + 1e-30;
    const double limit = std::numeric_limits<float>::max();
    return float(std::min(std::max(exact + double(direction) * slack, -limit), limit));
  }

  // Tokens with scores from `low` on and below `high`, which may be infinite, at the front of `found_`.
  int64_t collect(float low, float high) {
    const float from = logit_below(low), to = logit_above(high);
    const auto of_block = [&](int64_t first, int64_t size, int32_t* found) {
      return k_.collect(logits_ + first, size, from, to, found);
    };
    return kept(collect_blocks(from, of_block), low, high);
  }

  // What `of_block` finds in each block that reaches `from`, at the front of `found_`.
  template <typename OfBlock>
  int64_t collect_blocks(float from, const OfBlock& of_block) {
    int64_t count = 0;
    for (size_t block = 0; block < block_tops_.size(); block++) {
      if (!(block_tops_[block] >= from)) continue;
      const int64_t first = int64_t(block) * BLOCK;
      const int64_t end = count + of_block(first, std::min(BLOCK, size_ - first), found_.data() + count);
      for (; count < end; count++) found_[size_t(count)] += int32_t(first);
    }
    return count;
  }

  // The same of the tokens whose noise may lift them to `best`.
  int64_t collect_lucky(float low, float high, const Noise& noise, float best) {
    const uint64_t least = Noise::least_bits(best - high);
    if (least > 0xffffffffull) return 0;
    const float from = logit_below(low), to = logit_above(high);
    const auto of_block = [&](int64_t first, int64_t size, int32_t* found) {
      return k_.collect_lucky(logits_ + first, size, from, to, noise.state(first), uint32_t(least), found);
    };
    return kept(collect_blocks(from, of_block), low, high);
  }

  float logit_below(float low) const {
    return low == -INFINITE ? -std::numeric_limits<float>::max() : logit_near(low, -1.0f);
  }

  float logit_above(float high) const { return high == INFINITE ? INFINITE : logit_near(high, 1.0f); }

  // How many of the first `near` tokens of `found_`, at its front, have scores in that range after all.
  int64_t kept(int64_t near, float low, float high) {
    int64_t count = 0;
    for (int64_t i = 0; i < near; i++) {
      const float s = score(found_[size_t(i)]);
      if (s >= low && s < high) found_[size_t(count++)] = found_[size_t(i)];
    }
    return count;
  }

  // Their scores, in `scores_`.
  void collect_scores(float low, float high) {
    const int64_t count = collect(low, high);
    scores_.resize(size_t(count));
    for (int64_t i = 0; i < count; i++) scores_[size_t(i)] = score(found_[size_t(i)]);
  }

  static float next_step(float step) { return step < -1e3f ? -INFINITE : step * 2.0f; }

  float top_k_cutoff() {
    for (float low = -4.0f;; low = next_step(low)) {
      collect_scores(low, INFINITE);
      if (int64_t(scores_.size()) < c_.top_k && low > -INFINITE) continue;
      if (int64_t(scores_.size()) < c_.top_k) return -INFINITE;
      std::nth_element(scores_.begin(), scores_.begin() + c_.top_k - 1, scores_.end(), std::greater<float>());
      return scores_[size_t(c_.top_k) - 1];
    }
  }

  // Sum of exp over `scores_`, whose terms are left in `masses_`.
  double mass() {
    masses_.resize(scores_.size());
    k_.exponentials(scores_.data(), int64_t(scores_.size()), masses_.data());
    double total = 0.0;
    for (float each : masses_) total += double(each);
    return total;
  }

  // The last score of the smallest prefix, in falling order, that has the mass top_p of what reaches `kept`.
  float top_p_cutoff(float kept) {
    double needed = 0.0;
    if (kept == -INFINITE) {
      needed = c_.top_p * k_.sum_exponentials(logits_, size_, top_, 1.0f / temperature_);
    } else {
      collect_scores(kept, INFINITE);
      needed = c_.top_p * mass();
    }
    float high = INFINITE;
    for (float step = -2.0f;; step = next_step(step)) {
      const float low = std::max(step, kept);
      collect_scores(low, high);
      const double here = mass();
      if (here >= needed) return cutoff_within(low, high == INFINITE ? 0.0f : high, needed);
      if (low == kept) return kept;  // rounding asks for more than there is
      needed -= here;
      high = low;
    }
  }

  // `scores_`, all between `low` and `high`, have at least the mass `needed`: where its prefix ends.
  float cutoff_within(float low, float high, double needed) {
    while (scores_.size() > 64 && high - low > 1e-5f) {
      const float middle = 0.5f * (low + high);
      double above = 0.0;
      for (size_t i = 0; i < scores_.size(); i++) above += scores_[i] >= middle ? double(masses_[i]) : 0.0;
      const bool is_above = above >= needed;
      size_t count = 0;
      for (size_t i = 0; i < scores_.size(); i++)
        if ((scores_[i] >= middle) == is_above) {
          scores_[count] = scores_[i];
          masses_[count++] = masses_[i];
        }
      scores_.resize(count);
      masses_.resize(count);
      (is_above ? low : high) = middle;
      if (!is_above) needed -= above;
    }
    std::sort(scores_.begin(), scores_.end(), std::greater<float>());
    mass();
    for (size_t i = 0; i < scores_.size(); i++) {
      needed -= double(masses_[i]);
      if (needed <= 0.0) return scores_[i];
    }
    return low;
  }

  // Of the tokens that reach `least`, the one with the largest score + noise; of several, the first.
  int64_t noisiest(float least) {
    const Noise noise(c_.seed, c_.position);
    float best = -INFINITE;
    int64_t chosen = -1;
    const auto offer = [&](int64_t token) {
      const uint32_t bits = noise.bits(token);
      const float its_score = score(token);
      if (its_score + Noise::most(std::countl_one(bits)) < best) return;
      const float value = its_score + Noise::of_bits(bits);
      if (value > best || (value == best && token < chosen)) {
        best = value;
        chosen = token;
      }
    };
    // Likely tokens first: they rule most of the others out by their noise alone.
    float high = INFINITE;
    for (float step = -4.0f;; step = next_step(step)) {
      const float low = std::max(step, least);
      const int64_t count = high == INFINITE ? collect(low, high) : collect_lucky(low, high, noise, best);
      for (int64_t i = 0; i < count; i++) offer(found_[size_t(i)]);
      if (low <= least || best - low > MAX_NOISE + 1e-3f) return chosen;
      high = low;
    }
  }

  const Kernels& k_;
  const EasyspecChoice& c_;
  const float* logits_;
  const int64_t size_;
  float top_, temperature_ = 1.0f;
  std::vector<int32_t>& found_;
  std::vector<float>&scores_, &masses_, &block_tops_;
};

const float* allowed_only(const EasyspecChoice& c, std::vector<float>& masked) {
  masked.assign(size_t(c.vocab_size), -INFINITE);
  for (int64_t byte = 0; byte * 8 < c.vocab_size; byte++) {
    if (c.allowed_bits[byte] == 0) continue;
    for (int64_t token = byte * 8; token < std::min(c.vocab_size, byte * 8 + 8); token++)
      if (c.allowed_bits[byte] >> (token % 8) & 1) masked[size_t(token)] = c.logits[token];
  }
  return masked.data();
}

}  // namespace

int64_t easyspec_choose(void* engine, const EasyspecChoice* choice) {
  try {
    Engine& e = *(Engine*)engine;
    if (!e.kernels.are_finite(choice->logits, choice->vocab_size)) return -1;
    const Adjusted adjusted(*choice, e.scratch.before);
    const float* logits = choice->allowed_bits ? allowed_only(*choice, e.scratch.masked) : choice->logits;
    return Chooser(e.kernels, *choice, logits, e.scratch).choose();
  } catch (const std::bad_alloc&) {
    return -2;
  }
}

double easyspec_log_sum(void* engine, const float* logits, int64_t vocab_size) {
  const Kernels& kernels = ((Engine*)engine)->kernels;
  const float top = kernels.largest(logits, vocab_size);
  return double(top) + std::log(kernels.sum_exponentials(logits, vocab_size, top, 1.0f));
}

namespace {

// The best `count` of a row, in any order, in `found`; fewer only where fewer are numbers.
void find_best(const Kernels& kernels, const float* scores, int64_t size, int64_t count, std::vector<int32_t>& found) {
  found.resize(size_t(size));
  const float top = kernels.largest(scores, size), least = -std::numeric_limits<float>::max();
  // From `low` on there are enough, from `high` on too few.
  float low = top, high = INFINITE;
  int64_t num_found = kernels.count(scores, size, low);
  for (float below = 4.0f; num_found < count && low > least; below *= 2.0f) {
    high = low;
    low = below > 1e4f || count == size ? least : top - below;
    num_found = kernels.count(scores, size, low);
  }
  for (int step = 0; step < 16 && num_found > 2 * count && high < INFINITE; step++) {
    const float middle = low + (high - low) / 2;
    const int64_t num_above = kernels.count(scores, size, middle);
    (num_above >= count ? low : high) = middle;
    if (num_above >= count) num_found = num_above;
  }
  num_found = kernels.collect(scores, size, low, INFINITE, found.data());
  count = std::min(count, num_found);
  const auto is_better = [&](int32_t a, int32_t b) { return scores[a] > scores[b] || (scores[a] == scores[b] && a < b); };
  std::nth_element(found.begin(), found.begin() + count, found.begin() + num_found, is_better);
  found.resize(size_t(count));
}

struct Ranked {
  float score;
  int32_t token;
  bool operator<(const Ranked& other) const {
    return score > other.score || (score == other.score && token < other.token);
  }
};

// The best so far, best first, of offers that come in any order.
class Leaders {
 public:
  explicit Leaders(int64_t count) : count_(size_t(count)) {}

  bool can_lead(float score) const { return best_.size() < count_ || score >= best_.back().score; }

  void offer(Ranked each) {
    if (!can_lead(each.score)) return;
    best_.insert(std::upper_bound(best_.begin(), best_.end(), each), each);
    if (best_.size() > count_) best_.pop_back();
  }

  const std::vector<Ranked>& best() const { return best_; }

 private:
  size_t count_;
  std::vector<Ranked> best_;
};

}  // namespace

void easyspec_rank(void* engine, const float* logits, int64_t stride, int64_t num_rows, int64_t num_columns,
                   const int32_t* names, const uint64_t* seeds, const int64_t* positions, const float* temperatures, int64_t num_noised,
                   int64_t count, int32_t* token_ids, float* scores) {
  const Kernels& kernels = ((Engine*)engine)->kernels;
  std::vector<int32_t>& found = ((Engine*)engine)->scratch.found;
  for (int64_t r = 0; r < num_rows; r++) {
    const float* row = logits + r * stride;
    const bool is_greedy = temperatures[r] == 0.0f;
    find_best(kernels, row, num_columns, is_greedy ? count : std::max(num_noised, count), found);
    Leaders leaders(count);
    const Noise noise(seeds[r], positions[r]);
    const float top = kernels.largest(row, num_columns), temperature = std::max(temperatures[r], MIN_TEMPERATURE);
    for (const int32_t column : found) {
      const int32_t token = names ? names[column] : column;
      if (is_greedy) {
        leaders.offer({row[column], token});
        continue;
      }
      const uint32_t bits = noise.bits(token);
      const float score = std::max((row[column] - top) / temperature, -1e30f);
      if (leaders.can_lead(score + Noise::most(std::countl_one(bits)))) leaders.offer({score + Noise::of_bits(bits), token});
    }
    for (int64_t i = 0; i < count; i++) {
      const bool is_there = i < int64_t(leaders.best().size());
      token_ids[r * count + i] = is_there ? leaders.best()[size_t(i)].token : -1;
      scores[r * count + i] = is_there ? leaders.best()[size_t(i)].score : -INFINITE;
    }
  }
}
