// Shared by the other files: vector registers and threads.
//
// A vector register holds several numbers (lanes). One instruction computes with all of them, like
// an elementwise operation on a small numpy array. The compiler provides most operators (+, *, <)
// for such vectors. Functions named _mm… and v… are single CPU instructions (intrinsics). The
// preprocessor (#if) selects the code for the instruction set of this machine.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if !defined(LLAMA_SCRATCH_ALONE)
#include <ATen/Parallel.h>
#endif
#if defined(LLAMA_SCRATCH_PLAIN)
#undef __AVX2__
#undef __AVX512F__
#undef __AVX512VNNI__
#undef __F16C__
#undef __ARM_FEATURE_DOTPROD
#undef __ARM_NEON
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace llama_scratch {

// Read or write a value of type V at any address, aligned or not.
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

// --- One register -----------------------------------------------------------------------------
//
// Vector: LANES float32 numbers.
// fma(a, b, c): a·b + c, rounded only once if the CPU supports it.
// halves(h): loads LANES float16 numbers from address h, as float32.

#if defined(__AVX512F__)
constexpr int LANES = 16;
using Vector = __m512;
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector halves(const void* h) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)h));
}
#elif defined(__AVX2__)
constexpr int LANES = 8;
using Vector = __m256;
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector halves(const void* h) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)h)); }
#else
constexpr int LANES = 4;
using Vector = float __attribute__((vector_size(16)));
#if defined(__ARM_NEON)
inline Vector fma(Vector a, Vector b, Vector c) {
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
inline Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
#endif
#define LLAMA_SCRATCH_HALVES  // no instruction for `halves`: implemented below
#endif

// Keep a value in its register. Otherwise, the compiler reloads it for each product.
inline void keep(Vector& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

using Whole = int32_t __attribute__((vector_size(4 * LANES)));
using Short = uint16_t __attribute__((vector_size(2 * LANES)));
using Signed = int8_t __attribute__((vector_size(16)));
using Unsigned = uint8_t __attribute__((vector_size(16)));

inline Vector all(float x) { return Vector{} + x; }
inline Vector floats(Whole v) { return __builtin_convertvector(v, Vector); }
inline Vector vector_at(const float* from) { return load<Vector>(from); }

// Convert 16 bytes to 32-bit integers, in 16 / LANES registers.
#if defined(__AVX512F__)
inline void widen(Signed v, Whole* q) { q[0] = (Whole)_mm512_cvtepi8_epi32((__m128i)v); }
inline void widen(Unsigned v, Whole* q) { q[0] = (Whole)_mm512_cvtepu8_epi32((__m128i)v); }
#elif defined(__AVX2__)
inline void widen(Signed v, Whole* q) {
  q[0] = (Whole)_mm256_cvtepi8_epi32((__m128i)v),
  q[1] = (Whole)_mm256_cvtepi8_epi32(_mm_srli_si128((__m128i)v, 8));
}
inline void widen(Unsigned v, Whole* q) {
  q[0] = (Whole)_mm256_cvtepu8_epi32((__m128i)v),
  q[1] = (Whole)_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)v, 8));
}
#else
template <class Bytes>
inline void widen(Bytes v, Whole* q) {
  for (int i = 0; i < 16; i++) q[i / LANES][i % LANES] = v[i];
}
#endif

// Convert one float16 to float32: shift exponent and mantissa to their place in a float32, then
// multiply by 2^112 to correct the bias of the exponent.
inline float half(uint16_t h) {
  uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  float value = load<float>(&magnitude) * 0x1p112f;
  if (value >= 0x1p16f) value = h & 0x3ff ? NAN : INFINITY;
  uint32_t bits = load<uint32_t>(&value) | sign;
  return load<float>(&bits);
}
#if defined(__AVX2__) || defined(__AVX512F__)
inline float half_at(const void* h) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(load<uint16_t>(h))));
}
#else
inline float half_at(const void* h) { return half(load<uint16_t>(h)); }
#endif
#if defined(LLAMA_SCRATCH_HALVES)
inline Vector halves(const void* h) {
  Vector f;
  for (int i = 0; i < LANES; i++) f[i] = half(load<uint16_t>((const uint16_t*)h + i));
  return f;
}
#endif

// Sum the lanes of each of four registers. The order of the additions is: in each group of four
// lanes, lanes i and i + 2, then the two sums; then the sums of the groups.
#if defined(__AVX2__) || defined(__AVX512F__)
inline __m128 fold(__m128 v) { return v; }
inline __m128 fold(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
#endif
#if defined(__AVX512F__)
inline __m128 fold(__m512 v) {
  return fold(_mm256_add_ps(_mm512_castps512_ps256(v),
                            _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1))));
}
inline void sums(Vector a, Vector b, Vector c, Vector d, float (&sum)[4]) {
  __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
         high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
  _mm_storeu_ps(sum, fold(_mm512_add_ps(low, high)));
}
#elif defined(__AVX2__)
inline void sums(Vector a, Vector b, Vector c, Vector d, float (&sum)[4]) {
  __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
  __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
  __m256 low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
         high = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
  _mm_storeu_ps(sum, fold(_mm256_add_ps(low, high)));
}
#else
inline void sums(Vector a, Vector b, Vector c, Vector d, float (&sum)[4]) {
  Vector v[] = {a, b, c, d};
  for (int i = 0; i < 4; i++) sum[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
}
#endif

// e^x, with an error of about one unit in the last place. Source: Cephes, expf.
inline Vector exp(Vector x) {
  x = x < -87.0f ? all(-87) : x;
  x = x > 88.0f ? all(88) : x;
  Vector n = x * 1.44269504f + 0x1.8p23f - 0x1.8p23f;  // e^x = 2^n · e^r, n = round(x / ln 2)
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);
  for (float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  p = p * r * r + r + 1.0f;
  return (Vector)((Whole)p + (__builtin_convertvector(n, Whole) << 23));
}

// --- Memory and threads -----------------------------------------------------------------------

// Prefetch the cache line AHEAD bytes later in a stream of weights, into all cache levels. The
// non-temporal hint (locality 0) halved the bandwidth on an Intel CPU.
constexpr int AHEAD = 2048;
inline void prefetch(const void* from) { __builtin_prefetch((const uint8_t*)from + AHEAD); }

// A product with one row reads this many streams of weights at once, far apart in memory. The
// hardware prefetcher of a stream stops at the end of a page. Until it continues on the next page,
// the other streams use the bandwidth.
constexpr int64_t STREAMS = 4;

// Uninitialized memory that is reused between calls and grows if necessary.
template <class N>
class Buffer {
  std::unique_ptr<N[]> data_;
  int64_t size_ = 0;

 public:
  N* take(int64_t size) {
    if (size > size_) data_.reset(new N[size]), size_ = size;
    return data_.get();
  }
};

#if defined(LLAMA_SCRATCH_ALONE)  // without torch, for tests with sanitizers and benchmarks
inline int threads() { return 1; }
template <class F>
void parallel_pieces(int64_t n, const F& f) {
  if (n) f(0, n);
}
#else
inline int threads() { return ::at::get_num_threads(); }
// Split the range 0 to n into pieces and call f(begin, end) for each, on several threads.
template <class F>
void parallel_pieces(int64_t n, const F& f) {
  ::at::parallel_for(0, n, 1, f);
}
#endif

// Call f(i) for each i in range(n), on several threads.
template <class F>
void parallel(int64_t n, const F& f) {
  parallel_pieces(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

}  // namespace llama_scratch
