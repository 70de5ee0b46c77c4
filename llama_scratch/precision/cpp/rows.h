// Products with 32-bit and 16-bit weights and with GGUF blocks, row by row in file format, without
// packing.
//
//     y[t][o] = Σ_k x[t][k] · w[o][k]           x (T, in) float32, w (out, in), y (T, out) float32
//
// The same in Python: y = x @ w.float().T
//
// Columns are processed in spans of COLUMNS. Within a span, lane i of a register sums the products
// of the columns k = i, i + LANES, i + 2·LANES, … Then the lanes are added, and then the spans, in
// order. This order does not depend on the number of rows, so the result for a token is
// bit-identical alone and within a prompt. Only the conversion of weights to float32 differs:
//
//     up to FEW rows    in registers, for each weight as it is read: memory-bound
//     more rows         BLOCK rows of a span at a time, into the CPU cache, for all rows of x

#pragma once

#include "vectors.h"

namespace llama_scratch {

constexpr int64_t COLUMNS = 128 * LANES;
// Rows of w to convert at a time. A span of them takes 96 KB as float32 (192 KB with AVX-512).
constexpr int64_t BLOCK = 24;

enum class Type { INT8, INT4, F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };

// --- File formats of a row --------------------------------------------------------------------
//
// For each format, load(row, k, v) reads STEP weights from column k on into the registers v, as
// float32. A block has COLUMNS_A_BLOCK weights in BYTES_A_BLOCK bytes. Source of GGUF's formats:
// `block_…` and `dequantize_row_…` in ggml-org/llama.cpp.

struct F32 {
  static constexpr int STEP = LANES, COLUMNS_A_BLOCK = 1, BYTES_A_BLOCK = 4;
  static void load(const uint8_t* row, int64_t k, Vector* v) {
    v[0] = llama_scratch::load<Vector>(row + 4 * k);
  }
};
struct BF16 {  // the upper half of a float32
  static constexpr int STEP = LANES, COLUMNS_A_BLOCK = 1, BYTES_A_BLOCK = 2;
  static void load(const uint8_t* row, int64_t k, Vector* v) {
    v[0] = (Vector)(__builtin_convertvector(llama_scratch::load<Short>(row + 2 * k), Whole) << 16);
  }
};
struct F16 {
  static constexpr int STEP = LANES, COLUMNS_A_BLOCK = 1, BYTES_A_BLOCK = 2;
  static void load(const uint8_t* row, int64_t k, Vector* v) { v[0] = halves(row + 2 * k); }
};

constexpr int PARTS = 32 / LANES;  // registers per 32 weights

// Unpack 32 4-bit weights from 16 bytes. The lower 4 bits are the first 16 weights, the upper 4
// bits are the other 16.
inline void nibbles(const uint8_t* from, Whole* q) {
  Unsigned both = load<Unsigned>(from);
  widen(both & 15, q);
  widen(both >> 4, q + PARTS / 2);
}
// Set the fifth bit of weight i to bit i of `bits`.
inline void fifth(uint32_t bits, Whole* q) {
  Whole place;
  for (int i = 0; i < LANES; i++) place[i] = i;
  for (int i = 0; i < PARTS; i++) q[i] |= (((int32_t)(bits >> (LANES * i)) >> place) & 1) << 4;
}
// v = q·scale + offset, for 32 weights.
inline void scaled(const Whole* q, float scale, float offset, Vector* v) {
  for (int i = 0; i < PARTS; i++) v[i] = fma(floats(q[i]), all(scale), all(offset));
}

struct Q8_0 {
  static constexpr int STEP = 32, COLUMNS_A_BLOCK = 32, BYTES_A_BLOCK = 34;
  static void load(const uint8_t* row, int64_t k, Vector* v) {
    const uint8_t* block = row + k / 32 * BYTES_A_BLOCK;
    Vector scale = all(half_at(block));
    Whole q[PARTS];
    for (int i = 0; i < 2; i++)
      widen(llama_scratch::load<Signed>(block + 2 + 16 * i), q + i * PARTS / 2);
    for (int i = 0; i < PARTS; i++) v[i] = floats(q[i]) * scale;
  }
};
// Blocks of 32 weights with 4 or 5 bits: a scale, an offset, the fifth bits, and the lower 4 bits.
// Formats without an offset are symmetric: the middle of the range is 0.
template <bool OFFSET, bool FIVE>
struct BlockOf32 {
  static constexpr int STEP = 32, COLUMNS_A_BLOCK = 32, BYTES_A_BLOCK = 18 + 2 * OFFSET + 4 * FIVE;
  static void load(const uint8_t* row, int64_t k, Vector* v) {
    const uint8_t *block = row + k / 32 * BYTES_A_BLOCK, *bits = block + 2 + 2 * OFFSET;
    Whole q[PARTS];
    nibbles(bits + 4 * FIVE, q);
    if constexpr (FIVE) fifth(llama_scratch::load<uint32_t>(bits), q);
    float scale = half_at(block);
    scaled(q, scale, OFFSET ? half_at(block + 2) : (FIVE ? -16 : -8) * scale, v);
  }
};
using Q4_0 = BlockOf32<false, false>;
using Q4_1 = BlockOf32<true, false>;
using Q5_0 = BlockOf32<false, true>;
using Q5_1 = BlockOf32<true, true>;

// Blocks of 256 weights: eight groups of 32, each with a 6-bit scale and a 6-bit offset. The block
// has two float16 factors, one for all scales and one for all offsets.
struct ScaleAndOffset {
  float scale, offset;

  ScaleAndOffset(const uint8_t* block, int part) {
    const uint8_t* packed = block + 4;  // 12 bytes, see `get_scale_min_k4` in llama.cpp
    int s = part < 4 ? packed[part] & 63 : (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4);
    int m = part < 4 ? packed[part + 4] & 63 : packed[part + 4] >> 4 | (packed[part] >> 6 << 4);
    scale = half_at(block) * s, offset = -half_at(block + 2) * m;
  }
};
// Unpack 32 4-bit weights: the lower or the upper 4 bits of 32 bytes.
inline void halves_of(const uint8_t* from, bool high, Whole* q) {
  for (int i = 0; i < 2; i++) {
    Unsigned both = load<Unsigned>(from + 16 * i);
    widen(high ? both >> 4 : both & 15, q + i * PARTS / 2);
  }
}

struct Q4_K {
  static constexpr int STEP = 32, COLUMNS_A_BLOCK = 256, BYTES_A_BLOCK = 144;
  static void load(const uint8_t* row, int64_t k, Vector* v) {
    const uint8_t* block = row + k / 256 * BYTES_A_BLOCK;
    int part = k / 32 % 8;
    ScaleAndOffset of(block, part);
    Whole q[PARTS];
    halves_of(block + 16 + part / 2 * 32, part % 2, q);
    scaled(q, of.scale, of.offset, v);
  }
};
struct Q5_K {
  static constexpr int STEP = 32, COLUMNS_A_BLOCK = 256, BYTES_A_BLOCK = 176;
  static void load(const uint8_t* row, int64_t k, Vector* v) {
    const uint8_t* block = row + k / 256 * BYTES_A_BLOCK;
    int part = k / 32 % 8;
    ScaleAndOffset of(block, part);
    Whole q[PARTS];
    halves_of(block + 48 + part / 2 * 32, part % 2, q);
    Whole upper[PARTS];
    for (int i = 0; i < 2; i++)
      widen(llama_scratch::load<Unsigned>(block + 16 + 16 * i), upper + i * PARTS / 2);
    for (int i = 0; i < PARTS; i++) q[i] |= (upper[i] >> part & 1) << 4;
    scaled(q, of.scale, of.offset, v);
  }
};
struct Q6_K {  // 16 weights share an 8-bit scale
  static constexpr int STEP = 32, COLUMNS_A_BLOCK = 256, BYTES_A_BLOCK = 210;
  static void load(const uint8_t* row, int64_t k, Vector* v) {
    const uint8_t* block = row + k / 256 * BYTES_A_BLOCK;
    int part = k / 32 % 8, quarter = part % 4;
    const int8_t* scales = (const int8_t*)block + 192 + 2 * part;
    float unit = half_at(block + 208);
    Whole q[PARTS];
    halves_of(block + part / 4 * 64 + quarter % 2 * 32, quarter / 2, q);
    Whole upper[PARTS];
    for (int i = 0; i < 2; i++)
      widen(llama_scratch::load<Unsigned>(block + 128 + part / 4 * 32 + 16 * i),
            upper + i * PARTS / 2);
    for (int i = 0; i < PARTS; i++)
      v[i] = floats((q[i] | (upper[i] >> (2 * quarter) & 3) << 4) - 32) *
             (unit * scales[LANES * i / 16]);
  }
};

// Call f with the format W of a type as its template parameter.
template <class F>
void with_format(Type type, const F& f) {
  switch (type) {
    case Type::F32: return f.template operator()<F32>();
    case Type::F16: return f.template operator()<F16>();
    case Type::BF16: return f.template operator()<BF16>();
    case Type::Q8_0: return f.template operator()<Q8_0>();
    case Type::Q4_0: return f.template operator()<Q4_0>();
    case Type::Q4_1: return f.template operator()<Q4_1>();
    case Type::Q5_0: return f.template operator()<Q5_0>();
    case Type::Q5_1: return f.template operator()<Q5_1>();
    case Type::Q4_K: return f.template operator()<Q4_K>();
    case Type::Q5_K: return f.template operator()<Q5_K>();
    case Type::Q6_K: return f.template operator()<Q6_K>();
    case Type::INT8:
    case Type::INT4: return;  // see panels.h
  }
}

// Bytes of `columns` columns in the file. The columns must be complete blocks.
template <class W>
constexpr int64_t bytes_of(int64_t columns) {
  return columns / W::COLUMNS_A_BLOCK * W::BYTES_A_BLOCK;
}

// --- Products ---------------------------------------------------------------------------------

// Load the last weights of a row if they do not fill a register, padded with zeros.
template <class W>
inline Vector last(const uint8_t* row, int64_t k, int64_t count) {
  uint8_t some[LANES * 4] = {};
  std::memcpy(some, row + k * W::BYTES_A_BLOCK, count * W::BYTES_A_BLOCK);
  Vector v;
  W::load(some, 0, &v);
  return v;
}

// Multiply R rows of w by T rows of x, over `count` columns. w and x point to the first of these
// columns. w_stride is in bytes, x_stride in numbers. The sum for row r of w and row t of x is
// written to y[t · y_stride + r · y_step], or added to it if `add`.
template <class W, int R, int T>
void tile(const uint8_t* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t count,
          float* y, int64_t y_stride, int64_t y_step, bool add) {
  constexpr int N = W::STEP / LANES;
  Vector sum[(R * T + 3) / 4 * 4] = {};
  int64_t k = 0;
  for (; k + W::STEP <= count; k += W::STEP) {
    Vector v[R][N];
    for (int r = 0; r < R; r++) {
      if constexpr (T == 1) prefetch(w + r * w_stride + bytes_of<W>(k));
      W::load(w + r * w_stride, k, v[r]);
      for (int i = 0; i < N; i++) keep(v[r][i]);
    }
    for (int i = 0; i < N; i++)
      for (int t = 0; t < T; t++) {
        Vector activations = vector_at(x + t * x_stride + k + LANES * i);
        for (int r = 0; r < R; r++) sum[r * T + t] = fma(v[r][i], activations, sum[r * T + t]);
      }
  }
  if constexpr (W::COLUMNS_A_BLOCK == 1)
    if (k < count)
      for (int r = 0; r < R; r++) {
        Vector v = last<W>(w + r * w_stride, k, count - k);
        for (int t = 0; t < T; t++)
          sum[r * T + t] =
              fma(v, last<F32>((const uint8_t*)(x + t * x_stride), k, count - k), sum[r * T + t]);
      }
  for (int i = 0; i < R * T; i += 4) {
    float four[4];
    sums(sum[i], sum[i + 1], sum[i + 2], sum[i + 3], four);
    for (int j = 0; j < 4 && i + j < R * T; j++) {
      float& to = y[(i + j) % T * y_stride + (i + j) / T * y_step];
      to = add ? to + four[j] : four[j];
    }
  }
}

// Multiply T rows of x by all `rows` of w, R rows at a time.
template <class W, int R, int T>
void tiles(const uint8_t* w, int64_t w_stride, int64_t rows, const float* x, int64_t x_stride,
           int64_t count, float* y, int64_t y_stride, int64_t y_step, bool add) {
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    tile<W, R, T>(w + r * w_stride, w_stride, x, x_stride, count, y + r * y_step, y_stride, y_step,
                  add);
  for (; r < rows; r++)
    tile<W, 1, T>(w + r * w_stride, w_stride, x, x_stride, count, y + r * y_step, y_stride, y_step,
                  add);
}

// The same for any number T of rows of x. R: rows of w per tile. The CPU cache must hold all `rows`
// rows of w.
template <class W, int R>
void product_in_cache(const uint8_t* w, int64_t w_stride, int64_t rows, const float* x,
                      int64_t x_stride, int64_t T, int64_t count, float* y, int64_t y_stride,
                      int64_t y_step, bool add) {
  for (; T >= 4; T -= 4, x += 4 * x_stride, y += 4 * y_stride)
    tiles<W, R, 4>(w, w_stride, rows, x, x_stride, count, y, y_stride, y_step, add);
  if (T == 3) tiles<W, R, 3>(w, w_stride, rows, x, x_stride, count, y, y_stride, y_step, add);
  if (T == 2) tiles<W, 4, 2>(w, w_stride, rows, x, x_stride, count, y, y_stride, y_step, add);
  if (T == 1) tiles<W, 4, 1>(w, w_stride, rows, x, x_stride, count, y, y_stride, y_step, add);
}

// Rows per tile, chosen so that the sums for four rows of x fill the registers: TALL for weights in
// float32, LOW for weights that are converted while they are read.
constexpr int TALL = LANES == 16 ? 6 : LANES == 8 ? 3 : 2, LOW = LANES == 16 ? 4 : 2;

// Convert columns `first` to `first` + count of a row to float32.
template <class W>
void unpack(const uint8_t* row, int64_t first, int64_t count, float* to) {
  int64_t k = 0;
  for (; k + W::STEP <= count; k += W::STEP) {
    Vector v[W::STEP / LANES];
    W::load(row, first + k, v);
    for (int i = 0; i < W::STEP / LANES; i++) store(to + k + LANES * i, v[i]);
  }
  if constexpr (W::COLUMNS_A_BLOCK == 1)
    if (k < count) {
      Vector v = last<W>(row, first + k, count - k);
      std::memcpy(to + k, &v, (count - k) * sizeof(float));
    }
}

// A matrix in file format, row by row.
struct Rows {
  const uint8_t* data;
  int64_t out, in;
};

// Compute y = x·Wᵀ, or y += x·Wᵀ if `add`, for rows `begin` to `end` of the matrix. y (T, out) has
// `y_stride` numbers per row. This version is for few rows of x: it converts the weights to float32
// each time they are read. Reading STREAMS rows at a time also hides the latency of an addition.
template <class W>
void streamed_product(const Rows& w, int64_t begin, int64_t end, const float* x, int64_t T,
                      float* y, int64_t y_stride, bool add) {
  int64_t stride = bytes_of<W>(w.in), apart = (end - begin) / STREAMS;
  auto rows = [&](int64_t first, int64_t count, int64_t step) {
    for (int64_t k = 0; k < w.in; k += COLUMNS)
      product_in_cache<W, LOW>(w.data + first * stride + bytes_of<W>(k), step * stride, count,
                               x + k, w.in, T, std::min(COLUMNS, w.in - k), y + first, y_stride,
                               step, add || k);
  };
  for (int64_t r = begin; r < begin + apart; r++) rows(r, STREAMS, apart);
  for (int64_t r = begin + STREAMS * apart; r < end; r++) rows(r, 1, 0);
}

// The same for many rows of x. This version converts each weight once. It multiplies one span of
// columns in all rows before it continues with the next span.
template <class W>
void unpacked_product(const Rows& w, int64_t begin, int64_t end, const float* x, int64_t T,
                      float* y, int64_t y_stride, bool add) {
  alignas(64) static thread_local float block[BLOCK * COLUMNS];
  int64_t stride = bytes_of<W>(w.in);
  for (int64_t k = 0; k < w.in; k += COLUMNS)
    for (int64_t r = begin; r < end; r += BLOCK) {
      int64_t count = std::min(COLUMNS, w.in - k), rows = std::min(BLOCK, end - r);
      for (int64_t i = 0; i < rows; i++)
        unpack<W>(w.data + (r + i) * stride, k, count, block + i * COLUMNS);
      product_in_cache<F32, TALL>((const uint8_t*)block, COLUMNS * sizeof(float), rows, x + k, w.in,
                                  T, count, y + r, y_stride, 1, add || k);
    }
}

// Up to this number of rows of x, `streamed_product` is faster. Converting 16-bit weights is cheap,
// converting GGUF blocks is not.
template <class W>
constexpr int64_t FEW = W::COLUMNS_A_BLOCK == 1 ? 16 : 8;

template <class W>
void rows_product(const Rows& w, int64_t begin, int64_t end, const float* x, int64_t T, float* y,
                  int64_t y_stride, bool add) {
  auto product = T <= FEW<W> ? streamed_product<W> : unpacked_product<W>;
  product(w, begin, end, x, T, y, y_stride, add);
}

}  // namespace llama_scratch
