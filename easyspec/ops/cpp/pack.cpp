#include <vector>

#include "api.h"

using namespace easyspec;

namespace {

float number_at(const uint8_t* row, int32_t format, int64_t index) {
  if (format == FLOAT32) return ((const float*)row)[index];
  uint16_t bits = ((const uint16_t*)row)[index];
  return format == BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}

int64_t place(int32_t format, int64_t output, int64_t input) {
  if (format == BFLOAT16) return input / 2 * PANEL * 2 + output * 2 + input % 2;
  return input * PANEL + output;
}

void store_scale(const Packed& w, uint8_t* at, int64_t output, float scale) {
  if (w.scale_type == WIDE_SCALES)
    ((float*)at)[output] = scale;
  else
    ((uint16_t*)at)[output] = w.scale_type == BFLOAT16_SCALES ? to_bfloat16(scale) : to_float16(scale);
}

float scale_at(const Packed& w, const uint8_t* at, int64_t output) {
  if (w.scale_type == WIDE_SCALES) return ((const float*)at)[output];
  const uint16_t bits = ((const uint16_t*)at)[output];
  return w.scale_type == BFLOAT16_SCALES ? from_bfloat16(bits) : from_float16(bits);
}

}  // namespace

int64_t easyspec_packed_bytes(const Packed* w) { return num_panels(*w) * panel_bytes(*w); }

void easyspec_pack_dense(const Packed* w, const uint8_t* source, int32_t source_format, int64_t row_bytes) {
  const int64_t bytes = panel_bytes(*w);
  std::memset((void*)w->data, 0, size_t(num_panels(*w) * bytes));
  for (int64_t output = 0; output < w->num_outputs; output++) {
    uint8_t* panel = (uint8_t*)w->data + output / PANEL * bytes;
    const uint8_t* row = source + output * row_bytes;
    for (int64_t input = 0; input < w->num_inputs; input++) {
      const int64_t at = place(w->format, output % PANEL, input);
      if (w->format == source_format && w->format != FLOAT32) {
        ((uint16_t*)panel)[at] = ((const uint16_t*)row)[input];
        continue;
      }
      const float value = number_at(row, source_format, input);
      if (w->format == FLOAT32) ((float*)panel)[at] = value;
      if (w->format == BFLOAT16) ((uint16_t*)panel)[at] = to_bfloat16(value);
      if (w->format == FLOAT16) ((uint16_t*)panel)[at] = to_float16(value);
    }
  }
}

void easyspec_pack_codes(const Packed* w, const int8_t* codes, const float* scales, const float* minima) {
  const int64_t groups = num_groups(*w), bytes = group_bytes(*w);
  std::memset((void*)w->data, 0, size_t(num_panels(*w) * groups * bytes));
  for (int64_t output = 0; output < round_up(w->num_outputs, PANEL); output++) {
    const bool is_there = output < w->num_outputs;
    const int64_t o = output % PANEL;
    for (int64_t g = 0; g < groups; g++) {
      uint8_t* group = (uint8_t*)w->data + (output / PANEL * groups + g) * bytes;
      for (int64_t k = 0; k < GROUP; k++) {
        const int64_t input = g * GROUP + k;
        const bool has_code = is_there && input < w->num_inputs;
        const int8_t code = has_code ? codes[output * w->num_inputs + input] : 0;
        if (w->format == INT8)
          group[k / 4 * 64 + o * 4 + k % 4] = uint8_t(int(code) + 128);
        else
          group[k % 16 / 4 * 64 + o * 4 + k % 4] |= uint8_t(k < 16 ? code & 15 : (code & 15) << 4);
      }
      const int64_t parts = w->has_half_scales ? 2 : 1;
      uint8_t* behind = group + code_bytes(*w);
      for (int64_t part = 0; part < parts; part++, behind += scale_bytes(*w))
        store_scale(*w, behind, o, is_there ? scales[(output * groups + g) * parts + part] : 0.0f);
      if (w->has_minimum) store_scale(*w, behind, o, is_there ? minima[output * groups + g] : 0.0f);
    }
  }
}

void easyspec_unpack_row(const Packed* w, int64_t row, float* out) {
  const uint8_t* panel = w->data + row / PANEL * panel_bytes(*w);
  const int64_t o = row % PANEL;
  if (w->format < INT8) {
    for (int64_t input = 0; input < w->num_inputs; input++)
      out[input] = number_at(panel, w->format, place(w->format, o, input));
    return;
  }
  const int64_t bytes = group_bytes(*w);
  for (int64_t input = 0; input < w->num_inputs; input++) {
    const uint8_t* group = panel + input / GROUP * bytes;
    const int64_t k = input % GROUP;
    const float minimum = w->has_minimum ? scale_at(*w, group + bytes - scale_bytes(*w), o) : 0.0f;
    if (w->format == INT8) {
      const uint8_t* behind = group + code_bytes(*w) + (w->has_half_scales ? k / 16 * scale_bytes(*w) : 0);
      out[input] = float(int(group[k / 4 * 64 + o * 4 + k % 4]) - 128) * scale_at(*w, behind, o) + minimum;
      continue;
    }
    const uint8_t both = group[k % 16 / 4 * 64 + o * 4 + k % 4];
    const int code = k < 16 ? both & 15 : both >> 4;
    const float scale = scale_at(*w, group + code_bytes(*w), o);
    if (w->format == FP4) {
      out[input] = float(FP4_DOUBLED[code]) * scale;
      continue;
    }
    out[input] = w->has_minimum ? float(code) * scale + minimum : float(code - 8) * scale;
  }
}
