// Quantize weights to 8 or 4 bits by search, straight into panels.
//
// The same search as `_search` in quantize.py, which is where to read it and which the tests
// compare with. There each candidate scale is a pass over a block in memory. Here a block of one
// panel's rows stays in the cache for all candidates, and lane i of a vector is row i. So lanes
// never mix, and each machine finds the same bits.
#pragma once

#include <atomic>

#include "panels.h"

namespace llama_scratch::search {

constexpr int AT_ONCE = LANES == 16 ? 4 : 2;  // candidates that share each load of a weight
using Lanes = Vector;

constexpr float LARGEST = 65504;  // of float16
template <int BITS>
constexpr int32_t LEAST = BITS == 8 ? -127 : -8;
template <int BITS>
constexpr int32_t MOST = BITS == 8 ? 127 : 7;

// The nearest number of steps, limited to the numbers of BITS bits; halves go to the even one.
template <int BITS>
inline Lanes number_of(Lanes weight, Lanes inverse) {
  // At SHIFT a float32's last bit is worth 1, so the sum is rounded to a whole number. It is
  // limited as bits, because the order is the same and GCC knows the instructions for the largest
  // and smallest of integers alone.
  constexpr float SHIFT = 0x1.8p23f;
  constexpr int32_t ZERO = 0x4b400000;  // the bits of SHIFT
  Whole shifted = (Whole)(weight * inverse + SHIFT), least = Whole{} + (ZERO + LEAST<BITS>),
        most = Whole{} + (ZERO + MOST<BITS>);
  shifted = shifted > least ? shifted : least;
  shifted = shifted < most ? shifted : most;
  return (Lanes)shifted - SHIFT;
}

inline Lanes inverse_of(Lanes scale) { return scale == 0.0f ? Lanes{} : 1.0f / scale; }

// Round to what a float16 can hold; halves go to the even one. Below 2⁻¹⁴ float16 has a fixed step
// of 2⁻²⁴.
inline Lanes as_scale(Lanes x) {
  x = x < -LARGEST ? Lanes{} - LARGEST : x;
  x = x > LARGEST ? Lanes{} + LARGEST : x;
  Whole bits = (Whole)x, magnitude = bits & 0x7fffffff;
  Whole normal = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fff;
  Lanes subnormal = x + 0.75f - 0.75f;
  return (Lanes)(magnitude < 0x38800000 ? (Whole)subnormal : normal);
}

// The bits of a float16, of a float32 that `as_scale` made.
inline uint16_t bits_of(float scale) {
  int32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  int32_t magnitude = bits & 0x7fffffff;
  int32_t half = magnitude < 0x38800000 ? (int32_t)((scale < 0 ? -scale : scale) * 0x1p24f)
                                        : (magnitude >> 13) - (112 << 10);
  return half | (bits >> 16 & 0x8000);
}

// Σ(w − ŵ)² of a block for COUNT scales. w: a vector per place.
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

// The scales with the least error, one per lane. steps: how many steps long a block's largest
// weight may be.
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
    } else {  // at last the scale that fits the numbers n of the best: Σ n w / Σ n²
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

// One panel: `count` rows of weights, at most PANEL, (count, in). values, scales: the panel's own.
// False if a weight is NaN or too large for its scale.
template <int BITS>
bool quantize_panel(const float* rows, int64_t count, int64_t in, const float* steps,
                    int64_t n_steps, uint8_t* values, uint16_t* scales) {
  constexpr int BLOCK = block_of(BITS), BYTES = PANEL * GROUP;  // of a group of inputs, or of two
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
        // bytes of rows that only fill the panel are 0
        missing[i] = part * LANES + i >= count ? -1 : 0;
        scales[part * LANES + i] = bits_of(best[i]);
      }
      for (int j = 0; j < BLOCK; j += GROUP * 8 / BITS) {
        Whole bytes = {};  // of each row: its numbers of a group
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

// Rows of weights (out, in) in panels, the last one filled up with zeros. steps: as for
// `best_scale`.
// values: (⌈out/16⌉, in/4 or in/8, 16, 4); scales: (⌈out/16⌉, in/block, 16). False as for
// `quantize_panel`.
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
