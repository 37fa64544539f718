// Every kernel of every code path against sums in double precision, and rows alone against rows among others.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "check.h"
#include "engine.h"

using namespace easyspec;

namespace {

// Rows as a product by a weight reads them, in memory that ends where they do.
struct Inputs {
  InputForm form;
  int64_t row_bytes;
  std::vector<uint8_t> bytes;

  Inputs(const Kernels& k, const Packed& weight, const std::vector<float>& rows, int64_t num_rows, int64_t width)
      : form(k.input_form(weight)) {
    row_bytes = form == InputForm::FLOATS     ? width * 4
                : form == InputForm::BFLOAT16 ? width * 2
                : form == InputForm::BYTES    ? width / GROUP * int64_t(sizeof(ByteGroup))
                                              : width / GROUP * int64_t(sizeof(WordGroup));
    bytes.resize(size_t(num_rows * row_bytes));
    if (form == InputForm::FLOATS)
      std::memcpy(bytes.data(), rows.data(), bytes.size());
    else
      for (int64_t r = 0; r < num_rows; r++) k.convert(form, rows.data() + r * width, bytes.data() + r * row_bytes, 0, width);
  }

  double at(int64_t row, int64_t input) const {
    const uint8_t* from = bytes.data() + row * row_bytes;
    const int64_t place = (input & ~3) | (input & 1) << 1 | (input & 2) >> 1;
    switch (form) {
      case InputForm::FLOATS: return double(((const float*)from)[input]);
      case InputForm::BFLOAT16: return double(from_bfloat16(((const uint16_t*)from)[input]));
      case InputForm::BYTES: {
        const ByteGroup& group = ((const ByteGroup*)from)[input / GROUP];
        return double(group.codes[input % GROUP]) * double(group.scale);
      }
      default: {
        const WordGroup& group = ((const WordGroup*)from)[input / GROUP];
        return double(group.codes[place % GROUP]) * double(group.scale);
      }
    }
  }
};

std::vector<float> padded_rows(Random& random, int64_t num_rows, int64_t size, int64_t width) {
  std::vector<float> rows(size_t(num_rows * width), 0.0f);
  for (int64_t r = 0; r < num_rows; r++)
    for (int64_t i = 0; i < size; i++) rows[size_t(r * width + i)] = random.number();
  return rows;
}

void check_product(const Kernels& k, const Weight& weight, Random& random, int64_t num_rows = 17) {
  const Packed& w = weight.packed;
  const int64_t width = round_up(w.num_inputs, ROW_MULTIPLE), panels = num_panels(w), stride = panels * PANEL;
  const std::vector<float> rows = padded_rows(random, num_rows, w.num_inputs, width);
  const std::vector<float> bias = numbers(random, stride);
  const Inputs x(k, w, rows, num_rows, width);
  std::vector<float> out(size_t(num_rows * stride), 2.0f), alone(size_t(stride), 2.0f), half(size_t(stride), 2.0f);
  k.product(w, x.bytes.data(), x.row_bytes, num_rows, 0, panels, bias.data(), out.data(), stride, true);
  for (int64_t o = 0; o < w.num_outputs; o++) {
    std::vector<float> values(size_t(w.num_inputs));
    easyspec_unpack_row(&w, o, values.data());
    for (int64_t r = 0; r < num_rows; r++) {
      double sum = 2.0 + double(bias[size_t(o)]), size = 3.0;
      for (int64_t i = 0; i < w.num_inputs; i++) {
        sum += double(values[size_t(i)]) * x.at(r, i);
        size += std::fabs(double(values[size_t(i)]) * x.at(r, i));
      }
      const double found = double(out[size_t(r * stride + o)]);
      CHECK(std::fabs(found - sum) <= 1e-6 * size, "format %d, row %d, output %d: %.9g, not %.9g", w.format, int(r),
              int(o), found, sum);
    }
  }
  for (int64_t r = 0; r < num_rows; r++) {
    std::fill(alone.begin(), alone.end(), 2.0f);
    for (int64_t panel = 0; panel < panels; panel++)
      k.product(w, x.bytes.data() + r * x.row_bytes, x.row_bytes, 1, panel, panel + 1, bias.data(), alone.data(), stride, true);
    CHECK(std::memcmp(alone.data(), out.data() + r * stride, size_t(stride) * 4) == 0, "format %d, row %d", w.format, int(r));
  }
}

void check_products(const Kernels& k) {
  Random random(1);
  for (int64_t num_inputs : {32, 100, 577})
    for (int32_t format : {FLOAT32, BFLOAT16, FLOAT16})
      for (int64_t num_rows : {17, 53}) check_product(k, dense_weight(random, format, 57, num_inputs), random, num_rows);
  for (int64_t num_inputs : {32, 100, 512})
    for (int32_t format : {INT8, INT4})
      for (int32_t options = 0; options < 16; options++) {
        const bool has_halves = options & 4, has_byte_inputs = options & 8;
        if (has_halves && format != INT8) continue;
        const Packed shape = {nullptr,    57, num_inputs, format, options & 1, options >> 1 & 1,
                              has_halves, has_byte_inputs};
        for (const bool is_whole : {false, true}) check_product(k, coded_weight(random, shape, is_whole), random);
      }
}

double activated(Activation activation, double x) {
  if (activation == Activation::SILU) return x / (1.0 + std::exp(-x));
  return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

void check_gated(const Kernels& k) {
  Random random(2);
  const int64_t num_rows = 9, size = 100, width = 128, num_outputs = 40, stride = 48;
  for (int32_t format : {FLOAT32, BFLOAT16, FLOAT16, INT8, INT4})
    for (Activation activation : {Activation::SILU, Activation::GELU_TANH}) {
      const Weight gate = any_weight(random, format, num_outputs, size), up = any_weight(random, format, num_outputs, size);
      const std::vector<float> rows = padded_rows(random, num_rows, size, width), bias = numbers(random, stride);
      const Inputs x(k, gate.packed, rows, num_rows, width);
      std::vector<float> gates(size_t(num_rows * stride)), ups(gates), out(gates);
      k.product(gate.packed, x.bytes.data(), x.row_bytes, num_rows, 0, 3, bias.data(), gates.data(), stride, false);
      k.product(up.packed, x.bytes.data(), x.row_bytes, num_rows, 0, 3, nullptr, ups.data(), stride, false);
      k.gated(gate.packed, up.packed, x.bytes.data(), x.row_bytes, x.bytes.data(), x.row_bytes, nullptr, num_rows, 0, 3,
              bias.data(), nullptr, activation, out.data(), stride);
      for (size_t i = 0; i < out.size(); i++) {
        const double wanted = activated(activation, double(gates[i])) * double(ups[i]);
        const double size = (1.0 + std::fabs(double(gates[i]))) * (1.0 + std::fabs(double(ups[i])));
        CHECK(std::fabs(double(out[i]) - wanted) <= 1e-6 * size, "format %d: %.9g, not %.9g", format,
              double(out[i]), wanted);
      }
    }
}

void check_rows(const Kernels& k) {
  Random random(3);
  for (int64_t size : {16, 100, 576}) {
    const int64_t width = round_up(size, ROW_MULTIPLE);
    const std::vector<float> x = padded_rows(random, 1, size, width), weight = padded_rows(random, 1, size, width);
    std::vector<float> out(size_t(width), -1.0f), sums(size_t(width), 0.0f), turned(x);
    k.norm(x.data(), weight.data(), nullptr, out.data(), size, 1e-5f, false);
    double squares = 0.0;
    for (int64_t i = 0; i < size; i++) squares += double(x[size_t(i)]) * double(x[size_t(i)]);
    for (int64_t i = 0; i < width; i++) {
      const double wanted = double(x[size_t(i)]) / std::sqrt(squares / double(size) + 1e-5) * double(weight[size_t(i)]);
      CHECK(std::fabs(double(out[size_t(i)]) - wanted) < 2e-6, "norm of %d: %.9g, not %.9g", int(size), double(out[size_t(i)]), wanted);
    }
    k.add(x.data(), weight.data(), sums.data(), width);
    for (int64_t i = 0; i < width; i++) CHECK(sums[size_t(i)] == x[size_t(i)] + weight[size_t(i)], "sum %d", int(i));
    const int64_t half = size / 4;
    const std::vector<float> angles = numbers(random, 2 * half);
    k.rotate(turned.data(), angles.data(), angles.data() + half, 2 * half, size, 0.5f);
    for (int64_t i = 0; i < half; i++) {
      const double a = double(x[size_t(i)]), b = double(x[size_t(i + half)]), c = double(angles[size_t(i)]), s = double(angles[size_t(i + half)]);
      CHECK(std::fabs(double(turned[size_t(i)]) - 0.5 * (a * c - b * s)) < 1e-6, "turned %d", int(i));
      CHECK(std::fabs(double(turned[size_t(i + half)]) - 0.5 * (b * c + a * s)) < 1e-6, "turned %d", int(i));
    }
  }
}

// Rows of one segment, whose texts are slots of a small memory.
struct Texts {
  int64_t head_dim, num_rows, num_queries, num_slots = 700, width;
  int32_t format;
  std::vector<uint8_t> keys, values;
  std::vector<float> queries, sinks, out;
  std::vector<int64_t> committed;
  std::vector<std::vector<int64_t>> extra;
  std::vector<const int64_t*> extra_pointers;
  std::vector<int32_t> num_committed, num_extra;
  AttentionCall call;

  Texts(Random& random, int64_t head_dim_, int64_t num_rows_, int64_t num_queries_, int32_t format_, int64_t length)
      : head_dim(head_dim_), num_rows(num_rows_), num_queries(num_queries_), width(round_up(head_dim_, 16)), format(format_) {
    queries = numbers(random, num_rows * num_queries * head_dim);
    sinks = numbers(random, num_queries);
    out.resize(queries.size());
    for (int64_t i = 0; i < length; i++) committed.push_back(random.below(num_slots));
    for (int64_t r = 0; r < num_rows; r++) {
      num_committed.push_back(int32_t(std::max<int64_t>(0, length - random.below(3))));
      extra.emplace_back(size_t(1 + random.below(12)));
      for (int64_t& slot : extra.back()) slot = random.below(num_slots);
      num_extra.push_back(int32_t(extra.back().size()));
    }
    for (const auto& each : extra) extra_pointers.push_back(each.data());
    const int64_t number_bytes = format == FLOAT32 ? 4 : 2;
    for (auto* plane : {&keys, &values}) {
      plane->assign(size_t(num_slots * width * number_bytes), 0);
      for (int64_t slot = 0; slot < num_slots; slot++)
        for (int64_t d = 0; d < head_dim; d++) put(*plane, slot * width + d, random.number());
    }
    call = {queries.data(), num_queries * head_dim, out.data(), num_queries * head_dim, keys.data(), values.data(),
            width * number_bytes, format, int32_t(head_dim), int32_t(num_rows), int32_t(num_queries), committed.data(),
            num_committed.data(), extra_pointers.data(), num_extra.data(), 0, 0.0f, nullptr};
  }

  void put(std::vector<uint8_t>& plane, int64_t i, float value) const {
    if (format == FLOAT32) ((float*)plane.data())[i] = value;
    if (format == BFLOAT16) ((uint16_t*)plane.data())[i] = to_bfloat16(value);
    if (format == FLOAT16) ((uint16_t*)plane.data())[i] = to_float16(value);
  }
  double get(const std::vector<uint8_t>& plane, int64_t slot, int64_t d) const {
    const int64_t i = slot * width + d;
    if (format == FLOAT32) return double(((const float*)plane.data())[i]);
    const uint16_t bits = ((const uint16_t*)plane.data())[i];
    return double(format == BFLOAT16 ? from_bfloat16(bits) : from_float16(bits));
  }
  int64_t length(int64_t row) const { return num_committed[size_t(row)] + num_extra[size_t(row)]; }
  int64_t slot(int64_t row, int64_t position) const {
    const int64_t behind = position - num_committed[size_t(row)];
    return behind < 0 ? committed[size_t(position)] : extra[size_t(row)][size_t(behind)];
  }

  std::vector<double> wanted(int64_t row, int64_t query) const {
    const float* q = queries.data() + (row * num_queries + query) * head_dim;
    const int64_t begin = call.window > 0 ? std::max<int64_t>(0, length(row) - call.window) : 0;
    std::vector<double> sums(size_t(head_dim), 0.0);
    double total = call.sinks ? std::exp(double(sinks[size_t(query)])) : 0.0;
    for (int64_t p = begin; p < length(row); p++) {
      double score = 0.0;
      for (int64_t d = 0; d < head_dim; d++) score += double(q[d]) * get(keys, slot(row, p), d);
      if (call.soft_cap > 0.0f) score = double(call.soft_cap) * std::tanh(score / double(call.soft_cap));
      total += std::exp(score);
      for (int64_t d = 0; d < head_dim; d++) sums[size_t(d)] += std::exp(score) * get(values, slot(row, p), d);
    }
    for (double& sum : sums) sum /= total;
    return sums;
  }
};

// The spans of a call one after the other, as a program does it.
void attend(const Kernels& k, const Texts& texts, const AttentionCall& call, int64_t longest, float* out) {
  const int64_t stride = partial_floats(call.head_dim), num_queries = int64_t(call.num_rows) * call.num_queries;
  std::vector<float> total(size_t(num_queries * stride)), part(total);
  bool has_begun[MAX_QUERIES] = {}, is_seen[MAX_QUERIES];
  for (int64_t span = 0; span * SPAN < longest; span++) {
    k.attend_span(call, span, part.data(), is_seen);
    for (int64_t q = 0; q < num_queries; q++) {
      const int64_t r = q / call.num_queries;
      if (!is_seen[r]) continue;
      if (has_begun[q])
        k.fold(total.data() + q * stride, part.data() + q * stride, call.head_dim);
      else
        std::copy_n(part.data() + q * stride, stride, total.data() + q * stride);
      has_begun[q] = true;
    }
  }
  for (int64_t q = 0; q < num_queries; q++) {
    const float* sink = call.sinks ? call.sinks + q % call.num_queries : nullptr;
    k.finish_attention(total.data() + q * stride, call.head_dim, sink, out + q * texts.head_dim);
  }
}

void check_attention(const Kernels& k) {
  Random random(4);
  for (int64_t head_dim : {16, 64, 80, 120})
    for (int32_t format : {FLOAT32, BFLOAT16, FLOAT16})
      for (int64_t length : {0, 7, 250, 530})
        for (int options = 0; options < 4; options++) {
          Texts texts(random, head_dim, 1 + random.below(7), 1 + random.below(4), format, length);
          texts.call.window = options & 1 ? 100 : 0;
          texts.call.soft_cap = options & 1 ? 3.0f : 0.0f;
          texts.call.sinks = options & 2 ? texts.sinks.data() : nullptr;
          int64_t longest = 0;
          for (int64_t r = 0; r < texts.num_rows; r++) longest = std::max(longest, texts.length(r));
          attend(k, texts, texts.call, longest, texts.out.data());
          const int64_t per_row = texts.num_queries * head_dim;
          for (int64_t r = 0; r < texts.num_rows; r++) {
            for (int64_t g = 0; g < texts.num_queries; g++) {
              const std::vector<double> wanted = texts.wanted(r, g);
              for (int64_t d = 0; d < head_dim; d++) {
                const double found = double(texts.out[size_t(r * per_row + g * head_dim + d)]);
                CHECK(std::fabs(found - wanted[size_t(d)]) < 2e-5, "head of %d, length %d, row %d: %.9g, not %.9g",
                      int(head_dim), int(length), int(r), found, wanted[size_t(d)]);
              }
            }
            AttentionCall alone = texts.call;
            alone.queries += r * per_row;
            alone.num_rows = 1;
            alone.num_committed += r;
            alone.extra += r;
            alone.num_extra += r;
            std::vector<float> out(static_cast<size_t>(per_row));
            attend(k, texts, alone, texts.length(r), out.data());
            CHECK(std::memcmp(out.data(), texts.out.data() + r * per_row, size_t(per_row) * 4) == 0, "row %d alone", int(r));
          }
        }
}

void check_choices(const Kernels& k) {
  Random random(5);
  const float infinite = std::numeric_limits<float>::infinity();
  for (int64_t size = 1; size < 300; size += 7) {
    std::vector<float> x = numbers(random, size);
    for (float& each : x) each = random.below(9) == 0 ? -infinite : each * 9.0f;
    x[size_t(random.below(size))] = 8.5f;
    float top = -infinite;
    double total = 0.0;
    for (float each : x) top = std::max(top, each);
    for (float each : x) total += std::exp((double(each) - double(top)) * 0.5);
    CHECK(k.largest(x.data(), size) == top, "of %d", int(size));
    CHECK(std::fabs(k.sum_exponentials(x.data(), size, top, 0.5f) / total - 1.0) < 1e-5, "of %d", int(size));
    std::vector<float> powers(x.size());
    k.exponentials(x.data(), size, powers.data());
    for (size_t i = 0; i < x.size(); i++)
      CHECK(std::fabs(double(powers[i]) - std::exp(double(x[i]))) <= 1e-6 * std::exp(double(x[i])), "exp(%g)", double(x[i]));
    std::vector<int32_t> found(x.size()), wanted;
    for (size_t i = 0; i < x.size(); i++)
      if (x[i] >= -2.0f && x[i] < 4.0f) wanted.push_back(int32_t(i));
    found.resize(size_t(k.collect(x.data(), size, -2.0f, 4.0f, found.data())));
    CHECK(found == wanted, "of %d", int(size));
  }
}

}  // namespace

int main() {
#ifdef EMULATES_AVX512
  const int32_t paths[] = {int32_t(Path::AVX512_BF16)};
#else
  std::vector<int32_t> paths(size_t(easyspec_best_path() + 1));
  std::iota(paths.begin(), paths.end(), 0);
#endif
  for (const int32_t path : paths) {
    const Kernels& kernels = kernels_of(Path(path));
    CHECK(path == 0 || &kernels != &portable_kernels(), "path %d is not compiled in", path);
    check_products(kernels);
    check_gated(kernels);
    check_rows(kernels);
    check_attention(kernels);
    check_choices(kernels);
    std::printf("path %d: sound\n", path);
  }
}
