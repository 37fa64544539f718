// What Python calls, with plain C types (easyspec/ops/native.py mirrors the structures).
#pragma once

#include "kernels.h"

#pragma GCC visibility push(default)
extern "C" {

enum EasyspecOpKind : int32_t {
  EASYSPEC_EMBED = 0,
  EASYSPEC_NORM = 1,
  EASYSPEC_PRODUCT = 2,
  EASYSPEC_GATED = 3,
  EASYSPEC_ROTATE = 4,
  EASYSPEC_ATTEND = 5,
  EASYSPEC_ACCUMULATE = 6,
  EASYSPEC_SELECT = 7,
  EASYSPEC_SCALE = 8,
  EASYSPEC_ACTIVATE = 9,
  EASYSPEC_ROUTE = 10,
  EASYSPEC_EXPERT_GATED = 11,
  EASYSPEC_EXPERT_PRODUCT = 12,
  EASYSPEC_COMBINE = 13,
};

// One operation. Fields that its kind does not use are 0.
struct EasyspecOp {
  int32_t kind;
  int32_t layer;         // whose keys and values ROTATE writes and ATTEND reads
  int32_t input;         // buffer
  int32_t output;        // buffer
  int32_t adds;          // PRODUCT, COMBINE: output += instead of =
  int32_t activation;    // GATED, EXPERT_GATED, ACTIVATE
  int32_t num_heads;     // ROTATE, ATTEND: query heads
  int32_t num_kv_heads;  // likewise
  int32_t head_dim;      // likewise
  int32_t rotary_dim;    // ROTATE: 0 turns nothing
  int32_t window;        // ATTEND
  int32_t num_parts;     // ACCUMULATE
  int32_t column;        // PRODUCT: where its outputs begin in a row, a multiple of 16; NORM: where its columns begin
  int32_t width;         // NORM: columns
  int32_t is_part;       // NORM: of some columns of a row, where it leaves the others alone
  int32_t is_centred;    // NORM: of what is left without the mean
  int32_t is_norm_last;  // ROTATE: heads are turned, then normed
  int32_t routes;        // EXPERT_GATED, EXPERT_PRODUCT, COMBINE: the buffer that ROUTE wrote
  int32_t num_experts;   // ROUTE, EXPERT_GATED, EXPERT_PRODUCT
  int32_t num_chosen;    // ROUTE and what follows it: experts of a row
  int32_t is_normalised; // ROUTE: shares of the chosen ones add up to 1
  float eps;             // NORM, and the head norms of ROTATE
  float factor;          // EMBED, SCALE: a factor; ROTATE: of queries
  float soft_cap;        // ATTEND, SCALE
  const easyspec::Packed* weight;  // EMBED, PRODUCT; GATED: gate
  const easyspec::Packed* second;  // GATED: up
  const float* bias;               // PRODUCT; GATED: gate. Of whole panels. NORM: filled up like its weight, or null
  const float* second_bias;        // GATED: up
  const float* norm;               // NORM, filled up to whole groups with zeros; ROTATE: of query heads, or null
  const float* second_norm;        // ROTATE: of key heads
  const float* cosines;            // ROTATE: [positions][rotary_dim / 2]
  const float* sines;
  const float* sinks;              // ATTEND: one a query head, or null
  const int32_t* parts;            // ACCUMULATE: buffers
  const int32_t* outputs;          // ACCUMULATE: buffers, -1 where the sum so far is not wanted
  const easyspec::Packed* const* experts;         // EXPERT_PRODUCT; EXPERT_GATED: gates. One an expert
  const easyspec::Packed* const* second_experts;  // EXPERT_GATED: ups
  const float* const* expert_biases;              // like `bias`, or null
  const float* const* second_expert_biases;
};

// The rows of one pass, and where its buffers are.
struct EasyspecPass {
  int64_t num_rows;
  int64_t num_selected;
  const int32_t* token_ids;      // [rows]
  const int32_t* positions;      // [rows]
  const int64_t* slots;          // [rows], where keys and values go
  const int32_t* selected_rows;  // [selected]
  const int32_t* segment_of_row;
  const int64_t* const* committed;  // of each segment: slots by position
  const int32_t* num_committed;     // of each row
  const int64_t* extra;             // slots behind them, of all rows
  const int32_t* first_extra;       // [rows + 1]
  float* const* buffers;
  uint8_t* keys;    // slot s of KV head h of layer l at ((l * num_kv_heads + h) * num_slots + s) * slot_bytes
  uint8_t* values;
  int64_t num_slots;
  int64_t slot_bytes;
  int64_t kv_format;
  int64_t num_tokens;     // what token_ids, positions and slots stay below; 0: not looked at
  int64_t num_positions;
  int64_t num_written_slots;
};

// Where a token is to be chosen, and how (easyspec/speculation/sampling.py says what the numbers mean).
struct EasyspecChoice {
  float* logits;  // [V]; changed during the call and put back
  int64_t vocab_size;
  uint64_t seed;
  int64_t position;
  double top_p;
  float temperature;  // 0: greedy
  float min_p;
  float repetition;
  float presence;
  float frequency;
  int32_t top_k;  // 0: all
  const int64_t* bias_ids;
  const float* bias_values;
  int64_t num_biased;
  const int64_t* seen_ids;  // each token of prompt and output once, and how often it is in the output
  const float* counts;
  int64_t num_seen;
  const int64_t* path_ids;    // tokens between them and the row, and where each stands in seen_ids, or -1
  const int64_t* path_slots;
  int64_t num_path;
  const uint8_t* allowed_bits;  // bit V % 8 of byte V / 8, or null for all
};

// Code path that this machine can run: 0 portable, 1 AVX2, 2 AVX512, 3 AVX512 with BF16.
int32_t easyspec_best_path();

int64_t easyspec_packed_bytes(const easyspec::Packed* weight);
// Rows of `source` are `row_bytes` apart and in `source_format` (float32, bfloat16 or float16).
void easyspec_pack_dense(const easyspec::Packed* weight, const uint8_t* source, int32_t source_format,
                         int64_t row_bytes);
// codes [N][K]: int8, or 0 to 15 for 4 bit; scales [N][K / 32], or [N][K / 32][2] of half groups, and minima [N][K / 32]
// float32.
void easyspec_pack_codes(const easyspec::Packed* weight, const int8_t* codes, const float* scales,
                         const float* minima);
void easyspec_unpack_row(const easyspec::Packed* weight, int64_t row, float* out);

void* easyspec_engine_new(int32_t path, int32_t num_threads);
// Passes run on so many of its threads from now on, 1 to all.
void easyspec_engine_use_threads(void* engine, int32_t num_threads);
void easyspec_engine_free(void* engine);
// `rows_of_buffer`: how many rows a buffer has for each row of a pass; 0: the selected ones. `widths` are multiples of 32.
void* easyspec_program_new(void* engine, const EasyspecOp* ops, int64_t num_ops, const int64_t* widths,
                           const int32_t* rows_of_buffer, int64_t num_buffers);
void easyspec_program_free(void* program);
// The token; -1 if no logit is a number or none is allowed, -2 if there is no memory.
int64_t easyspec_choose(void* engine, const EasyspecChoice* choice);
// log(sum of exp(logits)) of a row.
double easyspec_log_sum(void* engine, const float* logits, int64_t vocab_size);
// The best `count` tokens of each row, best first, of equals the lower first; [rows][count]. Where a row's temperature is
// above 0, its likeliest `num_noised` are ranked by logit / temperature + noise, relative to the row's best logit.
// `names`: the token of each column, rising; null: its number.
void easyspec_rank(void* engine, const float* logits, int64_t stride, int64_t num_rows, int64_t num_columns,
                   const int32_t* names, const uint64_t* seeds, const int64_t* positions, const float* temperatures, int64_t num_noised,
                   int64_t count, int32_t* token_ids, float* scores);
// 0; -1 if there is no memory for it; or which of the pass's arrays has a value out of range: 1 token_ids, 2 positions,
// 3 slots, 4 extra, 5 selected_rows. Unless it is 0, nothing was computed.
int32_t easyspec_program_run(void* program, const EasyspecPass* pass);
int64_t easyspec_program_num_phases(void* program);
}
#pragma GCC visibility pop
