// What each code path offers. The bits of a row of any result depend on that row's inputs alone, and for attention on
// the keys and values that the row sees in the order of their positions; never on the other rows of the call.
#pragma once

#include "packed.h"

namespace easyspec {

enum class Path : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

// CLAMPED_SWIGLU is of gates alone: min(gate, 7) / (1 + exp(-1.702 gate)) * (up within 7 of 0, + 1).
enum class Activation : int32_t { SILU = 0, GELU_TANH = 1, CLAMPED_SWIGLU = 2 };

// What a product reads: rows as they are, or rounded for its weights. SMALL_WORDS are rounded like BYTES and kept like
// WORDS, where bytes have no instruction of their own.
enum class InputForm : int32_t { FLOATS = 0, BFLOAT16 = 1, WORDS = 2, SMALL_WORDS = 3, BYTES = 4 };

// 32 inputs of a row rounded to 16 bits: codes * scale. A quad of them stands as inputs 0, 2, 1, 3, so that the even
// and the odd bytes of a word of four weights meet theirs. Products with 8-bit codes, summed over a group, fit 32 bits.
struct WordGroup {
  int16_t codes[GROUP];
  float scale;
  float sum;             // scale * sum of the codes
  int32_t small_excess;  // -8 * sum of the codes: what 4-bit weights that are codes + 8 come to too much
  int32_t excess;        // -128 * sum of the codes: likewise, for 8 bits
  int32_t first_excess;  // of the first 16 codes
};

// The same rounded to 8 bits, in order.
struct ByteGroup {
  int8_t codes[GROUP];
  float scale;
  float sum;
  int32_t small_excess;
  int32_t excess;
  int32_t first_excess;
};

constexpr float MAX_WORD = 32767.0f, MAX_BYTE = 127.0f;

constexpr int64_t SPAN = 256;   // positions whose attention is one partial sum; borders are absolute
constexpr int64_t MAX_QUERIES = 64;  // rows times query heads of a KV head
constexpr int64_t MAX_HEAD_DIM = 512;

// Rows of one segment that attend together, at one KV head.
struct AttentionCall {
  const float* queries;      // row r, query head g at queries + r * query_stride + g * head_dim
  int64_t query_stride;
  float* out;                // likewise
  int64_t out_stride;
  const uint8_t* keys;       // of this layer and head: slot s at keys + s * slot_bytes
  const uint8_t* values;
  int64_t slot_bytes;
  int32_t kv_format;         // FLOAT32, BFLOAT16 or FLOAT16
  int32_t head_dim;
  int32_t num_rows;
  int32_t num_queries;       // query heads of the KV head
  const int64_t* committed;  // slots by position, the same for all rows
  const int32_t* num_committed;  // of each row
  const int64_t* const* extra;   // slots behind them, of each row
  const int32_t* num_extra;
  int32_t window;            // how many positions a row sees, its own included; 0: all
  float soft_cap;            // 0: none
  const float* sinks;        // one a query head of the KV head, or null
  // Keys that this thread will probably be asked for next.
  const uint8_t* next_keys = nullptr;
  const int64_t* next_slots = nullptr;
  int64_t num_next = 0;
};

// A sum over some positions: `total` = sum of exp(score - largest), `values` the same weighted, [head_dim].
struct Partial {
  float largest;
  float total;
  float values[1];
};

inline int64_t partial_floats(int64_t head_dim) { return round_up(2 + round_up(head_dim, 16), 16); }

struct Kernels {
  // Form of input that a product by such weights reads.
  InputForm (*input_form)(const Packed& weight);
  // Columns begin..end of a row, whole groups, in `form`.
  void (*convert)(InputForm form, const float* row, uint8_t* out, int64_t begin, int64_t end);
  // Columns of panels begin..end: out = x W' + bias, or out += that. `x` rows are in the format's input form.
  void (*product)(const Packed& w, const uint8_t* x, int64_t x_bytes, int64_t num_rows, int64_t begin, int64_t end,
                  const float* bias, float* out, int64_t out_stride, bool adds);
  // out = activation(x gate') * (x up'); row m of `out` is made of row `row_numbers[m]`, or m if that is null.
  void (*gated)(const Packed& gate, const Packed& up, const uint8_t* gate_x, int64_t gate_bytes, const uint8_t* up_x,
                int64_t up_bytes, const int32_t* row_numbers, int64_t num_rows, int64_t begin, int64_t end,
                const float* gate_bias, const float* up_bias, Activation activation, float* out, int64_t out_stride);
  // out = x / sqrt(mean of squares + eps) * weight + bias over `size` columns; `is_centred`: of x less its mean. out may
  // be x, bias null.
  void (*norm)(const float* x, const float* weight, const float* bias, float* out, int64_t size, float eps,
               bool is_centred);
  void (*activate)(Activation activation, float* row, int64_t size);
  // Dimension i of the first `size` turned against i + size / 2; then all `head_dim` scaled.
  void (*rotate)(float* head, const float* cosines, const float* sines, int64_t size, int64_t head_dim, float scale);
  // One partial sum per row and query head, over the positions of span number `span`; false if a row sees none there.
  void (*attend_span)(const AttentionCall& call, int64_t span, float* partials, bool* is_seen);
  // `into` becomes the sum over its own positions and, behind them, those of `other`.
  void (*fold)(float* into, const float* other, int64_t head_dim);
  void (*finish_attention)(const float* partial, int64_t head_dim, const float* sink, float* out);
  // into[i] = a[i] + b[i]
  void (*add)(const float* a, const float* b, float* into, int64_t size);
  float (*largest)(const float* x, int64_t size);
  // Whether none is NaN or infinite.
  bool (*are_finite)(const float* x, int64_t size);
  // Sum of exp((x - top) * factor).
  double (*sum_exponentials)(const float* x, int64_t size, float top, float factor);
  void (*exponentials)(const float* x, int64_t size, float* out);
  // How many are at least `low`.
  int64_t (*count)(const float* x, int64_t size, float low);
  // Indices, rising, of what is at least `low` and below `high`; returns how many. `indices` has room for `size`.
  int64_t (*collect)(const float* x, int64_t size, float low, float high, int32_t* indices);
  // The same of the tokens whose noise has at least `least` for its bits; `state` is that of the first (packed.h).
  int64_t (*collect_lucky)(const float* x, int64_t size, float low, float high, uint64_t state, uint32_t least,
                           int32_t* indices);
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null where not compiled in
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace easyspec
