// Which experts the rows of a pass choose, and the rows sorted by them.
//
// A row chooses and adds up by its own logits alone: of equal ones the expert with the lower number, sums in the order of
// choice. What is sorted is only where its parts stand.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace easyspec {

struct Dispatch {
  Dispatch(int64_t num_experts, int64_t num_chosen) : starts(size_t(num_experts) + 1), num_chosen_(num_chosen) {}

  std::vector<int64_t> starts;       // [experts + 1], places of each expert's rows
  std::vector<int32_t> row_numbers;  // of each place
  std::vector<int32_t> active;       // experts that a row chose, rising

  void begin(int64_t num_rows) {
    const size_t num_places = size_t(num_rows * num_chosen_);
    experts_.resize(num_places);
    shares_.resize(num_places);
    places_.resize(num_places);
    row_numbers.resize(num_places);
    is_taken_.assign(starts.size() - 1, 0);
  }

  // Chooses by a row's `logits` [experts]; writes the chosen experts' numbers and then their shares to `routes`.
  void choose(int64_t row, const float* logits, bool is_normalised, float* routes) {
    const int64_t num_experts = int64_t(starts.size()) - 1;
    int32_t* experts = experts_.data() + row * num_chosen_;
    float* shares = shares_.data() + row * num_chosen_;
    for (int64_t j = 0; j < num_chosen_; j++) {
      int32_t best = -1;
      for (int64_t e = 0; e < num_experts; e++)
        if (!is_taken_[size_t(e)] && (best < 0 || logits[e] > logits[best])) best = int32_t(e);
      is_taken_[size_t(best)] = 1;
      experts[j] = best;
    }
    const float top = logits[experts[0]];
    float total = 0.0f;
    if (is_normalised)
      for (int64_t j = 0; j < num_chosen_; j++) total += std::exp(logits[experts[j]] - top);
    else
      for (int64_t e = 0; e < num_experts; e++) total += std::exp(logits[e] - top);
    for (int64_t j = 0; j < num_chosen_; j++) {
      shares[j] = std::exp(logits[experts[j]] - top) / total;
      is_taken_[size_t(experts[j])] = 0;
      routes[j] = float(experts[j]);
      routes[num_chosen_ + j] = shares[j];
    }
  }

  // Places for all pairs of a row and an expert, by expert and then by row.
  void sort() {
    std::fill(starts.begin(), starts.end(), 0);
    for (int32_t expert : experts_) starts[size_t(expert) + 1]++;
    active.clear();
    for (size_t e = 0; e + 1 < starts.size(); e++) {
      if (starts[e + 1] > 0) active.push_back(int32_t(e));
      starts[e + 1] += starts[e];
    }
    next_.assign(starts.begin(), starts.end());
    for (size_t pair = 0; pair < experts_.size(); pair++) {
      places_[pair] = next_[size_t(experts_[pair])]++;
      row_numbers[size_t(places_[pair])] = int32_t(int64_t(pair) / num_chosen_);
    }
  }

  // out = sum over a row's experts of share * part, or out += that.
  void combine(int64_t row, const float* parts, int64_t part_width, float* out, int64_t width, bool adds) const {
    for (int64_t begin = 0; begin < width; begin += BLOCK) {
      const int64_t count = std::min(BLOCK, width - begin);
      float sums[BLOCK] = {};
      for (int64_t j = 0; j < num_chosen_; j++) {
        const size_t pair = size_t(row * num_chosen_ + j);
        const float *part = parts + places_[pair] * part_width + begin, share = shares_[pair];
        for (int64_t i = 0; i < count; i++) sums[i] += share * part[i];
      }
      for (int64_t i = 0; i < count; i++) out[begin + i] = adds ? out[begin + i] + sums[i] : sums[i];
    }
  }

 private:
  static constexpr int64_t BLOCK = 64;
  const int64_t num_chosen_;
  std::vector<int32_t> experts_;  // [rows][chosen]
  std::vector<float> shares_;
  std::vector<int64_t> places_, next_;
  std::vector<uint8_t> is_taken_;
};

}  // namespace easyspec
