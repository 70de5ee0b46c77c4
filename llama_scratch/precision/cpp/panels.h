// Products with 8-bit and 4-bit weights.
//
// Decoding a token reads every weight once, so its speed is the memory bandwidth divided by the
// bytes of all weights. Fewer bits per weight are faster if the arithmetic keeps up with the
// memory. They are accurate if each number shares its scale only with numbers of similar size:
//
//     a block is 32 or 64 neighbors in a row:  w ≈ s·q   s: one float16, q: 8-bit or 4-bit integers
//     activations have the same blocks:        x ≈ t·r   t: one float32, r: integers, −127 to 127
//
//     Σ w·x  =  Σ over blocks  s·t · Σ q·r         the inner sum has only integers, so it is exact
//
// Llama's activations have a few outliers that are hundreds of times larger than the rest. With one
// scale t per row, most other activations would be rounded to 0. With blocks, an outlier affects
// only its neighbors. (llama.cpp's Q8_0 and Q4_0 have blocks of 32; fbgemm has one scale per row.)
// 8-bit blocks have 32 weights, because scales take relatively little memory there. 4-bit blocks
// have 64, see quantize.py.
//
// Weights are packed in panels of 16 rows. A vector register holds one number of each row, so lane
// i belongs to output i and no sum crosses lanes. Groups of 4 inputs are adjacent in memory,
// because one instruction multiplies 4 pairs of bytes and adds the products:
//
//     8 bits   values (out/16, in/4, 16, 4) int8      panel, group, row, input within the group
//     4 bits   values (out/16, in/8, 16, 4) uint8     lower 4 bits: one group, upper 4 bits: the
//                                                     next group; both store q + 8, from 0 to 15
//     both     scales (out/16, in/block, 16) float16
//
// The bytes of a panel are stored in the order in which they are read. Every function here computes
// a row of activations in the same order. Its result is therefore bit-identical for any number of
// other rows and any number of threads.

#pragma once

#include "vectors.h"

namespace llama_scratch {

constexpr int block_of(int bits) { return bits == 8 ? 32 : 64; }
constexpr int PANEL = 16;
constexpr int GROUP = 4;

// --- Vectors with one number per row of a panel -----------------------------------------------
//
// The compiler maps these to the registers of the machine: one of AVX-512, two of AVX2 or four of
// NEON.

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Bytes = int8_t __attribute__((vector_size(64)));  // PANEL rows × GROUP inputs
using Sixteen = int8_t __attribute__((vector_size(16)));
using Nibbles = uint8_t __attribute__((vector_size(64)));

inline Floats as_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// --- Instructions of each machine -------------------------------------------------------------
//
// dot(sum, q, r): add q0·r0 + q1·r1 + q2·r2 + q3·r3 to the sum of each row, with the row's 4 bytes
// q and the group r of activations.
// It is exact: no product exceeds 127², and no sum of a block exceeds 64·127² < 2²⁴.
// dot4 is the same for q from 0 to 15.
// A tile is TOKENS rows of activations times PANELS panels of weights.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr const char* MACHINE = "AVX-512 VNNI";
constexpr int TOKENS = 8, PANELS = 2;  // 16 sums, in half of the registers

// The first operand of the instruction must be unsigned bytes, so it is q + 128. To correct this,
// 128 times the sum of r is subtracted from the result.
constexpr int OFFSET = 128;
inline Ints dot(Ints sum, Bytes q, const int8_t* r) {
  Bytes raised = q ^ (int8_t)-128;
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)raised,
                                   _mm512_set1_epi32(load<int32_t>(r)));
}
inline Ints dot4(Ints sum, Bytes q, const int8_t* r) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)q, _mm512_set1_epi32(load<int32_t>(r)));
}
#elif defined(__AVX2__)
#define LLAMA_SCRATCH_AVX2  // has its own tile below, with explicit registers
constexpr const char* MACHINE = "AVX2";
constexpr int TOKENS = 4, PANELS = 1;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr const char* MACHINE = "NEON dot product";
constexpr int TOKENS = 4, PANELS = 1;
constexpr int OFFSET = 0;
inline Ints dot(Ints sum, Bytes q, const int8_t* r) {
  int32x4_t s[4];
  int8x16_t b[4], four = vreinterpretq_s8_s32(vdupq_n_s32(load<int32_t>(r)));
  std::memcpy(s, &sum, 64), std::memcpy(b, &q, 64);
  for (int i = 0; i < 4; i++) s[i] = vdotq_s32(s[i], b[i], four);
  return load<Ints>(s);
}
inline Ints dot4(Ints sum, Bytes q, const int8_t* r) { return dot(sum, q, r); }
#else
constexpr const char* MACHINE = "any machine";
constexpr int TOKENS = 1, PANELS = 1;
constexpr int OFFSET = 0;
inline Ints dot(Ints sum, Bytes q, const int8_t* r) {
  for (int row = 0; row < PANEL; row++)
    for (int i = 0; i < GROUP; i++) sum[row] += q[GROUP * row + i] * r[i];
  return sum;
}
inline Ints dot4(Ints sum, Bytes q, const int8_t* r) { return dot(sum, q, r); }
#endif

// Convert 16 float16 numbers to float32.
inline Floats sixteen_halves(const uint16_t* h) {
  Vector f[PANEL / LANES];
  for (int i = 0; i < PANEL / LANES; i++) f[i] = halves(h + LANES * i);
  return load<Floats>(f);
}

// --- Activations ------------------------------------------------------------------------------

struct Panels {
  const int8_t* values;
  const uint16_t* scales;
  int64_t out, in;
  int bits;

  int64_t panels() const { return out / PANEL; }
};

// T rows of activations, quantized in blocks: x ≈ scale·value. sums: the sum of the values of each
// block.
struct Rounded {
  int64_t T, in, blocks;
  int block;
  int8_t* values;
  float* scales;
  int32_t* sums;

  Rounded(int64_t T, const Panels& w)
      : T(T), in(w.in), blocks(in / block_of(w.bits)), block(block_of(w.bits)) {
    values = values_.take(T * in), scales = scales_.take(T * blocks), sums = sums_.take(T * blocks);
  }

  // Quantize row t, x (in,), rounding to the nearest integer (ties to even).
  void round(int64_t t, const float* x) {
    int8_t* value = &values[t * in];
    for (int64_t b = t * blocks; b < (t + 1) * blocks; b++, x += block, value += block) {
      Floats v[block_of(4) / PANEL];
      // Compare absolute values by their bits, as integers. In this order, NaN is the largest.
      Ints largest = {};
      for (int i = 0; i < block / PANEL; i++) {
        v[i] = load<Floats>(x + PANEL * i);
        Ints size = (Ints)v[i] & 0x7fffffff;
        largest = size > largest ? size : largest;
      }
      int32_t most = 0;
      for (int i = 0; i < PANEL; i++) most = std::max<int32_t>(most, largest[i]);
      float amax = load<float>(&most);
      bool finite = amax <= FLT_MAX;
      float inverse = finite && amax > FLT_MIN * 127 ? 127 / amax : 0;
      constexpr float SHIFT = 0x1.8p23f;  // adding this rounds to an integer
      Ints sum = {};
      for (int i = 0; i < block / PANEL; i++) {
        Ints q = finite ? __builtin_convertvector(v[i] * inverse + SHIFT - SHIFT, Ints) : Ints{};
        store(value + PANEL * i, __builtin_convertvector(q, Sixteen));
        sum += q;
      }
      sums[b] = 0;
      for (int i = 0; i < PANEL; i++) sums[b] += sum[i];
      scales[b] = finite ? amax / 127 : NAN;  // NaN and infinity propagate to the result
    }
  }

 private:
  Buffer<int8_t> values_;
  Buffer<float> scales_;
  Buffer<int32_t> sums_;
};

// --- Products ---------------------------------------------------------------------------------

// A tile: TOK rows of activations times PAN panels. Each weight byte is read once for TOK rows, and
// each group of activations once for PAN panels.
// apart: distance between these panels, in panels.
// y: address of the first panel's outputs for the first row; stride: distance between rows of y.
// add: whether to add to y.
#if defined(LLAMA_SCRATCH_AVX2)
// AVX2 has 16 registers of 32 bytes, and the compiler would keep vectors of 64 bytes on the stack.
// This tile therefore uses registers explicitly: [0] holds rows 0 to 7 of the panel, [1] rows 8 to
// 15.

inline __m256i register_at(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }

// Add the exact sums Σ q·r of one block to `sum`. q: the block's bytes; r: its activations, with
// `stride` bytes per row. maddubs multiplies unsigned by signed bytes and adds pairs in 16 bits.
// Here it multiplies |q| by r with the sign of q: ≤ 2·128·127 < 2¹⁵.
template <int TOK>
inline void block_of_8_bits(const int8_t* q, const int8_t* r, int64_t stride,
                            __m256i (&sum)[TOK][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int group = 0; group < block_of(8) / GROUP; group++, q += PANEL * GROUP, r += GROUP) {
    prefetch(q);
    __m256i w[] = {register_at(q), register_at(q + 32)},
            size[] = {_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])};
#pragma GCC unroll 4
    for (int k = 0; k < TOK; k++) {
      __m256i four = _mm256_set1_epi32(load<int32_t>(r + k * stride));
      for (int h = 0; h < 2; h++) {
        __m256i pairs = _mm256_maddubs_epi16(size[h], _mm256_sign_epi8(four, w[h]));
        sum[k][h] = _mm256_add_epi32(sum[k][h], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
}

// The same for q from 0 to 15. Here, the sum of eight results of maddubs fits into 16 bits:
// 8·2·15·127 = 30,480 < 2¹⁵.
template <int TOK>
inline void block_of_4_bits(const int8_t* q, const int8_t* r, int64_t stride,
                            __m256i (&sum)[TOK][2]) {
  const __m256i ones = _mm256_set1_epi16(1), fifteen = _mm256_set1_epi8(15);
  for (int half = 0; half < 2; half++) {
    __m256i pairs[TOK][2] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, q += PANEL * GROUP, r += 2 * GROUP) {
      prefetch(q);
      __m256i w[] = {register_at(q), register_at(q + 32)}, low[2], high[2];
      for (int h = 0; h < 2; h++) {
        low[h] = _mm256_and_si256(w[h], fifteen);
        high[h] = _mm256_and_si256(_mm256_srli_epi16(w[h], 4), fifteen);
      }
#pragma GCC unroll 4
      for (int k = 0; k < TOK; k++) {
        __m256i first = _mm256_set1_epi32(load<int32_t>(r + k * stride));
        for (int h = 0; h < 2; h++)
          pairs[k][h] = _mm256_add_epi16(pairs[k][h], _mm256_maddubs_epi16(low[h], first));
        __m256i second = _mm256_set1_epi32(load<int32_t>(r + k * stride + GROUP));
        for (int h = 0; h < 2; h++)
          pairs[k][h] = _mm256_add_epi16(pairs[k][h], _mm256_maddubs_epi16(high[h], second));
      }
    }
    for (int k = 0; k < TOK; k++)
      for (int h = 0; h < 2; h++)
        sum[k][h] = _mm256_add_epi32(sum[k][h], _mm256_madd_epi16(pairs[k][h], ones));
  }
}

template <int BITS, int PAN, int TOK>
void panel_tile(const Panels& w, int64_t panel, int64_t apart, const Rounded& rows, int64_t t,
                float* y, int64_t stride, bool add) {
  constexpr int BLOCK = block_of(BITS), BYTES = BLOCK * PANEL * BITS / 8;  // per block of a panel
  const int8_t* q = w.values + panel * rows.blocks * BYTES;
  const uint16_t* s = w.scales + panel * rows.blocks * PANEL;
  __m256 total[PAN][TOK][2] = {};
  for (int64_t b = 0; b < rows.blocks; b++) {
    const int8_t* r = &rows.values[t * rows.in + b * BLOCK];
    for (int p = 0; p < PAN; p++) {
      int64_t at = p * apart * rows.blocks + b;
      __m256i sum[TOK][2] = {};
      if constexpr (BITS == 8) {
        block_of_8_bits<TOK>(q + at * BYTES, r, rows.in, sum);
      } else {  // stored as q + 8, so start from −8·Σr
        for (int k = 0; k < TOK; k++)
          sum[k][0] = sum[k][1] = _mm256_set1_epi32(-8 * rows.sums[(t + k) * rows.blocks + b]);
        block_of_4_bits<TOK>(q + at * BYTES, r, rows.in, sum);
      }
      Floats scale = sixteen_halves(s + at * PANEL);
      __m256 scales[2];
      std::memcpy(scales, &scale, sizeof scale);
      for (int k = 0; k < TOK; k++) {
        __m256 step = _mm256_set1_ps(rows.scales[(t + k) * rows.blocks + b]);
        for (int h = 0; h < 2; h++) {
          __m256 product =
              _mm256_mul_ps(_mm256_cvtepi32_ps(sum[k][h]), _mm256_mul_ps(scales[h], step));
          total[p][k][h] = _mm256_add_ps(total[p][k][h], product);
        }
      }
    }
  }
  for (int p = 0; p < PAN; p++)
    for (int k = 0; k < TOK; k++)
      for (int h = 0; h < 2; h++) {
        float* to = y + k * stride + p * apart * PANEL + 8 * h;
        _mm256_storeu_ps(to,
                         add ? _mm256_add_ps(_mm256_loadu_ps(to), total[p][k][h]) : total[p][k][h]);
      }
}
#else
template <int BITS, int PAN, int TOK>
void panel_tile(const Panels& w, int64_t panel, int64_t apart, const Rounded& rows, int64_t t,
                float* y, int64_t stride, bool add) {
  constexpr int BLOCK = block_of(BITS), BYTES = BLOCK * PANEL * BITS / 8;  // per block of a panel
  const int8_t* q = w.values + panel * rows.blocks * BYTES;
  const uint16_t* s = w.scales + panel * rows.blocks * PANEL;
  Floats total[PAN][TOK] = {};
  for (int64_t b = 0; b < rows.blocks; b++) {
    const int8_t* r = &rows.values[t * rows.in + b * BLOCK];
    Ints sum[PAN][TOK];
    for (int k = 0; k < TOK; k++)
      for (int p = 0; p < PAN; p++)
        sum[p][k] = Ints{} - (BITS == 8 ? OFFSET : 8) * rows.sums[(t + k) * rows.blocks + b];
#pragma GCC unroll 16
    for (int group = 0; group < BLOCK / GROUP; group += 8 / BITS) {
      for (int p = 0; p < PAN; p++) {
        const int8_t* from =
            q + (p * apart * rows.blocks + b) * BYTES + group * PANEL * GROUP * BITS / 8;
        prefetch(from);
        if constexpr (BITS == 8) {
          Bytes eight = load<Bytes>(from);
          for (int k = 0; k < TOK; k++)
            sum[p][k] = dot(sum[p][k], eight, r + k * rows.in + group * GROUP);
        } else {
          Nibbles fours = load<Nibbles>(from);
          Bytes low = (Bytes)(fours & 15), high = (Bytes)(fours >> 4);
          for (int k = 0; k < TOK; k++) {
            sum[p][k] = dot4(sum[p][k], low, r + k * rows.in + group * GROUP);
            sum[p][k] = dot4(sum[p][k], high, r + k * rows.in + (group + 1) * GROUP);
          }
        }
      }
    }
    for (int p = 0; p < PAN; p++) {
      Floats scale = sixteen_halves(s + (p * apart * rows.blocks + b) * PANEL);
      for (int k = 0; k < TOK; k++)
        total[p][k] += as_floats(sum[p][k]) * (scale * rows.scales[(t + k) * rows.blocks + b]);
    }
  }
  for (int p = 0; p < PAN; p++)
    for (int k = 0; k < TOK; k++) {
      float* to = y + k * stride + p * apart * PANEL;
      store(to, add ? load<Floats>(to) + total[p][k] : total[p][k]);
    }
}
#endif

template <int BITS, int PAN, int TOK = TOKENS>
void panels_times_rows(const Panels& w, int64_t panel, const Rounded& rows, int64_t t, float* y,
                       bool add) {
  for (; t + TOK <= rows.T; t += TOK)
    panel_tile<BITS, PAN, TOK>(w, panel, 1, rows, t, y + t * w.out + panel * PANEL, w.out, add);
  if constexpr (TOK > 1)
    if (t < rows.T) panels_times_rows<BITS, PAN, TOK - 1>(w, panel, rows, t, y, add);
}

template <int BITS>
void panels_product(const Panels& w, const Rounded& rows, float* y, bool add) {
  if (rows.T == 1)  // memory-bound
    return parallel_pieces(w.panels(), [&](int64_t begin, int64_t end) {
      int64_t apart = (end - begin) / STREAMS;
      for (int64_t panel = begin; panel < begin + apart; panel++)
        panel_tile<BITS, STREAMS, 1>(w, panel, apart, rows, 0, y + panel * PANEL, w.out, add);
      for (int64_t panel = begin + STREAMS * apart; panel < end; panel++)
        panel_tile<BITS, 1, 1>(w, panel, 1, rows, 0, y + panel * PANEL, w.out, add);
    });
  constexpr int PAN = PANELS;
  parallel((w.panels() + PAN - 1) / PAN, [&](int64_t i) {
    if (PAN * (i + 1) <= w.panels())
      panels_times_rows<BITS, PAN>(w, PAN * i, rows, 0, y, add);
    else
      for (int64_t panel = PAN * i; panel < w.panels(); panel++)
        panels_times_rows<BITS, 1>(w, panel, rows, 0, y, add);
  });
}

// y (T, out) = x·Wᵀ, or y += x·Wᵀ if `add`.
inline void panels_product(const Panels& w, const Rounded& rows, float* y, bool add = false) {
  w.bits == 8 ? panels_product<8>(w, rows, y, add) : panels_product<4>(w, rows, y, add);
}

}  // namespace llama_scratch
