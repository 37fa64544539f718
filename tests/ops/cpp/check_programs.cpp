// Whole passes of a small model, and choices, by the functions that Python calls: the same bits on any number of threads
// and in any chunking, and nothing that sanitizers complain about.
#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "check.h"

using namespace easyspec;

namespace {

constexpr int64_t HIDDEN = 52, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 20, MLP = 72, VOCABULARY = 203, LAYERS = 2;
constexpr int64_t NUM_SLOTS = 1024, SLOT_FLOATS = 32, MAX_ROWS = 1024, ROTARY_DIM = 16;
constexpr int64_t WIDTHS[] = {64, 64, 192, 96, 96, 64, 224, 64, 64};
constexpr int32_t ROWS_PER_ROW[] = {1, 1, 1, 1, 1, 0, 0, 1, 1};  // 0: of selected rows alone
enum Buffer : int32_t { STATE, NORMED, QKV, ATTENDED, GATES, CHOSEN, LOGITS, FIRST_PART, SECOND_PART, NUM_BUFFERS };

// Rows that are computed together: of several texts, each behind tokens it has.
struct Batch {
  std::vector<int32_t> token_ids, positions, selected, segments, num_committed, first_extra = {0};
  std::vector<int64_t> slots, extra;
  std::vector<const int64_t*> committed;
};

class Model {
 public:
  Model(int32_t path, int32_t num_threads, int32_t format)
      : random_(uint64_t(format) + 7), engine_(easyspec_engine_new(path, num_threads)) {
    norm_ = numbers(random_, 64);
    std::fill(norm_.begin() + HIDDEN, norm_.end(), 0.0f);
    head_norm_ = numbers(random_, 32);
    std::fill(head_norm_.begin() + HEAD_DIM, head_norm_.end(), 0.0f);
    bias_ = numbers(random_, 192);
    sinks_ = numbers(random_, HEADS);
    angles_ = numbers(random_, 2 * MAX_ROWS * ROTARY_DIM);
    weights_.reserve(64);
    const Packed* table = add(FLOAT32, VOCABULARY, HIDDEN);
    append({.kind = EASYSPEC_EMBED, .output = STATE, .factor = 1.5f, .weight = table});
    for (int32_t layer = 0; layer < LAYERS; layer++) append_layer(layer, format);
    append({.kind = EASYSPEC_SELECT, .input = STATE, .output = CHOSEN});
    append({.kind = EASYSPEC_NORM, .input = CHOSEN, .output = CHOSEN, .width = HIDDEN, .eps = 1e-5f, .norm = norm_.data()});
    append({.kind = EASYSPEC_PRODUCT, .input = CHOSEN, .output = LOGITS, .weight = add(format, VOCABULARY, HIDDEN)});
    append({.kind = EASYSPEC_SCALE, .input = LOGITS, .factor = 2.0f, .soft_cap = 20.0f});
    program_ = easyspec_program_new(engine_, ops_.data(), int64_t(ops_.size()), WIDTHS, ROWS_PER_ROW, NUM_BUFFERS);
    keys_.assign(size_t(LAYERS * KV_HEADS * NUM_SLOTS * SLOT_FLOATS), 0.0f);
    values_ = keys_;
  }

  ~Model() {
    easyspec_program_free(program_);
    easyspec_engine_free(engine_);
  }

  void* engine() { return engine_; }

  // Logits of the selected rows, one after the other.
  std::vector<float> run(const Batch& batch) {
    const int64_t num_rows = int64_t(batch.token_ids.size()), num_selected = int64_t(batch.selected.size());
    std::vector<std::vector<float>> storage;
    std::vector<float*> buffers;
    for (int i = 0; i < NUM_BUFFERS; i++) {
      // What an earlier pass left there is no number.
      storage.emplace_back(size_t(WIDTHS[i] * (ROWS_PER_ROW[i] ? num_rows : num_selected)), NAN);
      buffers.push_back(storage.back().data());
    }
    const EasyspecPass pass = {
        num_rows, num_selected, batch.token_ids.data(), batch.positions.data(), batch.slots.data(), batch.selected.data(),
        batch.segments.data(), batch.committed.data(), batch.num_committed.data(), batch.extra.data(),
        batch.first_extra.data(), buffers.data(), (uint8_t*)keys_.data(), (uint8_t*)values_.data(), NUM_SLOTS,
        SLOT_FLOATS * 4, FLOAT32};
    CHECK(easyspec_program_run(program_, &pass) == 0, "there is memory");
    std::vector<float> logits;
    for (int64_t r = 0; r < num_selected; r++)
      logits.insert(logits.end(), buffers[LOGITS] + r * WIDTHS[LOGITS], buffers[LOGITS] + r * WIDTHS[LOGITS] + VOCABULARY);
    for (float each : logits) CHECK(std::isfinite(each), "a logit is %g", double(each));
    return logits;
  }

 private:
  void append_layer(int32_t layer, int32_t format) {
    const auto heads = [&](EasyspecOp op) {
      op.layer = layer;
      op.num_heads = HEADS;
      op.num_kv_heads = KV_HEADS;
      op.head_dim = HEAD_DIM;
      append(op);
    };
    const EasyspecOp norm = {.kind = EASYSPEC_NORM, .input = STATE, .output = NORMED, .width = HIDDEN, .eps = 1e-5f, .norm = norm_.data()};
    append(norm);
    append({.kind = EASYSPEC_PRODUCT, .input = NORMED, .output = QKV, .weight = add(format, (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), .bias = bias_.data()});
    heads({.kind = EASYSPEC_ROTATE, .input = QKV, .rotary_dim = ROTARY_DIM, .eps = 1e-5f, .factor = 0.25f, .norm = head_norm_.data(),
           .second_norm = head_norm_.data(), .cosines = angles_.data(), .sines = angles_.data() + MAX_ROWS * ROTARY_DIM});
    heads({.kind = EASYSPEC_ATTEND, .input = QKV, .output = ATTENDED, .window = layer == 0 ? 0 : 300, .sinks = layer == 0 ? nullptr : sinks_.data()});
    append({.kind = EASYSPEC_PRODUCT, .input = ATTENDED, .output = STATE, .adds = 1, .weight = add(format, HIDDEN, HEADS * HEAD_DIM)});
    append(norm);
    append({.kind = EASYSPEC_GATED, .input = NORMED, .output = GATES, .weight = add(format, MLP, HIDDEN), .second = add(format, MLP, HIDDEN)});
    append({.kind = EASYSPEC_PRODUCT, .input = GATES, .output = FIRST_PART, .weight = add(format, HIDDEN, MLP)});
    append({.kind = EASYSPEC_PRODUCT, .input = NORMED, .output = SECOND_PART, .weight = add(format, HIDDEN, HIDDEN)});
    append({.kind = EASYSPEC_ACCUMULATE, .input = STATE, .num_parts = 2, .parts = PARTS, .outputs = SUMS});
  }

  static constexpr int32_t PARTS[] = {FIRST_PART, SECOND_PART}, SUMS[] = {-1, STATE};

  const Packed* add(int32_t format, int64_t num_outputs, int64_t num_inputs) {
    weights_.push_back(any_weight(random_, format, num_outputs, num_inputs));
    return &weights_.back().packed;
  }

  void append(EasyspecOp op) { ops_.push_back(op); }

  Random random_;
  void* engine_;
  void* program_;
  std::vector<Weight> weights_;
  std::vector<EasyspecOp> ops_;
  std::vector<float> norm_, head_norm_, bias_, sinks_, angles_, keys_, values_;
};

int32_t token_at(int64_t text, int64_t position) { return int32_t((position * 31 + text * 7) % VOCABULARY); }

void add_row(Batch& batch, int64_t segment, int32_t token_id, int64_t position, int64_t slot, int64_t num_committed,
             const std::vector<int64_t>& extra) {
  batch.token_ids.push_back(token_id);
  batch.positions.push_back(int32_t(position));
  batch.slots.push_back(slot);
  batch.segments.push_back(int32_t(segment));
  batch.num_committed.push_back(int32_t(num_committed));
  batch.extra.insert(batch.extra.end(), extra.begin(), extra.end());
  batch.first_extra.push_back(int32_t(batch.extra.size()));
}

// Reads two texts in chunks, then runs a tree behind each, both in one pass or one after the other; returns all logits.
std::vector<float> read_and_grow(Model& model, const std::array<int64_t, 2>& lengths, int64_t chunk, bool is_together) {
  std::vector<int64_t> slots[2];
  for (int64_t text = 0; text < 2; text++)
    for (int64_t i = 0; i < lengths[text] + 3; i++) slots[text].push_back((i * 2 + text) * 3 % NUM_SLOTS);
  std::vector<float> logits;
  for (int64_t text = 0; text < 2; text++)
    for (int64_t begin = 0; begin < lengths[text]; begin += chunk) {
      Batch batch;
      batch.committed = {slots[text].data()};
      const int64_t end = std::min(lengths[text], begin + chunk);
      for (int64_t p = begin; p < end; p++) add_row(batch, 0, token_at(text, p), p, slots[text][size_t(p)], p + 1, {});
      if (end == lengths[text]) batch.selected = {int32_t(end - begin - 1)};
      const std::vector<float> last = model.run(batch);
      logits.insert(logits.end(), last.begin(), last.end());
    }
  Batch batch;
  for (int64_t text = 0; text < 2; text++) {
    if (!is_together) batch = {};
    // A root, two children, and a child of the second.
    const int64_t length = lengths[text], segment = int64_t(batch.committed.size());
    const int64_t* at = slots[text].data() + length - 1;  // its slot is computed anew
    const std::vector<int64_t> paths[] = {{at[0]}, {at[0], at[1]}, {at[0], at[2]}, {at[0], at[2], at[3]}};
    batch.committed.push_back(slots[text].data());
    for (int64_t row = 0; row < 4; row++) {
      batch.selected.push_back(int32_t(batch.token_ids.size()));
      const int64_t depth = int64_t(paths[row].size());
      add_row(batch, segment, token_at(text, length - 1 + row), length - 2 + depth, at[row], length - 1, paths[row]);
    }
    if (is_together && text == 0) continue;
    const std::vector<float> grown = model.run(batch);
    logits.insert(logits.end(), grown.begin(), grown.end());
  }
  return logits;
}

void check_bits(int32_t path, int32_t format) {
  Model alone(path, 1, format);
  for (const std::array<int64_t, 2> lengths : {std::array<int64_t, 2>{3, 340}, std::array<int64_t, 2>{290, 41}}) {
    const std::vector<float> wanted = read_and_grow(alone, lengths, 1, false);
    for (int32_t num_threads : {1, 2, 4})
      for (int64_t chunk : {7, 400}) {
        Model model(path, num_threads, format);
        const std::vector<float> found = read_and_grow(model, lengths, chunk, true);
        CHECK(found.size() == wanted.size() && std::memcmp(found.data(), wanted.data(), found.size() * 4) == 0,
              "path %d, format %d, %d threads, chunks of %d", path, format, num_threads, int(chunk));
      }
  }
}

void check_choices(void* engine) {
  Random random(11);
  for (int trial = 0; trial < 400; trial++) {
    const int64_t size = 1 + random.below(900);
    std::vector<float> logits = numbers(random, size), counts;
    for (float& each : logits) each = random.below(20) == 0 ? -std::numeric_limits<float>::infinity() : each * 12.0f;
    logits[size_t(random.below(size))] = 3.0f;
    std::vector<int64_t> seen, path, path_slots, biased;
    for (int64_t token = 0; token < size; token++)
      if (random.below(5) == 0) seen.push_back(token), counts.push_back(float(random.below(3)));
    for (int64_t i = random.below(6); i > 0; i--) {
      path.push_back(random.below(size));
      const auto at = std::find(seen.begin(), seen.end(), path.back());
      path_slots.push_back(at == seen.end() ? -1 : at - seen.begin());
    }
    for (int64_t i = random.below(4); i > 0; i--) biased.push_back(random.below(size));
    const std::vector<float> bias = numbers(random, int64_t(biased.size()));
    std::vector<uint8_t> allowed(size_t((size + 7) / 8));
    for (uint8_t& each : allowed) each = uint8_t(random.bits());
    EasyspecChoice choice = {};
    choice.logits = logits.data();
    choice.vocab_size = size;
    choice.seed = random.bits();
    choice.position = random.below(5000);
    choice.top_p = trial % 3 ? 0.05 + 0.9 * double(random.below(100)) / 100.0 : 1.0;
    choice.temperature = trial % 4 ? 0.3f * float(trial % 4) : 0.0f;
    choice.min_p = trial % 5 ? 0.0f : 0.02f;
    choice.repetition = trial % 2 ? 1.2f : 1.0f;
    choice.presence = trial % 7 ? 0.0f : 0.4f;
    choice.frequency = trial % 6 ? 0.0f : 0.3f;
    choice.top_k = trial % 8 ? 0 : int32_t(1 + random.below(40));
    choice.bias_ids = biased.data();
    choice.bias_values = bias.data();
    choice.num_biased = int64_t(biased.size());
    choice.seen_ids = seen.data();
    choice.counts = counts.data();
    choice.num_seen = int64_t(seen.size());
    choice.path_ids = path.data();
    choice.path_slots = path_slots.data();
    choice.num_path = int64_t(path.size());
    choice.allowed_bits = trial % 9 ? nullptr : allowed.data();
    const std::vector<float> before = logits;
    const int64_t token = easyspec_choose(engine, &choice);
    CHECK(std::memcmp(before.data(), logits.data(), logits.size() * 4) == 0, "trial %d leaves other logits", trial);
    const bool are_finite = std::all_of(before.begin(), before.end(), [](float each) { return std::isfinite(each); });
    const int64_t least = choice.allowed_bits || !are_finite ? -1 : 0;
    CHECK(token < size && token >= least && (are_finite || token == -1), "trial %d: token %d", trial, int(token));
    if (token < 0) continue;
    CHECK(std::isfinite(logits[size_t(token)]), "trial %d: token %d has no probability", trial, int(token));
    CHECK(!choice.allowed_bits || allowed[size_t(token / 8)] >> (token % 8) & 1, "trial %d: token %d", trial, int(token));
  }
}

void check_ranks(void* engine) {
  Random random(12);
  for (int64_t size : {3, 40, 1000}) {
    const int64_t stride = round_up(size, 32), count = 8;
    const std::vector<float> logits = numbers(random, 3 * stride);
    const uint64_t seeds[] = {1, 2, 3};
    const int64_t positions[] = {5, 6, 7};
    const float temperatures[] = {0.0f, 0.8f, 2.0f};
    int32_t token_ids[3 * count];
    float scores[3 * count];
    std::vector<int32_t> names;
    for (int64_t i = 0; i < size; i++) names.push_back(int32_t(3 * i));
    for (const int32_t* names_or_none : {(const int32_t*)nullptr, (const int32_t*)names.data()}) {
      easyspec_rank(engine, logits.data(), stride, 3, size, names_or_none, seeds, positions, temperatures, 64, count,
                    token_ids, scores);
      for (int64_t i = 0; i < 3 * count; i++) {
        CHECK((token_ids[i] >= 0) == (i % count < size), "%d of %d tokens", int(i % count), int(size));
        CHECK(i % count == 0 || scores[i] <= scores[i - 1], "token %d of %d", int(i % count), int(size));
        CHECK(!names_or_none || token_ids[i] < 0 || token_ids[i] % 3 == 0, "token %d", int(token_ids[i]));
      }
    }
    CHECK(easyspec_log_sum(engine, logits.data(), size) > 0.0, "of %d", int(size));
  }
}

}  // namespace

int main() {
  const int32_t slowest = std::getenv("ONLY_BEST_PATH") ? easyspec_best_path() : 0;
  for (int32_t path = slowest; path <= easyspec_best_path(); path++) {
    for (int32_t format : {FLOAT32, BFLOAT16, FLOAT16, INT8, INT4}) check_bits(path, format);
    void* engine = easyspec_engine_new(path, 1);
    check_choices(engine);
    check_ranks(engine);
    easyspec_engine_free(engine);
    std::printf("path %d: sound\n", path);
  }
}
