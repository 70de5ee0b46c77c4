// Weights of 32 and 16 bits, and GGUF's blocks, multiplied as their file holds them: row by row,
// nothing is packed.
//
//     y[t][o] = Σ_k x[t][k] · w[o][k]           x (T, in) float32, w (out, in), y (T, out) float32
//
// The same in Python: y = x @ w.float().T
//
// Lane i of a register adds up the products of the columns k = i, i + LANES, i + 2·LANES, … of a
// span of COLUMNS columns; then the lanes are added, and the spans one after the other. So a sum
// never depends on how many other rows there are, and one token gives the same bits alone as in a
// prompt. What differs is only who turns the weights into float32:
//
//     FEW rows of x     each weight on its way from the memory, in a register: bound by the memory
//     more              BLOCK rows of a span, as float32 in the cache, meet all rows of x

#pragma once

#include "vectors.h"

namespace llama_scratch {

constexpr int64_t COLUMNS = 128 * LANES;
// rows of w, of which a span is 96 KB as float32, with AVX-512 192 KB
constexpr int64_t BLOCK = 24;

enum class Type { INT8, INT4, F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };

// --- How a file holds a row -------------------------------------------------------------------
//
// Each has load(row, k, v): the STEP weights from column k on, as float32 in registers.
// COLUMNS_A_BLOCK weights take BYTES_A_BLOCK bytes. Source of GGUF's: the `block_…` and
// `dequantize_row_…` in ggml-org/llama.cpp.

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

constexpr int PARTS = 32 / LANES;  // registers of a block of 32

// 16 bytes hold 32 weights of 4 bits: the low halves the first 16, the high halves the others.
inline void nibbles(const uint8_t* from, Whole* q) {
  Unsigned both = load<Unsigned>(from);
  widen(both & 15, q);
  widen(both >> 4, q + PARTS / 2);
}
// Bit i of `bits` becomes the fifth of weight i.
inline void fifth(uint32_t bits, Whole* q) {
  Whole place;
  for (int i = 0; i < LANES; i++) place[i] = i;
  for (int i = 0; i < PARTS; i++) q[i] |= (((int32_t)(bits >> (LANES * i)) >> place) & 1) << 4;
}
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
// Blocks of 32 weights of four bits, or of five: a scale, an offset or else the middle of the
// numbers, the fifth bits.
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

// Blocks of 256: eight times 32 weights with a scale and an offset of 6 bits each, in units of two
// float16.
struct ScaleAndOffset {
  float scale, offset;

  ScaleAndOffset(const uint8_t* block, int part) {
    const uint8_t* packed = block + 4;  // 12 bytes, see `get_scale_min_k4` in llama.cpp
    int s = part < 4 ? packed[part] & 63 : (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4);
    int m = part < 4 ? packed[part + 4] & 63 : packed[part + 4] >> 4 | (packed[part] >> 6 << 4);
    scale = half_at(block) * s, offset = -half_at(block + 2) * m;
  }
};
// 32 weights of 4 bits: the low or the high halves of 32 bytes.
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
struct Q6_K {  // 16 weights share a scale of 8 bits
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

// f.operator()<W>() for the W of a type.
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

// What so many columns of a row take in the file; they are whole blocks.
template <class W>
constexpr int64_t bytes_of(int64_t columns) {
  return columns / W::COLUMNS_A_BLOCK * W::BYTES_A_BLOCK;
}

// --- Products ---------------------------------------------------------------------------------

// The last weights of a row, where they do not fill a register; zeros behind them.
template <class W>
inline Vector last(const uint8_t* row, int64_t k, int64_t count) {
  uint8_t some[LANES * 4] = {};
  std::memcpy(some, row + k * W::BYTES_A_BLOCK, count * W::BYTES_A_BLOCK);
  Vector v;
  W::load(some, 0, &v);
  return v;
}

// R rows of w times T rows of x, over `count` columns. w, x: where their first columns are; strides
// in bytes and numbers. The sum of row r and row t goes to y[t · y_stride + r · y_step], or is
// added there.
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

// T rows of x times all `rows` of w, R at a time.
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

// The same for any number of rows of x. R: rows of a tile. What `rows` take fits into the cache.
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

// Rows of a tile whose sums, with those of four rows of x, fill the registers: with weights as
// float32, and on their way.
constexpr int TALL = LANES == 16 ? 6 : LANES == 8 ? 3 : 2, LOW = LANES == 16 ? 4 : 2;

// Columns `first` to `first` + count of a row, as float32.
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

// A matrix of rows as they lie in a file.
struct Rows {
  const uint8_t* data;
  int64_t out, in;
};

// y (T, out) of `y_stride` numbers a row = or += x·Wᵀ, for rows `begin` to `end` of the matrix.
// With few rows of x the weights are turned into float32 wherever they come by. STREAMS rows at a
// time also hide the latency of a sum.
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

// with many, once. A span of all rows of x meets all rows of the matrix before it is the next one's
// turn.
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

// Up to so many rows of x are few: 16 bits are soon turned into float32, GGUF's blocks are not.
template <class W>
constexpr int64_t FEW = W::COLUMNS_A_BLOCK == 1 ? 16 : 8;

template <class W>
void rows_product(const Rows& w, int64_t begin, int64_t end, const float* x, int64_t T, float* y,
                  int64_t y_stride, bool add) {
  auto product = T <= FEW<W> ? streamed_product<W> : unpacked_product<W>;
  product(w, begin, end, x, T, y, y_stride, add);
}

}  // namespace llama_scratch
