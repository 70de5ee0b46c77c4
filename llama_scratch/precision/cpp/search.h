// Quantize weights to 8 or 4 bits, with a search for the best scales, directly into panels.
//
// The search is the same as `_search` in quantize.py, which is easier to read. The tests compare
// the two. In Python, each candidate scale takes a pass over all blocks in memory. Here, one block
// of a panel's rows stays in the CPU cache for all candidates, and lane i of a vector is row i.
// Lanes are never combined, so the result is bit-identical on all machines.
#pragma once

#include <atomic>

#include "panels.h"

namespace llama_scratch::search {

constexpr int AT_ONCE = LANES == 16 ? 4 : 2;  // candidate scales per load of a weight
using Lanes = Vector;

constexpr float LARGEST = 65504;  // largest float16
template <int BITS>
constexpr int32_t LEAST = BITS == 8 ? -127 : -8;
template <int BITS>
constexpr int32_t MOST = BITS == 8 ? 127 : 7;

// round(weight / scale), with ties to even, clamped to the range of BITS bits. inverse: 1 / scale.
template <int BITS>
inline Lanes number_of(Lanes weight, Lanes inverse) {
  // Near SHIFT, adjacent float32 numbers differ by 1, so the addition rounds to an integer. The sum
  // is clamped by its bits, as integers, which have the same order: GCC generates min and max
  // instructions only for integers.
  constexpr float SHIFT = 0x1.8p23f;
  constexpr int32_t ZERO = 0x4b400000;  // the bits of SHIFT
  Whole shifted = (Whole)(weight * inverse + SHIFT), least = Whole{} + (ZERO + LEAST<BITS>),
        most = Whole{} + (ZERO + MOST<BITS>);
  shifted = shifted > least ? shifted : least;
  shifted = shifted < most ? shifted : most;
  return (Lanes)shifted - SHIFT;
}

inline Lanes inverse_of(Lanes scale) { return scale == 0.0f ? Lanes{} : 1.0f / scale; }

// Round to the nearest float16 value, with ties to even. Below 2⁻¹⁴, float16 numbers are subnormal:
// their distance is 2⁻²⁴.
inline Lanes as_scale(Lanes x) {
  x = x < -LARGEST ? Lanes{} - LARGEST : x;
  x = x > LARGEST ? Lanes{} + LARGEST : x;
  Whole bits = (Whole)x, magnitude = bits & 0x7fffffff;
  Whole normal = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fff;
  Lanes subnormal = x + 0.75f - 0.75f;
  return (Lanes)(magnitude < 0x38800000 ? (Whole)subnormal : normal);
}

// The float16 bits of a float32 that `as_scale` returned.
inline uint16_t bits_of(float scale) {
  int32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  int32_t magnitude = bits & 0x7fffffff;
  int32_t half = magnitude < 0x38800000 ? (int32_t)((scale < 0 ? -scale : scale) * 0x1p24f)
                                        : (magnitude >> 13) - (112 << 10);
  return half | (bits >> 16 & 0x8000);
}

// Σ(w − ŵ)² of a block for COUNT scales. w: one vector per column of the block.
template <int BITS, int COUNT>
inline void errors_of(const Lanes* w, const Lanes* scale, Lanes* error) {
  Lanes inverse[COUNT], sum[COUNT] = {};
  for (int c = 0; c < COUNT; c++) inverse[c] = inverse_of(scale[c]);
  for (int j = 0; j < block_of(BITS); j++)
    for (int c = 0; c < COUNT; c++) {
      Lanes missed = w[j] - number_of<BITS>(w[j], inverse[c]) * scale[c];
      sum[c] += missed * missed;
    }
  for (int c = 0; c < COUNT; c++) error[c] = sum[c];
}

// Find the scales with the smallest error, one per lane. steps: candidates for the quantized value
// of a block's largest weight. Each step gives the candidate scale largest / step.
template <int BITS>
Lanes best_scale(const Lanes* w, const float* steps, int64_t count) {
  Lanes most = w[0], least = w[0];
  for (int j = 1; j < block_of(BITS); j++) {
    most = w[j] > most ? w[j] : most;
    least = w[j] < least ? w[j] : least;
  }
  Lanes largest = most > -least ? most : BITS == 8 ? -least : least;
  Lanes best = {}, error = Lanes{} + INFINITY;
  auto take = [&](Lanes scale, Lanes missed) {
    best = missed < error ? scale : best;
    error = missed < error ? missed : error;
  };
  int64_t i = 0;
  for (; i + AT_ONCE <= count; i += AT_ONCE) {
    Lanes scale[AT_ONCE], missed[AT_ONCE];
    for (int c = 0; c < AT_ONCE; c++) scale[c] = as_scale(largest / steps[i + c]);
    errors_of<BITS, AT_ONCE>(w, scale, missed);
    for (int c = 0; c < AT_ONCE; c++) take(scale[c], missed[c]);
  }
  for (; i <= count; i++) {
    Lanes scale, missed;
    if (i < count) {
      scale = as_scale(largest / steps[i]);
    } else {  // finally the least-squares scale for the best candidate's values n: Σ n w / Σ n²
      Lanes products = {}, squares = {}, inverse = inverse_of(best);
      for (int j = 0; j < block_of(BITS); j++) {
        Lanes n = number_of<BITS>(w[j], inverse);
        products += n * w[j];
        squares += n * n;
      }
      scale = as_scale(squares == 0.0f ? Lanes{} : products / squares);
    }
    errors_of<BITS, 1>(w, &scale, &missed);
    take(scale, missed);
  }
  return best;
}

// Quantize one panel: rows (count, in), with count ≤ PANEL. values, scales: the panel's output.
// Returns false if a weight is NaN or too large for a float16 scale.
template <int BITS>
bool quantize_panel(const float* rows, int64_t count, int64_t in, const float* steps,
                    int64_t n_steps, uint8_t* values, uint16_t* scales) {
  constexpr int BLOCK = block_of(BITS), BYTES = PANEL * GROUP;  // of one 8-bit or two 4-bit groups
  Lanes turned[PANEL / LANES][BLOCK] = {};
  for (int64_t b = 0; b < in / BLOCK; b++, values += BLOCK * PANEL * BITS / 8, scales += PANEL) {
    for (int64_t row = 0; row < count; row++)
      for (int j = 0; j < BLOCK; j++)
        turned[row / LANES][j][row % LANES] = rows[row * in + b * BLOCK + j];
    for (int part = 0; part < PANEL / LANES; part++) {
      const Lanes* w = turned[part];
      Whole fits = ~Whole{};
      for (int j = 0; j < BLOCK; j++) {
        fits &= w[j] <= LARGEST * MOST<BITS>;
        fits &= w[j] >= -LARGEST * MOST<BITS>;
      }
      for (int i = 0; i < LANES; i++)
        if (!fits[i]) return false;
      Lanes best = best_scale<BITS>(w, steps, n_steps), inverse = inverse_of(best);
      Whole missing;
      for (int i = 0; i < LANES; i++) {
        // padding rows have zero bytes
        missing[i] = part * LANES + i >= count ? -1 : 0;
        scales[part * LANES + i] = bits_of(best[i]);
      }
      for (int j = 0; j < BLOCK; j += GROUP * 8 / BITS) {
        Whole bytes = {};  // per row: the values of its group
        for (int i = 0; i < GROUP * 8 / BITS; i++) {
          Whole n = __builtin_convertvector(number_of<BITS>(w[j + i], inverse), Whole);
          bytes |= BITS == 8 ? (n & 255) << 8 * i : (n + 8) << (8 * (i % GROUP) + 4 * (i / GROUP));
        }
        bytes &= ~missing;
        std::memcpy(values + j / (GROUP * 8 / BITS) * BYTES + part * sizeof bytes, &bytes,
                    sizeof bytes);
      }
    }
  }
  return true;
}

// Quantize rows (out, in) into panels. The last panel is padded with zeros.
// steps: see `best_scale`.
// values: (⌈out/16⌉, in/4 or in/8, 16, 4). scales: (⌈out/16⌉, in/block, 16).
// Returns false if a weight is NaN or too large for a float16 scale.
inline bool quantize(const float* rows, int64_t out, int64_t in, int bits, const float* steps,
                     int64_t n_steps, uint8_t* values, uint16_t* scales) {
  std::atomic<bool> fits = true;
  parallel((out + PANEL - 1) / PANEL, [&](int64_t panel) {
    int64_t first = panel * PANEL, count = out - first < PANEL ? out - first : PANEL;
    auto quantize_panel_of = bits == 8 ? quantize_panel<8> : quantize_panel<4>;
    if (!quantize_panel_of(rows + first * in, count, in, steps, n_steps,
                           values + first * in * bits / 8, scales + first * in / block_of(bits)))
      fits = false;
  });
  return fits;
}

}  // namespace llama_scratch::search
