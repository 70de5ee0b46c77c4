// Products with weights of eight and of four bits, and the step of one layer around them.
//
// One token reads every weight once, so its speed is the memory's speed divided by the bytes of a weight. Fewer bits
// make it faster as long as the arithmetic keeps up with the memory, and stay true as long as each number is rounded
// beside numbers of its own size:
//
//     a BLOCK is 32 or 64 neighbours in a row:   w ≈ s·q     s: one float16 for all, q: whole numbers of 8 or 4 bits
//     activations are cut in the same places:    x ≈ t·r     t: one float32, r: whole numbers from −127 to 127
//
//     Σ w·x  =  Σ over blocks  s·t · Σ q·r            the inner sum is one of whole numbers, so it is exact
//
// Llama's activations have a few outliers, hundreds of times larger than the rest. With one t for a whole row they
// would leave nothing of the others; here an outlier costs its own neighbours. (llama.cpp's Q8_0 and Q4_0 are built like
// this with blocks of 32; fbgemm has one scale a row.) Blocks of 8 bits are of 32, for there the scales are what is lost
// least; those of 4 bits are of 64, see quantise.py.
//
// Weights lie in PANELS of 16 rows, so that a vector register holds one number of each row and no sum ever runs across
// a register: lane i of it is output i. A group of 4 inputs stands together, because one instruction multiplies 4 pairs
// of bytes and adds them up:
//
//     8 bits   values (out/16, in/4, 16, 4) int8      panel, group of inputs, row of the panel, input of the group
//     4 bits   values (out/16, in/8, 16, 4) uint8     low halves: one group of 4 inputs, high halves: the next group;
//                                                     they hold q + 8, from 0 to 15
//     both     scales (out/16, in/block, 16) float16
//
// A panel's bytes follow each other in the order in which they are read. Every function here computes a row of
// activations in the same order, and so to the same bit, whatever rows go with it and on however many threads.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if !defined(LLAMA_SCRATCH_ALONE)
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace llama_scratch {

constexpr int block_of(int bits) { return bits == 8 ? 32 : 64; }
constexpr int PANEL = 16;
constexpr int GROUP = 4;

// --- Vectors of one number for each row of a panel --------------------------------------------
//
// The compiler makes of these what the machine has: one register of AVX-512, two of AVX2, four of NEON.

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Bytes = int8_t __attribute__((vector_size(64)));  // PANEL rows × GROUP inputs
using Sixteen = int8_t __attribute__((vector_size(16)));
using Unsigned = uint8_t __attribute__((vector_size(64)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
inline Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }
inline Floats all(float x) { return Floats{} + x; }

// --- What each machine does by itself ---------------------------------------------------------
//
// dot(sum, q, r): to each row's sum, add q0·r0 + q1·r1 + q2·r2 + q3·r3 of its 4 bytes q and the group r.
// It is exact: no product exceeds 127², no sum of a block 64·127² < 2²⁴.
// dot4 is the same where the q are from 0 to 15.

#if defined(LLAMA_SCRATCH_PLAIN)
#undef __AVX2__
#undef __AVX512VNNI__
#undef __ARM_FEATURE_DOTPROD
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr const char* MACHINE = "AVX-512 VNNI";
constexpr int TOKENS = 8, PANELS = 2;  // of a tile: 16 sums, in half of the registers

// The instruction wants its first bytes unsigned: q + 128. The sums of r, times 128, come off again at the end.
constexpr int OFFSET = 128;
inline Ints dot(Ints sum, Bytes q, const int8_t* r) {
  Bytes raised = q ^ (int8_t)-128;
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)raised, _mm512_set1_epi32(load<int32_t>(r)));
}
inline Ints dot4(Ints sum, Bytes q, const int8_t* r) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)q, _mm512_set1_epi32(load<int32_t>(r)));
}
#elif defined(__AVX2__)
#define LLAMA_SCRATCH_AVX2  // has a tile of its own, which names registers
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

// 16 float16 as float32.
#if defined(__AVX512F__) && !defined(LLAMA_SCRATCH_PLAIN)
inline Floats halves(const uint16_t* h) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)h)); }
#elif defined(__F16C__) && !defined(LLAMA_SCRATCH_PLAIN)
inline Floats halves(const uint16_t* h) {
  __m256 f[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)h)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(h + 8)))};
  return load<Floats>(f);
}
#else
inline Floats halves(const uint16_t* h) {
  Floats f;
  for (int i = 0; i < PANEL; i++) {  // exponent and mantissa move into their places, 2^112 sets the exponent right
    uint32_t magnitude = (uint32_t)(h[i] & 0x7fff) << 13, sign = (uint32_t)(h[i] & 0x8000) << 16;
    float value = load<float>(&magnitude) * 0x1p112f;
    if (value >= 0x1p16f) value = h[i] & 0x3ff ? NAN : INFINITY;
    uint32_t bits = load<uint32_t>(&value) | sign;
    f[i] = load<float>(&bits);
  }
  return f;
}
#endif

// --- Threads ----------------------------------------------------------------------------------

#if defined(LLAMA_SCRATCH_ALONE)  // without torch: under sanitizers, see tests/
template <class F>
void parallel(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i++) f(i);
}
#else
template <class F>
void parallel(int64_t n, const F& f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}
#endif

// --- Activations ------------------------------------------------------------------------------

struct Weight {
  const int8_t* values;
  const uint16_t* scales;
  int64_t out, in;
  int bits;

  int64_t panels() const { return out / PANEL; }
};

// Rows of activations in blocks: x ≈ scale·value. sums: those of a block's values.
struct Rows {
  int64_t T, in;
  int block;
  int64_t blocks = in / block;
  std::vector<int8_t> values = std::vector<int8_t>(T * in);
  std::vector<float> scales = std::vector<float>(T * blocks);
  std::vector<int32_t> sums = std::vector<int32_t>(T * blocks);

  Rows(int64_t T, const Weight& w) : T(T), in(w.in), block(block_of(w.bits)) {}

  // x: (in,). Rounds to the nearest, halves to the even one.
  void quantise(int64_t t, const float* x) {
    int8_t* value = &values[t * in];
    for (int64_t b = t * blocks; b < (t + 1) * blocks; b++, x += block, value += block) {
      Floats v[block_of(4) / PANEL];
      Ints largest = {};  // as bits without their sign, where what is no number is the largest of all
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
      constexpr float SHIFT = 0x1.8p23f;  // behind it there is no room for a fraction
      Ints sum = {};
      for (int i = 0; i < block / PANEL; i++) {
        Ints q = finite ? __builtin_convertvector(v[i] * inverse + SHIFT - SHIFT, Ints) : Ints{};
        store(value + PANEL * i, __builtin_convertvector(q, Sixteen));
        sum += q;
      }
      sums[b] = 0;
      for (int i = 0; i < PANEL; i++) sums[b] += sum[i];
      scales[b] = finite ? amax / 127 : NAN;  // what is no number stays visible
    }
  }
};

// --- Products ---------------------------------------------------------------------------------

// Weights are asked for so many bytes ahead, and the cache need not keep them: a pass reads them once.
constexpr int AHEAD = 8192;

// TOK rows times PAN panels: every byte of the weight that is read serves TOK rows, every group of activations PAN panels.
// y: where the first panel's outputs of the first row go; stride: from row to row. add: onto what stands there.
#if defined(LLAMA_SCRATCH_AVX2)
// AVX2 has 16 registers of 32 bytes, and the compiler keeps vectors of 64 bytes on the stack. So this tile names its
// registers: [0] holds rows 0 to 7 of the panel, [1] rows 8 to 15.

inline __m256i register_at(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }

// Add the exact sums Σ q·r of one block to `sum`. q: the block's bytes; r: its activations, `stride` bytes per row.
// maddubs multiplies unsigned by signed bytes and adds pairs in 16 bits: |q| by r with the sign of q, ≤ 2·128·127 < 2¹⁵.
template <int TOK>
inline void block_of_8_bits(const int8_t* q, const int8_t* r, int64_t stride, __m256i (&sum)[TOK][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
  for (int group = 0; group < block_of(8) / GROUP; group++, q += PANEL * GROUP, r += GROUP) {
    __builtin_prefetch(q + AHEAD, 0, 0);
    __m256i w[] = {register_at(q), register_at(q + 32)}, size[] = {_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])};
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

// The same for q from 0 to 15. Eight results of maddubs fit into 16 bits: 8·2·15·127 = 30,480 < 2¹⁵.
template <int TOK>
inline void block_of_4_bits(const int8_t* q, const int8_t* r, int64_t stride, __m256i (&sum)[TOK][2]) {
  const __m256i ones = _mm256_set1_epi16(1), fifteen = _mm256_set1_epi8(15);
  for (int half = 0; half < 2; half++) {
    __m256i pairs[TOK][2] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, q += PANEL * GROUP, r += 2 * GROUP) {
      __builtin_prefetch(q + AHEAD, 0, 0);
      __m256i w[] = {register_at(q), register_at(q + 32)}, low[2], high[2];
      for (int h = 0; h < 2; h++) {
        low[h] = _mm256_and_si256(w[h], fifteen);
        high[h] = _mm256_and_si256(_mm256_srli_epi16(w[h], 4), fifteen);
      }
#pragma GCC unroll 4
      for (int k = 0; k < TOK; k++) {
        __m256i first = _mm256_set1_epi32(load<int32_t>(r + k * stride));
        for (int h = 0; h < 2; h++) pairs[k][h] = _mm256_add_epi16(pairs[k][h], _mm256_maddubs_epi16(low[h], first));
        __m256i second = _mm256_set1_epi32(load<int32_t>(r + k * stride + GROUP));
        for (int h = 0; h < 2; h++) pairs[k][h] = _mm256_add_epi16(pairs[k][h], _mm256_maddubs_epi16(high[h], second));
      }
    }
    for (int k = 0; k < TOK; k++)
      for (int h = 0; h < 2; h++) sum[k][h] = _mm256_add_epi32(sum[k][h], _mm256_madd_epi16(pairs[k][h], ones));
  }
}

template <int BITS, int PAN, int TOK>
void tile(const Weight& w, int64_t panel, const Rows& rows, int64_t t, float* y, int64_t stride, bool add) {
  static_assert(PAN == 1);
  constexpr int BLOCK = block_of(BITS), BYTES = BLOCK * PANEL * BITS / 8;  // of a block of a panel
  const int8_t* q = w.values + panel * rows.blocks * BYTES;
  const uint16_t* s = w.scales + panel * rows.blocks * PANEL;
  __m256 total[TOK][2] = {};
  for (int64_t b = 0; b < rows.blocks; b++, q += BYTES, s += PANEL) {
    const int8_t* r = &rows.values[t * rows.in + b * BLOCK];
    __m256i sum[TOK][2] = {};
    if constexpr (BITS == 8) {
      block_of_8_bits<TOK>(q, r, rows.in, sum);
    } else {  // nibbles hold q + 8
      for (int k = 0; k < TOK; k++) sum[k][0] = sum[k][1] = _mm256_set1_epi32(-8 * rows.sums[(t + k) * rows.blocks + b]);
      block_of_4_bits<TOK>(q, r, rows.in, sum);
    }
    Floats scale = halves(s);
    __m256 scales[2];
    std::memcpy(scales, &scale, sizeof scale);
    for (int k = 0; k < TOK; k++) {
      __m256 step = _mm256_set1_ps(rows.scales[(t + k) * rows.blocks + b]);
      for (int h = 0; h < 2; h++)
        total[k][h] = _mm256_add_ps(total[k][h], _mm256_mul_ps(_mm256_cvtepi32_ps(sum[k][h]), _mm256_mul_ps(scales[h], step)));
    }
  }
  for (int k = 0; k < TOK; k++)
    for (int h = 0; h < 2; h++) {
      float* to = y + k * stride + 8 * h;
      _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), total[k][h]) : total[k][h]);
    }
}
#else
template <int BITS, int PAN, int TOK>
void tile(const Weight& w, int64_t panel, const Rows& rows, int64_t t, float* y, int64_t stride, bool add) {
  constexpr int BLOCK = block_of(BITS), BYTES = BLOCK * PANEL * BITS / 8;  // of a block of a panel
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
        const int8_t* from = q + (p * rows.blocks + b) * BYTES + group * PANEL * GROUP * BITS / 8;
        __builtin_prefetch(from + AHEAD, 0, 0);
        if constexpr (BITS == 8) {
          Bytes eight = load<Bytes>(from);
          for (int k = 0; k < TOK; k++) sum[p][k] = dot(sum[p][k], eight, r + k * rows.in + group * GROUP);
        } else {
          Unsigned fours = load<Unsigned>(from);
          Bytes low = (Bytes)(fours & 15), high = (Bytes)(fours >> 4);
          for (int k = 0; k < TOK; k++) {
            sum[p][k] = dot4(sum[p][k], low, r + k * rows.in + group * GROUP);
            sum[p][k] = dot4(sum[p][k], high, r + k * rows.in + (group + 1) * GROUP);
          }
        }
      }
    }
    for (int p = 0; p < PAN; p++) {
      Floats scale = halves(s + (p * rows.blocks + b) * PANEL);
      for (int k = 0; k < TOK; k++) total[p][k] += floats(sum[p][k]) * (scale * rows.scales[(t + k) * rows.blocks + b]);
    }
  }
  for (int p = 0; p < PAN; p++)
    for (int k = 0; k < TOK; k++) {
      float* to = y + k * stride + p * PANEL;
      store(to, add ? load<Floats>(to) + total[p][k] : total[p][k]);
    }
}
#endif

template <int BITS, int PAN, int TOK = TOKENS>
void panels_times_rows(const Weight& w, int64_t panel, const Rows& rows, int64_t t, float* y, bool add) {
  for (; t + TOK <= rows.T; t += TOK) tile<BITS, PAN, TOK>(w, panel, rows, t, y + t * w.out + panel * PANEL, w.out, add);
  if constexpr (TOK > 1)
    if (t < rows.T) panels_times_rows<BITS, PAN, TOK - 1>(w, panel, rows, t, y, add);
}

template <int BITS>
void product(const Weight& w, const Rows& rows, float* y, bool add) {
  if (rows.T == 1)  // bound by the memory, which is read fastest in one piece
    return parallel(w.panels(), [&](int64_t panel) { tile<BITS, 1, 1>(w, panel, rows, 0, y + panel * PANEL, w.out, add); });
  constexpr int PAN = PANELS;
  parallel((w.panels() + PAN - 1) / PAN, [&](int64_t i) {
    if (PAN * (i + 1) <= w.panels()) panels_times_rows<BITS, PAN>(w, PAN * i, rows, 0, y, add);
    else for (int64_t panel = PAN * i; panel < w.panels(); panel++) panels_times_rows<BITS, 1>(w, panel, rows, 0, y, add);
  });
}

// y (T, out) = or += x·Wᵀ.
inline void product(const Weight& w, const Rows& rows, float* y, bool add = false) {
  w.bits == 8 ? product<8>(w, rows, y, add) : product<4>(w, rows, y, add);
}

// --- One layer, for a few tokens --------------------------------------------------------------
//
// The same steps as `TransformerBlock` in model.py, which is where to read them. A small model's decode is not bound by
// the memory but by the calls of some thirty operators a layer, so here they are one.

// e^x to about a unit in the last place. Source: Cephes, expf.
inline Floats exp(Floats x) {
  x = x < -87.0f ? all(-87) : x;
  x = x > 88.0f ? all(88) : x;
  Floats n = x * 1.44269504f + 0x1.8p23f - 0x1.8p23f;  // e^x = 2^n · e^r
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  p = p * r * r + r + 1.0f;
  return (Floats)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}
inline float sum(Floats v) {
  for (int half = PANEL / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

// x: (dim,) float32, the same as RMSNorm in model.py.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t dim, float* y) {
  Floats squares = {};
  for (int64_t i = 0; i < dim; i += PANEL) {
    Floats v = load<Floats>(x + i);
    squares += v * v;
  }
  float inverse_rms = 1 / std::sqrt(sum(squares) / dim + eps);
  for (int64_t i = 0; i < dim; i += PANEL) store(y + i, load<Floats>(x + i) * inverse_rms * load<Floats>(weight + i));
}

// Turn the pairs of a head's vector by the angles whose cosine and sine stand in turn in freqs_cis, (head_dim,).
inline void rotate(float* x, const float* freqs_cis, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; i += 2) {
    float a = x[i], b = x[i + 1], cos = freqs_cis[i], sin = freqs_cis[i + 1];
    x[i] = a * cos - b * sin;
    x[i + 1] = a * sin + b * cos;
  }
}

// The shape of a network, and its cache of one layer: keys and values (n_kv_heads, capacity, head_dim).
struct Shape {
  int64_t dim, n_heads, n_kv_heads, head_dim, ffn_dim;
  float eps;
};
struct Cache {
  float *keys, *values;
  int64_t capacity;
};

// Positions whose attention is computed together, the same ones whatever tokens come at once.
constexpr int64_t SPAN = 256;

// What a group of query heads takes of a span: out (group, head_dim) is Σ e^(score − most)·value, total Σ e^(score − most).
struct Part {
  std::vector<float> out, most, total;
};

// q: (group, head_dim), already divided by √head_dim; k, v: (count, head_dim). HEAD: head_dim in vectors.
template <int HEAD>
void attend_span(const float* q, const float* k, const float* v, int64_t group, int64_t count, Part& part) {
  constexpr int64_t head_dim = HEAD * PANEL;
  part.out.assign(group * head_dim, 0), part.most.assign(group, -INFINITY), part.total.assign(group, 0);
  alignas(64) float scores[SPAN];
  for (int64_t g = 0; g < group; g++) {
    Floats query[HEAD], out[HEAD] = {}, most = all(-INFINITY), total = {};
    for (int h = 0; h < HEAD; h++) query[h] = load<Floats>(q + g * head_dim + PANEL * h);
    for (int64_t i = 0; i < SPAN; i++) {
      if (i >= count) {
        if (i % PANEL == 0) break;
        scores[i] = -INFINITY;
        continue;
      }
      Floats products = {};
      for (int h = 0; h < HEAD; h++) products += query[h] * load<Floats>(k + i * head_dim + PANEL * h);
      scores[i] = sum(products);
    }
    for (int64_t i = 0; i < count; i += PANEL) {
      Floats s = load<Floats>(scores + i);
      most = s > most ? s : most;
    }
    float top = most[0];
    for (int i = 1; i < PANEL; i++) top = most[i] > top ? most[i] : top;
    for (int64_t i = 0; i < count; i += PANEL) {
      Floats s = load<Floats>(scores + i), e = exp(s - top);
      e = s == -INFINITY ? all(0) : e;
      store(scores + i, e);
      total += e;
    }
    for (int64_t i = 0; i < count; i++)
      for (int h = 0; h < HEAD; h++) out[h] += scores[i] * load<Floats>(v + i * head_dim + PANEL * h);
    for (int h = 0; h < HEAD; h++) store(&part.out[g * head_dim + PANEL * h], out[h]);
    part.most[g] = top, part.total[g] = sum(total);
  }
}

// Attention of T tokens behind `start` others: q (T, n_heads, head_dim) → out, the same shape.
template <int HEAD>
void attend(const Shape& shape, const Cache& cache, const float* q, int64_t q_stride, int64_t T, int64_t start, float* out) {
  constexpr int64_t head_dim = HEAD * PANEL;
  int64_t group = shape.n_heads / shape.n_kv_heads, spans = (start + T + SPAN - 1) / SPAN;
  std::vector<Part> parts(T * shape.n_kv_heads * spans);
  parallel(parts.size(), [&](int64_t i) {
    int64_t span = i % spans, head = i / spans % shape.n_kv_heads, t = i / spans / shape.n_kv_heads;
    int64_t first = span * SPAN, count = std::min(SPAN, start + t + 1 - first), at = (head * cache.capacity + first) * head_dim;
    if (count > 0)
      attend_span<HEAD>(q + t * q_stride + head * group * head_dim, cache.keys + at, cache.values + at, group, count, parts[i]);
  });
  // e^(score − most) of each span, brought to the largest score of all.
  for (int64_t i = 0; i < T * shape.n_kv_heads; i++)
    for (int64_t g = 0; g < group; g++) {
      float top = -INFINITY, total = 0;
      const Part* part = &parts[i * spans];
      int64_t count = (start + i / shape.n_kv_heads) / SPAN + 1;
      for (int64_t s = 0; s < count; s++) top = std::max(top, part[s].most[g]);
      Floats mixed[HEAD] = {};
      for (int64_t s = 0; s < count; s++) {
        float share = std::exp(part[s].most[g] - top);
        total += share * part[s].total[g];
        for (int h = 0; h < HEAD; h++) mixed[h] += share * load<Floats>(&part[s].out[g * head_dim + PANEL * h]);
      }
      for (int h = 0; h < HEAD; h++) store(out + (i * group + g) * head_dim + PANEL * h, mixed[h] / total);
    }
}

struct Layer {
  const float *attention_norm, *ffn_norm;
  Weight wqkv, wo, w13, w2;  // wq, wk and wv below each other, w1 and w3 too
  Cache cache;
};

// Add a layer's attention and feed-forward to the residual stream x (T, dim), and its keys and values to the cache.
// freqs_cis: (T, head_dim), cosine and sine in turn.
inline void layer(const Shape& shape, const Layer& layer, const float* freqs_cis, int64_t T, int64_t start, float* x) {
  int64_t dim = shape.dim, head_dim = shape.head_dim, q_dim = shape.n_heads * head_dim, kv_dim = shape.n_kv_heads * head_dim;
  std::vector<float> normed(T * dim), qkv(T * layer.wqkv.out), mixed(T * q_dim), gates(T * layer.w13.out);
  Rows narrow(T, layer.wqkv), heads(T, layer.wo), wide(T, layer.w2);

  parallel(T, [&](int64_t t) {
    rms_norm(x + t * dim, layer.attention_norm, shape.eps, dim, &normed[t * dim]);
    narrow.quantise(t, &normed[t * dim]);
  });
  product(layer.wqkv, narrow, qkv.data());
  float scale = 1 / std::sqrt((float)head_dim);
  parallel(T, [&](int64_t t) {
    float *q = &qkv[t * layer.wqkv.out], *k = q + q_dim, *v = k + kv_dim;
    for (float* head = q; head < v; head += head_dim) rotate(head, freqs_cis + t * head_dim, head_dim);
    for (int64_t i = 0; i < q_dim; i++) q[i] *= scale;
    for (int64_t head = 0; head < shape.n_kv_heads; head++) {
      int64_t at = (head * layer.cache.capacity + start + t) * head_dim;
      std::memcpy(layer.cache.keys + at, k + head * head_dim, head_dim * sizeof(float));
      std::memcpy(layer.cache.values + at, v + head * head_dim, head_dim * sizeof(float));
    }
  });
  auto attention = head_dim == 128 ? attend<8> : head_dim == 64 ? attend<4> : head_dim == 32 ? attend<2> : attend<1>;
  attention(shape, layer.cache, qkv.data(), layer.wqkv.out, T, start, mixed.data());
  parallel(T, [&](int64_t t) { heads.quantise(t, &mixed[t * q_dim]); });
  product(layer.wo, heads, x, true);

  parallel(T, [&](int64_t t) {
    rms_norm(x + t * dim, layer.ffn_norm, shape.eps, dim, &normed[t * dim]);
    narrow.quantise(t, &normed[t * dim]);
  });
  product(layer.w13, narrow, gates.data());
  parallel(T, [&](int64_t t) {
    float *gate = &gates[t * layer.w13.out], *value = gate + shape.ffn_dim;
    for (int64_t i = 0; i < shape.ffn_dim; i += PANEL) {
      Floats g = load<Floats>(gate + i);
      store(gate + i, g / (1 + exp(-g)) * load<Floats>(value + i));
    }
    wide.quantise(t, gate);
  });
  product(layer.w2, wide, x, true);
}

}  // namespace llama_scratch

#include "cpp/search.h"

// --- What torch calls -------------------------------------------------------------------------

#if !defined(LLAMA_SCRATCH_ALONE)
namespace {

using at::Tensor;
using namespace llama_scratch;

// values: (panels, in/4, 16, 4) int8 or (panels, in/8, 16, 4) uint8; scales: (panels, in/block, 16) float16.
Weight weight(const Tensor& values, const Tensor& scales) {
  int bits = values.scalar_type() == at::kChar ? 8 : 4;
  TORCH_CHECK(values.dim() == 4 && values.size(2) == PANEL && values.size(3) == GROUP && values.is_contiguous() &&
                  (bits == 8 || values.scalar_type() == at::kByte) && scales.dim() == 3 && scales.size(2) == PANEL &&
                  scales.is_contiguous() && scales.scalar_type() == at::kHalf && values.size(0) == scales.size(0) &&
                  values.size(1) * GROUP * 8 / bits == scales.size(1) * block_of(bits),
              "a weight of shapes ", values.sizes(), " and ", scales.sizes(), " is no panels of blocks");
  return {(const int8_t*)values.const_data_ptr(), (const uint16_t*)scales.const_data_ptr(), values.size(0) * PANEL,
          scales.size(1) * block_of(bits), bits};
}

// x (T, in) float32 → (T, panels·16) float32.
Tensor linear(const Tensor& x, const Tensor& values, const Tensor& scales) {
  Weight w = weight(values, scales);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == w.in && x.is_contiguous() && x.scalar_type() == at::kFloat, "x of shape ", x.sizes(),
              " does not fit a weight of ", w.in, " inputs");
  Rows rows(x.size(0), w);
  const float* from = x.const_data_ptr<float>();
  parallel(rows.T, [&](int64_t t) { rows.quantise(t, from + t * w.in); });
  Tensor y = at::empty({rows.T, w.out}, x.options());
  product(w, rows, y.data_ptr<float>());
  return y;
}

// The layers of a network, one after the other, for the tokens x (T, dim), which the residual stream then is.
// weights: ten a layer, in the order of `Layer`. cache: keys and values of each layer, (n_kv_heads, capacity, head_dim).
void layers(Tensor x, at::TensorList weights, const Tensor& freqs_cis, at::TensorList cache, int64_t start, int64_t n_heads,
            double eps) {
  int64_t T = x.size(0), dim = x.size(1), count = weights.size() / 10;
  TORCH_CHECK(count && weights.size() == 10 * count && cache.size() == 2 * count && cache[0].dim() == 3, "ten weights and two caches a layer");
  int64_t n_kv_heads = cache[0].size(0), capacity = cache[0].size(1), head_dim = cache[0].size(2), q_dim = n_heads * head_dim;
  auto fits = [](const Tensor& t, at::IntArrayRef sizes) {
    return t.sizes() == sizes && t.is_contiguous() && t.scalar_type() == at::kFloat;
  };
  TORCH_CHECK(fits(x, {T, dim}) && fits(freqs_cis, {T, head_dim}) && n_heads % n_kv_heads == 0 && start >= 0 && start + T <= capacity &&
                  (head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 128),
              "x, freqs_cis and the cache do not fit together");
  for (int64_t i = 0; i < count; i++) {
    const Tensor *w = &weights[10 * i], *held = &cache[2 * i];
    Weight wqkv = weight(w[2], w[3]), wo = weight(w[4], w[5]), w13 = weight(w[6], w[7]), w2 = weight(w[8], w[9]);
    TORCH_CHECK(fits(held[0], cache[0].sizes()) && fits(held[1], cache[0].sizes()), "the caches of layers 0 and ", i, " do not fit together");
    TORCH_CHECK(fits(w[0], {dim}) && fits(w[1], {dim}) &&
                    wqkv.in == dim && wqkv.out == q_dim + 2 * n_kv_heads * head_dim && wo.in == q_dim && wo.out == dim &&
                    w13.in == dim && w13.bits == wqkv.bits && w13.out == 2 * w2.in && w2.out == dim,
                "the weights of layer ", i, " do not fit together");
    layer(Shape{dim, n_heads, n_kv_heads, head_dim, w2.in, (float)eps},
          Layer{w[0].const_data_ptr<float>(), w[1].const_data_ptr<float>(), wqkv, wo, w13, w2,
                Cache{held[0].data_ptr<float>(), held[1].data_ptr<float>(), capacity}},
          freqs_cis.const_data_ptr<float>(), T, start, x.data_ptr<float>());
  }
}

// Rows (out, in) float32 → values and scales in panels; false if a weight is NaN or too large. See cpp/search.h.
std::tuple<Tensor, Tensor, bool> quantize(const Tensor& rows, at::ArrayRef<double> steps, int64_t bits) {
  TORCH_CHECK((bits == 8 || bits == 4) && rows.is_cpu() && rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == at::kFloat &&
                  rows.size(1) % block_of(bits) == 0,
              "rows of shape ", rows.sizes(), " do not fit blocks of ", bits, " bits");
  int64_t out = rows.size(0), in = rows.size(1), panels = (out + PANEL - 1) / PANEL;
  Tensor values = at::empty({panels, in * bits / (8 * GROUP), PANEL, GROUP}, rows.options().dtype(bits == 8 ? at::kChar : at::kByte));
  Tensor scales = at::empty({panels, in / block_of(bits), PANEL}, rows.options().dtype(at::kHalf));
  bool fits = search::quantize(rows.const_data_ptr<float>(), out, in, bits, std::vector<float>(steps.begin(), steps.end()).data(),
                               steps.size(), (uint8_t*)values.mutable_data_ptr(), (uint16_t*)scales.mutable_data_ptr());
  return {values, scales, fits};
}

const char* machine() { return MACHINE; }

}  // namespace

TORCH_LIBRARY(llama_scratch, m) {
  m.def("linear(Tensor x, Tensor values, Tensor scales) -> Tensor", &linear);
  m.def("layers(Tensor(a!) x, Tensor[] weights, Tensor freqs_cis, Tensor[] cache, int start, int n_heads, float eps) -> ()", &layers);
  m.def("quantize(Tensor rows, float[] steps, int bits) -> (Tensor values, Tensor scales, bool fits)", &quantize);
  m.def("machine() -> str", [] { return std::string(machine()); });
}
#endif
