// A program: the operations of a pass, sorted into phases of operations that do not touch each other's results.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <unordered_map>
#include <vector>

#include "api.h"
#include "engine.h"
#include "experts.h"

using namespace easyspec;

namespace {

// A buffer's rows rounded for products of some formats.
struct Rounded {
  int32_t buffer;
  InputForm form;
  int64_t row_bytes;
  std::vector<uint8_t> storage;
  uint8_t* data = nullptr;
};

constexpr int32_t CONVERT = 100;

struct Op {
  EasyspecOp spec;
  std::vector<int32_t> parts, outputs;
  int32_t rounded = -1, second_rounded = -1;  // what PRODUCT, GATED and CONVERT read or write
  std::vector<int32_t> also_rounds;           // what NORM, GATED and ATTEND round of their result on the side
  int64_t phase = 0, number = 0;
  size_t dispatch = 0;  // of ROUTE, and of what goes by it
};

// Rows of one segment that attend together.
struct RowBlock {
  int64_t first, count;
  int64_t first_span, num_spans;
};

constexpr int64_t MIN_PIECE_BYTES = 96 * 1024;
// Below so many numbers a second thread arrives when the first is done.
constexpr int64_t MIN_SHARED_NUMBERS = 8192;

class Program final : public Work {
 public:
  Program(Engine& engine, const EasyspecOp* ops, int64_t num_ops, const int64_t* widths, const int32_t* rows_of_buffer,
          int64_t num_buffers)
      : engine_(engine), widths_(widths, widths + num_buffers), per_row_(rows_of_buffer, rows_of_buffer + num_buffers) {
    for (int64_t i = 0; i < num_ops; i++) append(ops[i]);
    sort_into_phases();
  }

  int64_t num_phases() const override { return int64_t(phases_.size()); }
  int64_t num_pieces(int64_t phase) const override { return pieces_[phase]; }

  // Memory that grows with the pass is taken before the threads begin: where there is none, nothing has been computed.
  void execute(const EasyspecPass& pass) {
    pass_ = &pass;
    for (auto& rounded : rounded_) reserve(rounded);
    if (has_attention_) plan_attention();
    for (size_t phase = 0; phase < phases_.size(); phase++) {
      int64_t total = 0;
      for (Op* op : phases_[phase]) total += count_pieces(*op);
      pieces_[phase] = total;
    }
    engine_.threads.run(*this);
  }

  void run(int64_t phase, int64_t piece, int thread) override {
    (void)thread;
    for (Op* op : phases_[phase]) {
      const int64_t count = count_pieces(*op);
      if (piece < count) return run_piece(*op, piece, count);
      piece -= count;
    }
  }

 private:
  // ------------------------------------------------------------------------------------------------ preparation

  void append(const EasyspecOp& spec) {
    auto op = std::make_unique<Op>();
    op->spec = spec;
    if (spec.kind == EASYSPEC_ACCUMULATE) {
      op->parts.assign(spec.parts, spec.parts + spec.num_parts);
      op->outputs.assign(spec.outputs, spec.outputs + spec.num_parts);
    }
    if (spec.kind == EASYSPEC_PRODUCT || spec.kind == EASYSPEC_GATED) op->rounded = round_for(spec.input, *spec.weight);
    if (spec.kind == EASYSPEC_GATED) op->second_rounded = round_for(spec.input, *spec.second);
    if (is_by_expert(spec)) op->rounded = round_for(spec.input, *spec.experts[0]);
    if (spec.kind == EASYSPEC_EXPERT_GATED) op->second_rounded = round_for(spec.input, *spec.second_experts[0]);
    if (spec.kind == EASYSPEC_ROUTE) {
      op->dispatch = dispatches_.size();
      dispatches_.emplace_back(spec.num_experts, spec.num_chosen);
      dispatch_of_buffer_[spec.output] = op->dispatch;
    }
    if (is_by_expert(spec) || spec.kind == EASYSPEC_COMBINE) op->dispatch = dispatch_of_buffer_.at(spec.routes);
    has_attention_ = has_attention_ || spec.kind == EASYSPEC_ATTEND;
    for (int32_t buffer : written_by(*op)) forget_rounded(buffer);
    ops_.push_back(std::move(op));
  }

  // The buffer in the form that products by `weight` read; -1 for rows as they are.
  int32_t round_for(int32_t buffer, const Packed& weight) {
    const InputForm form = engine_.kernels.input_form(weight);
    if (form == InputForm::FLOATS) return -1;
    const int32_t index = rounded_place(buffer, form);
    if (is_current_[index]) return index;
    is_current_[index] = true;
    Op* writer = ops_.empty() ? nullptr : ops_.back().get();
    if (writer && can_round(*writer, buffer)) {
      writer->also_rounds.push_back(index);
      return index;
    }
    auto op = std::make_unique<Op>();
    op->spec = EasyspecOp{};
    op->spec.kind = CONVERT;
    op->spec.input = buffer;
    op->rounded = index;
    ops_.push_back(std::move(op));
    return index;
  }

  // Layers take turns with a buffer's rounded rows as with the buffer itself: one place each would be as large as the
  // keys and values of a long prompt. What reads the last contents comes in an earlier phase (`sort_into_phases`).
  int32_t rounded_place(int32_t buffer, InputForm form) {
    for (size_t i = 0; i < rounded_.size(); i++)
      if (rounded_[i].buffer == buffer && rounded_[i].form == form) return int32_t(i);
    const int64_t group_bytes = form == InputForm::BFLOAT16 ? 2 * GROUP
                                : form == InputForm::BYTES  ? int64_t(sizeof(ByteGroup))
                                                            : int64_t(sizeof(WordGroup));
    rounded_.push_back({buffer, form, widths_[buffer] / GROUP * group_bytes, {}, nullptr});
    is_current_.push_back(false);
    return int32_t(rounded_.size()) - 1;
  }

  // Whether an operation's pieces come to whole groups of columns of `buffer`.
  bool can_round(const Op& op, int32_t buffer) const {
    if (op.spec.output != buffer) return false;
    if (op.spec.kind == EASYSPEC_NORM) return !op.spec.is_part;
    if (op.spec.kind == EASYSPEC_GATED || op.spec.kind == EASYSPEC_EXPERT_GATED) return true;
    return op.spec.kind == EASYSPEC_ATTEND &&
           op.spec.num_heads / op.spec.num_kv_heads * op.spec.head_dim % GROUP == 0;
  }

  void forget_rounded(int32_t buffer) {
    for (size_t i = 0; i < rounded_.size(); i++)
      if (rounded_[i].buffer == buffer) is_current_[i] = false;
  }

  // Resources: buffers, then keys and values of layers, then rounded buffers.
  static constexpr int32_t LAYERS = 1 << 20, ROUNDED = 1 << 21;

  std::vector<int32_t> written_by(const Op& op) const {
    std::vector<int32_t> found;
    switch (op.spec.kind) {
      case EASYSPEC_ACCUMULATE:
        for (int32_t buffer : op.outputs)
          if (buffer >= 0) found.push_back(buffer);
        break;
      case EASYSPEC_ROTATE: found = {op.spec.input, LAYERS + op.spec.layer}; break;
      case EASYSPEC_SCALE:
      case EASYSPEC_ACTIVATE: found = {op.spec.input}; break;
      case CONVERT: found = {ROUNDED + op.rounded}; break;
      default: found = {op.spec.output};
    }
    for (int32_t rounded : op.also_rounds) found.push_back(ROUNDED + rounded);
    return found;
  }

  std::vector<int32_t> read_by(const Op& op) const {
    std::vector<int32_t> found;
    switch (op.spec.kind) {
      case EASYSPEC_EMBED: break;
      case EASYSPEC_ATTEND: found = {op.spec.input, LAYERS + op.spec.layer}; break;
      case EASYSPEC_ACCUMULATE:
        found = op.parts;
        found.push_back(op.spec.input);
        break;
      case EASYSPEC_PRODUCT:
      case EASYSPEC_GATED:
        found = {op.rounded < 0 ? op.spec.input : ROUNDED + op.rounded};
        if (op.spec.kind == EASYSPEC_GATED) found.push_back(op.second_rounded < 0 ? op.spec.input : ROUNDED + op.second_rounded);
        if (op.spec.adds) found.push_back(op.spec.output);
        break;
      case EASYSPEC_EXPERT_GATED:
      case EASYSPEC_EXPERT_PRODUCT:
        found = {op.spec.routes, op.rounded < 0 ? op.spec.input : ROUNDED + op.rounded};
        if (op.spec.kind == EASYSPEC_EXPERT_GATED)
          found.push_back(op.second_rounded < 0 ? op.spec.input : ROUNDED + op.second_rounded);
        break;
      case EASYSPEC_COMBINE:
        found = {op.spec.input, op.spec.routes};
        if (op.spec.adds) found.push_back(op.spec.output);
        break;
      default: found = {op.spec.input};
    }
    return found;
  }

  void sort_into_phases() {
    auto meet = [](const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
      return std::find_first_of(a.begin(), a.end(), b.begin(), b.end()) != a.end();
    };
    std::vector<std::vector<int32_t>> reads, writes;
    for (size_t i = 0; i < ops_.size(); i++) {
      reads.push_back(read_by(*ops_[i]));
      writes.push_back(written_by(*ops_[i]));
      int64_t phase = 0;
      for (size_t j = 0; j < i; j++) {
        if (ops_[j]->phase < phase) continue;
        if (meet(writes[j], reads[i]) || meet(writes[j], writes[i]) || meet(reads[j], writes[i]))
          phase = ops_[j]->phase + 1;
      }
      ops_[i]->phase = phase;
      ops_[i]->number = int64_t(i);
      if (int64_t(phases_.size()) <= phase) phases_.resize(phase + 1);
      phases_[phase].push_back(ops_[i].get());
    }
    pieces_.resize(phases_.size());
  }

  // -------------------------------------------------------------------------------------------------- each pass

  int64_t rows_of(int32_t buffer) const {
    return per_row_[buffer] == 0 ? pass_->num_selected : pass_->num_rows * per_row_[buffer];
  }

  float* row(int32_t buffer, int64_t index) const { return pass_->buffers[buffer] + index * widths_[buffer]; }

  void reserve(Rounded& rounded) const {
    const size_t bytes = size_t(rows_of(rounded.buffer) * rounded.row_bytes) + 64;
    if (rounded.storage.size() < bytes) {
      rounded.storage.assign(bytes, 0);
      rounded.data = rounded.storage.data() + (64 - (uintptr_t)rounded.storage.data() % 64) % 64;
    }
  }

  void plan_attention() {
    // One KV head's queries of as many rows as a call takes; long contexts of few rows are cut at the borders of spans.
    const EasyspecPass& p = *pass_;
    int64_t per_row = 1, kv_heads = 1;
    for (const auto& op : ops_)
      if (op->spec.kind == EASYSPEC_ATTEND) {
        per_row = std::max<int64_t>(per_row, op->spec.num_heads / op->spec.num_kv_heads);
        kv_heads = op->spec.num_kv_heads;
      }
    const int64_t most = std::max<int64_t>(1, std::min<int64_t>(24, MAX_QUERIES) / per_row);
    blocks_.clear();
    for (int64_t first = 0; first < p.num_rows;) {
      int64_t count = 1;
      while (first + count < p.num_rows && count < most && p.segment_of_row[first + count] == p.segment_of_row[first])
        count++;
      blocks_.push_back({first, count, 0, 0});
      first += count;
    }
    const bool has_few = int64_t(blocks_.size()) * kv_heads < 4 * engine_.threads.num_threads();
    units_.clear();
    num_partials_ = 0;
    for (size_t i = 0; i < blocks_.size(); i++) {
      RowBlock& block = blocks_[i];
      int64_t length = 0;
      for (int64_t r = block.first; r < block.first + block.count; r++) length = std::max(length, length_of(r));
      block.num_spans = (length + SPAN - 1) / SPAN;
      const bool is_cut = has_few && block.num_spans > 1 && engine_.threads.num_threads() > 1;
      if (is_cut) {
        block.first_span = num_partials_;
        for (int64_t span = 0; span < block.num_spans; span++) units_.push_back({int64_t(i), span});
        num_partials_ += block.num_spans;
      } else {
        units_.push_back({int64_t(i), -1});
      }
    }
    const size_t num_counters = blocks_.size() * size_t(kv_heads) * ops_.size();
    if (num_counters_ < num_counters) {
      counters_ = std::make_unique<std::atomic<int32_t>[]>(num_counters);
      num_counters_ = num_counters;
    }
    if (num_partials_ > 0)
      for (size_t i = 0; i < num_counters; i++) counters_[i].store(0, std::memory_order_relaxed);
    size_t floats = 0;
    for (auto& op : ops_)
      if (op->spec.kind == EASYSPEC_ATTEND) {
        const size_t needed = size_t(num_partials_ * op->spec.num_kv_heads * MAX_QUERIES * partial_floats(op->spec.head_dim));
        floats = std::max(floats, needed);
      }
    if (partials_.size() < floats) partials_.resize(floats);
    if (seen_.size() < size_t(num_partials_ * kv_heads * MAX_QUERIES))
      seen_.resize(size_t(num_partials_ * kv_heads * MAX_QUERIES));
  }

  int64_t length_of(int64_t row) const {
    return int64_t(pass_->num_committed[row]) + pass_->first_extra[row + 1] - pass_->first_extra[row];
  }

  // Panels of one piece: enough bytes to be worth taking, few enough for all threads to have some.
  int64_t panels_per_piece(const Packed& weight) const {
    const int64_t panels = num_panels(weight), threads = engine_.threads.num_threads();
    if (threads == 1) return round_up(panels, 2);
    const int64_t by_bytes = std::max<int64_t>(1, MIN_PIECE_BYTES / std::max<int64_t>(1, panel_bytes(weight)));
    const int64_t by_threads = std::max<int64_t>(1, panels / (threads * 4));
    return round_up(std::max<int64_t>(1, std::min(by_bytes, by_threads)), 2);
  }

  // Rows of one piece of an operation that goes row by row over `width` columns.
  int64_t rows_per_piece(int64_t num_rows, int64_t width) const {
    const int64_t threads = engine_.threads.num_threads();
    if (threads == 1 || num_rows * width < MIN_SHARED_NUMBERS) return std::max<int64_t>(1, num_rows);
    return std::max<int64_t>(1, num_rows / (4 * threads));
  }

  int64_t count_pieces(const Op& op) const {
    int32_t buffer = op.spec.output;
    switch (op.spec.kind) {
      case EASYSPEC_PRODUCT:
      case EASYSPEC_GATED: {
        if (rows_of(op.spec.input) == 0) return 0;
        const int64_t each = panels_per_piece(*op.spec.weight);
        return (num_panels(*op.spec.weight) + each - 1) / each;
      }
      case EASYSPEC_EXPERT_GATED:
      case EASYSPEC_EXPERT_PRODUCT: {
        // Which experts are chosen is not known yet: there is work for at most so many.
        const int64_t most = std::min<int64_t>(op.spec.num_experts, pass_->num_rows * op.spec.num_chosen);
        return most * pieces_of_expert(op);
      }
      case EASYSPEC_ROUTE: return 1;
      case EASYSPEC_ATTEND: return int64_t(units_.size()) * op.spec.num_kv_heads;
      case EASYSPEC_ACCUMULATE:
      case EASYSPEC_ROTATE:
      case EASYSPEC_SCALE:
      case EASYSPEC_ACTIVATE:
      case CONVERT: buffer = op.spec.input; break;
      default: break;
    }
    const int64_t rows = rows_of(buffer), each = rows_per_piece(rows, widths_[buffer]);
    return (rows + each - 1) / each;
  }

  void run_piece(Op& op, int64_t piece, int64_t count) {
    if (op.spec.kind == EASYSPEC_PRODUCT || op.spec.kind == EASYSPEC_GATED) return multiply(op, piece);
    if (op.spec.kind == EASYSPEC_ATTEND) return attend(op, piece);
    if (is_by_expert(op.spec)) return multiply_by_expert(op, piece);
    if (op.spec.kind == EASYSPEC_ROUTE) return route(op);
    const bool is_by_input = op.spec.kind == EASYSPEC_ACCUMULATE || op.spec.kind == EASYSPEC_ROTATE ||
                             op.spec.kind == EASYSPEC_SCALE || op.spec.kind == EASYSPEC_ACTIVATE ||
                             op.spec.kind == CONVERT;
    const int32_t buffer = is_by_input ? op.spec.input : op.spec.output;
    const int64_t rows = rows_of(buffer), each = rows_per_piece(rows, widths_[buffer]);
    const int64_t end = piece + 1 == count ? rows : std::min(rows, (piece + 1) * each);
    for (int64_t r = piece * each; r < end; r++) run_row(op, r);
  }

  void run_row(const Op& op, int64_t r) {
    const EasyspecOp& s = op.spec;
    const EasyspecPass& p = *pass_;
    switch (s.kind) {
      case EASYSPEC_EMBED: {
        float* out = row(s.output, r);
        easyspec_unpack_row(s.weight, p.token_ids[r], out);
        for (int64_t i = 0; i < s.weight->num_inputs; i++) out[i] *= s.factor;
        std::fill(out + s.weight->num_inputs, out + widths_[s.output], 0.0f);
        return;
      }
      case EASYSPEC_NORM: {
        float* out = row(s.output, r);
        if (s.is_part) return norm_part(s, r);
        engine_.kernels.norm(row(s.input, r), s.norm, s.bias, out, s.width, s.eps, s.is_centred);
        for (int32_t index : op.also_rounds) convert(index, r, 0, widths_[s.output]);
        return;
      }
      case EASYSPEC_ACTIVATE:
        engine_.kernels.activate(Activation(s.activation), row(s.input, r), widths_[s.input]);
        return;
      case EASYSPEC_COMBINE: {
        dispatches_[op.dispatch].combine(r, row(s.input, 0), widths_[s.input], row(s.output, r), widths_[s.output],
                                         s.adds != 0);
        return;
      }
      case EASYSPEC_SELECT:
        std::copy_n(row(s.input, p.selected_rows[r]), widths_[s.input], row(s.output, r));
        return;
      case EASYSPEC_SCALE: {
        float* at = row(s.input, r);
        for (int64_t i = 0; i < widths_[s.input]; i++) {
          at[i] *= s.factor;
          if (s.soft_cap > 0.0f) at[i] = s.soft_cap * std::tanh(at[i] / s.soft_cap);
        }
        return;
      }
      case EASYSPEC_ACCUMULATE: {
        const float* before = row(s.input, r);
        for (size_t i = 0; i < op.parts.size(); i++) {
          // A sum that is not wanted itself stands where the last one will.
          float* into = row(op.outputs[i] >= 0 ? op.outputs[i] : op.outputs.back(), r);
          engine_.kernels.add(before, row(op.parts[i], r), into, widths_[s.input]);
          before = into;
        }
        return;
      }
      case CONVERT: return convert(op.rounded, r, 0, widths_[s.input]);
      case EASYSPEC_ROTATE: return rotate(s, r);
    }
  }

  void convert(int32_t index, int64_t r, int64_t begin, int64_t end) {
    Rounded& rounded = rounded_[index];
    engine_.kernels.convert(rounded.form, row(rounded.buffer, r), rounded.data + r * rounded.row_bytes, begin, end);
  }

  void rotate(const EasyspecOp& s, int64_t r) {
    const EasyspecPass& p = *pass_;
    const Kernels& k = engine_.kernels;
    const int64_t half = s.rotary_dim / 2, position = p.positions[r], dim = s.head_dim;
    const float *cosines = s.cosines + position * half, *sines = s.sines + position * half;
    float* heads = row(s.input, r);
    const int64_t padded = round_up(dim, ROW_MULTIPLE);
    alignas(64) float head[MAX_HEAD_DIM + ROW_MULTIPLE];
    for (int64_t h = 0; h < s.num_heads + s.num_kv_heads; h++) {
      const bool is_query = h < s.num_heads;
      const float* weight = is_query ? s.norm : s.second_norm;
      std::copy_n(heads + h * dim, dim, head);
      std::fill(head + dim, head + padded, 0.0f);
      if (weight && !s.is_norm_last) k.norm(head, weight, nullptr, head, dim, s.eps, false);
      k.rotate(head, cosines, sines, s.rotary_dim, dim, is_query && !s.is_norm_last ? s.factor : 1.0f);
      if (weight && s.is_norm_last) {
        k.norm(head, weight, nullptr, head, dim, s.eps, false);
        if (is_query) k.rotate(head, cosines, sines, 0, dim, s.factor);
      }
      if (is_query)
        std::copy_n(head, dim, heads + h * dim);
      else
        write(s, p.keys, h - s.num_heads, p.slots[r], head);
    }
    for (int64_t h = 0; h < s.num_kv_heads; h++)
      write(s, p.values, h, p.slots[r], heads + (s.num_heads + s.num_kv_heads + h) * dim);
  }

  void write(const EasyspecOp& s, uint8_t* plane, int64_t head, int64_t slot, const float* from) {
    const EasyspecPass& p = *pass_;
    uint8_t* to = plane + ((int64_t(s.layer) * s.num_kv_heads + head) * p.num_slots + slot) * p.slot_bytes;
    for (int64_t d = 0; d < s.head_dim; d++) {
      if (p.kv_format == FLOAT32) ((float*)to)[d] = from[d];
      if (p.kv_format == BFLOAT16) ((uint16_t*)to)[d] = to_bfloat16(from[d]);
      if (p.kv_format == FLOAT16) ((uint16_t*)to)[d] = to_float16(from[d]);
    }
  }

  void norm_part(const EasyspecOp& s, int64_t r) {
    static thread_local std::vector<float> storage;
    const size_t padded = size_t(round_up(s.width, ROW_MULTIPLE));
    if (storage.size() < padded) storage.resize(padded);
    std::copy_n(row(s.input, r) + s.column, s.width, storage.data());
    std::fill(storage.begin() + s.width, storage.begin() + padded, 0.0f);
    engine_.kernels.norm(storage.data(), s.norm, s.bias, storage.data(), s.width, s.eps, s.is_centred);
    std::copy_n(storage.data(), s.width, row(s.output, r) + s.column);
  }

  static bool is_by_expert(const EasyspecOp& s) {
    return s.kind == EASYSPEC_EXPERT_GATED || s.kind == EASYSPEC_EXPERT_PRODUCT;
  }

  int64_t pieces_of_expert(const Op& op) const {
    const int64_t each = panels_per_piece(*op.spec.experts[0]);
    return (num_panels(*op.spec.experts[0]) + each - 1) / each;
  }

  void route(const Op& op) {
    const EasyspecOp& s = op.spec;
    Dispatch& dispatch = dispatches_[op.dispatch];
    dispatch.begin(pass_->num_rows);
    for (int64_t r = 0; r < pass_->num_rows; r++)
      dispatch.choose(r, row(s.input, r), s.is_normalised != 0, row(s.output, r));
    dispatch.sort();
  }

  // Some panels of one of the chosen experts, for all rows that chose it.
  void multiply_by_expert(Op& op, int64_t piece) {
    const EasyspecOp& s = op.spec;
    const Dispatch& dispatch = dispatches_[op.dispatch];
    const int64_t parts = pieces_of_expert(op), place = piece / parts;
    if (place >= int64_t(dispatch.active.size())) return;
    const int64_t expert = dispatch.active[size_t(place)], first = dispatch.starts[size_t(expert)];
    const int64_t rows = dispatch.starts[size_t(expert) + 1] - first;
    const Packed& weight = *s.experts[expert];
    const int64_t each = panels_per_piece(weight), begin = piece % parts * each;
    const int64_t end = std::min(num_panels(weight), begin + each);
    const int64_t width = widths_[s.output];
    if (end == num_panels(weight))
      for (int64_t r = first; r < first + rows; r++) std::fill(row(s.output, r) + end * PANEL, row(s.output, r) + width, 0.0f);
    const float* bias = s.expert_biases ? s.expert_biases[expert] : nullptr;
    if (s.kind == EASYSPEC_EXPERT_PRODUCT) {
      const Input input = input_of(s.input, op.rounded);
      engine_.kernels.product(weight, input.data + first * input.row_bytes, input.row_bytes, rows, begin, end, bias,
                              row(s.output, first), width, false);
      return;
    }
    const Input gate = input_of(s.input, op.rounded), up = input_of(s.input, op.second_rounded);
    engine_.kernels.gated(weight, *s.second_experts[expert], gate.data, gate.row_bytes, up.data, up.row_bytes,
                          dispatch.row_numbers.data() + first, rows, begin, end, bias,
                          s.second_expert_biases ? s.second_expert_biases[expert] : nullptr, Activation(s.activation),
                          row(s.output, first), width);
    for (int32_t index : op.also_rounds)
      for (int64_t r = first; r < first + rows; r++)
        convert(index, r, begin * PANEL, std::min(width, round_up(end * PANEL, GROUP)));
  }

  struct Input {
    const uint8_t* data;
    int64_t row_bytes;
  };

  // A buffer's rows as they are (`rounded` -1), or rounded for products.
  Input input_of(int32_t buffer, int32_t rounded) const {
    if (rounded < 0) return {(const uint8_t*)row(buffer, 0), widths_[buffer] * 4};
    return {rounded_[rounded].data, rounded_[rounded].row_bytes};
  }

  void multiply(Op& op, int64_t piece) {
    const EasyspecOp& s = op.spec;
    const int64_t each = panels_per_piece(*s.weight), begin = piece * each;
    const int64_t end = std::min(num_panels(*s.weight), begin + each), rows = rows_of(s.input);
    const Input input = input_of(s.input, op.rounded);
    // Columns behind the last panel are read as zeros; those behind another product's place are its own.
    const int64_t behind = s.column + end * PANEL;
    if (end == num_panels(*s.weight) && behind > widths_[s.output] - ROW_MULTIPLE)
      for (int64_t r = 0; r < rows; r++)
        std::fill(row(s.output, r) + behind, row(s.output, r) + widths_[s.output], 0.0f);
    if (s.kind == EASYSPEC_PRODUCT) {
      engine_.kernels.product(*s.weight, input.data, input.row_bytes, rows, begin, end, s.bias,
                              row(s.output, 0) + s.column, widths_[s.output], s.adds != 0);
      return;
    }
    const Input second = input_of(s.input, op.second_rounded);
    engine_.kernels.gated(*s.weight, *s.second, input.data, input.row_bytes, second.data, second.row_bytes, nullptr, rows,
                          begin, end, s.bias, s.second_bias, Activation(s.activation), row(s.output, 0),
                          widths_[s.output]);
    for (int32_t index : op.also_rounds)
      for (int64_t r = 0; r < rows; r++)
        convert(index, r, begin * PANEL, std::min(widths_[s.output], round_up(end * PANEL, GROUP)));
  }

  void attend(Op& op, int64_t piece) {
    const EasyspecOp& s = op.spec;
    const EasyspecPass& p = *pass_;
    const int64_t head = piece % s.num_kv_heads;
    const auto [index, span] = units_[size_t(piece / s.num_kv_heads)];
    const RowBlock& block = blocks_[size_t(index)];
    const int64_t per_row = s.num_heads / s.num_kv_heads, stride = partial_floats(s.head_dim);
    const int64_t* extra[MAX_QUERIES];
    int32_t num_extra[MAX_QUERIES];
    for (int64_t r = 0; r < block.count; r++) {
      extra[r] = p.extra + p.first_extra[block.first + r];
      num_extra[r] = p.first_extra[block.first + r + 1] - p.first_extra[block.first + r];
    }
    if (head == 0 && span <= 0)
      for (int64_t r = 0; r < block.count; r++) {
        float* out = row(s.output, block.first + r);
        std::fill(out + s.num_heads * s.head_dim, out + widths_[s.output], 0.0f);
      }
    AttentionCall call;
    call.queries = row(s.input, block.first) + head * per_row * s.head_dim;
    call.query_stride = widths_[s.input];
    call.out = row(s.output, block.first) + head * per_row * s.head_dim;
    call.out_stride = widths_[s.output];
    const int64_t plane = (int64_t(s.layer) * s.num_kv_heads + head) * p.num_slots * p.slot_bytes;
    call.keys = p.keys + plane;
    call.values = p.values + plane;
    call.slot_bytes = p.slot_bytes;
    call.kv_format = int32_t(p.kv_format);
    call.head_dim = s.head_dim;
    call.num_rows = int32_t(block.count);
    call.num_queries = int32_t(per_row);
    call.committed = p.committed[p.segment_of_row[block.first]];
    call.num_committed = p.num_committed + block.first;
    call.extra = extra;
    call.num_extra = num_extra;
    call.window = s.window;
    call.soft_cap = s.soft_cap;
    call.sinks = s.sinks ? s.sinks + head * per_row : nullptr;
    if (span < 0) {
      attend_whole(op, call, block, stride);
    } else {
      expect_next(call, piece + engine_.threads.num_threads(), s);
      const int64_t at = (block.first_span * s.num_kv_heads) + head * block.num_spans + span;
      bool is_seen[MAX_QUERIES];
      engine_.kernels.attend_span(call, span, partials_.data() + at * MAX_QUERIES * stride, is_seen);
      for (int64_t r = 0; r < block.count; r++) seen_[size_t(at * MAX_QUERIES + r)] = is_seen[r];
      std::atomic<int32_t>& counter = counters_[size_t((op.number * int64_t(blocks_.size()) + index) * s.num_kv_heads + head)];
      if (counter.fetch_add(1, std::memory_order_acq_rel) + 1 < block.num_spans) return;
      fold_spans(call, block, head, s, stride);
    }
    for (int32_t rounded : op.also_rounds)
      for (int64_t r = 0; r < block.count; r++)
        convert(rounded, block.first + r, head * per_row * s.head_dim, (head + 1) * per_row * s.head_dim);
  }

  // Names the keys of piece `next` of an operation, if there is such a piece.
  void expect_next(AttentionCall& call, int64_t next, const EasyspecOp& s) const {
    const EasyspecPass& p = *pass_;
    if (size_t(next / s.num_kv_heads) >= units_.size()) return;
    const auto [index, span] = units_[size_t(next / s.num_kv_heads)];
    if (span < 0) return;
    const int64_t row = blocks_[size_t(index)].first;
    const int64_t plane = (int64_t(s.layer) * s.num_kv_heads + next % s.num_kv_heads) * p.num_slots * p.slot_bytes;
    call.next_keys = p.keys + plane;
    call.next_slots = p.committed[p.segment_of_row[row]] + span * SPAN;
    call.num_next = std::min(SPAN, p.num_committed[row] - span * SPAN);
  }

  void attend_whole(const Op&, const AttentionCall& call, const RowBlock& block, int64_t stride) {
    static thread_local std::vector<float> storage;
    const size_t floats = size_t(2 * MAX_QUERIES * stride);
    if (storage.size() < floats) storage.resize(floats);
    float *total = storage.data(), *part = total + MAX_QUERIES * stride;
    bool has_begun[MAX_QUERIES] = {}, is_seen[MAX_QUERIES];
    for (int64_t span = 0; span < block.num_spans; span++) {
      engine_.kernels.attend_span(call, span, part, is_seen);
      for (int64_t r = 0; r < block.count; r++) {
        if (!is_seen[r]) continue;
        for (int64_t q = r * call.num_queries; q < (r + 1) * call.num_queries; q++) {
          if (has_begun[r])
            engine_.kernels.fold(total + q * stride, part + q * stride, call.head_dim);
          else
            std::copy_n(part + q * stride, stride, total + q * stride);
        }
        has_begun[r] = true;
      }
    }
    finish(call, block, total, stride);
  }

  void fold_spans(const AttentionCall& call, const RowBlock& block, int64_t head, const EasyspecOp& s, int64_t stride) {
    const int64_t first = block.first_span * s.num_kv_heads + head * block.num_spans;
    // Every row sees its own position, so some span has begun its sum.
    for (int64_t r = 0; r < block.count; r++) {
      float* total = nullptr;
      for (int64_t span = 0; span < block.num_spans; span++) {
        if (!seen_[size_t((first + span) * MAX_QUERIES + r)]) continue;
        float* part = partials_.data() + ((first + span) * MAX_QUERIES + r * call.num_queries) * stride;
        if (!total) {
          total = part;
          continue;
        }
        for (int64_t g = 0; g < call.num_queries; g++)
          engine_.kernels.fold(total + g * stride, part + g * stride, call.head_dim);
      }
      for (int64_t g = 0; g < call.num_queries; g++)
        engine_.kernels.finish_attention(total + g * stride, call.head_dim, call.sinks ? call.sinks + g : nullptr,
                                         call.out + r * call.out_stride + g * call.head_dim);
    }
  }

  void finish(const AttentionCall& call, const RowBlock& block, const float* total, int64_t stride) {
    for (int64_t r = 0; r < block.count; r++)
      for (int64_t g = 0; g < call.num_queries; g++)
        engine_.kernels.finish_attention(total + (r * call.num_queries + g) * stride, call.head_dim,
                                         call.sinks ? call.sinks + g : nullptr,
                                         call.out + r * call.out_stride + g * call.head_dim);
  }

  Engine& engine_;
  std::vector<int64_t> widths_;
  std::vector<int32_t> per_row_;  // rows of a buffer for each row of a pass; 0: the selected rows
  std::vector<Dispatch> dispatches_;  // of each ROUTE
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<Rounded> rounded_;
  std::vector<bool> is_current_;
  std::vector<std::vector<Op*>> phases_;
  std::vector<int64_t> pieces_;
  std::unordered_map<int32_t, size_t> dispatch_of_buffer_;
  bool has_attention_ = false;
  const EasyspecPass* pass_ = nullptr;
  std::vector<RowBlock> blocks_;
  std::vector<std::pair<int64_t, int64_t>> units_;  // row block, and its span or -1 for all
  int64_t num_partials_ = 0;
  std::vector<float> partials_;
  std::vector<uint8_t> seen_;
  std::unique_ptr<std::atomic<int32_t>[]> counters_;
  size_t num_counters_ = 0;
};

}  // namespace

int32_t easyspec_best_path() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // F16C, which older compilers cannot ask for, is older than AVX2: every processor with AVX2 has it.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && avx512_bf16_kernels()) return int32_t(Path::AVX512_BF16);
  if (has_avx512 && avx512_kernels()) return int32_t(Path::AVX512);
  if (has_avx2 && avx2_kernels()) return int32_t(Path::AVX2);
#endif
  return int32_t(Path::PORTABLE);
}

void* easyspec_engine_new(int32_t path, int32_t num_threads) { return new Engine(Path(path), num_threads); }

void easyspec_engine_use_threads(void* engine, int32_t num_threads) { ((Engine*)engine)->threads.use(num_threads); }

void easyspec_engine_free(void* engine) { delete (Engine*)engine; }

void* easyspec_program_new(void* engine, const EasyspecOp* ops, int64_t num_ops, const int64_t* widths,
                           const int32_t* rows_of_buffer, int64_t num_buffers) {
  return new Program(*(Engine*)engine, ops, num_ops, widths, rows_of_buffer, num_buffers);
}

void easyspec_program_free(void* program) { delete (Program*)program; }

namespace {

template <class Integer>
bool are_inside(const Integer* values, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; i++)
    if (values[i] < 0 || (size > 0 && int64_t(values[i]) >= size)) return false;
  return true;
}

int32_t first_out_of_range(const EasyspecPass& p) {
  if (!are_inside(p.token_ids, p.num_rows, p.num_tokens)) return 1;
  if (!are_inside(p.positions, p.num_rows, p.num_positions)) return 2;
  if (!are_inside(p.slots, p.num_rows, p.num_written_slots)) return 3;
  if (p.num_rows > 0 && !are_inside(p.extra, p.first_extra[p.num_rows], p.num_written_slots)) return 4;
  // Without rows it is a pass over hidden states, which are all selected.
  if (!are_inside(p.selected_rows, p.num_selected, p.num_rows > 0 ? p.num_rows : p.num_selected)) return 5;
  return 0;
}

}  // namespace

int32_t easyspec_program_run(void* program, const EasyspecPass* pass) {
  if (const int32_t wrong = first_out_of_range(*pass)) return wrong;
  try {
    ((Program*)program)->execute(*pass);
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

int64_t easyspec_program_num_phases(void* program) { return ((Program*)program)->num_phases(); }
