// Attention: softmax(q kᵀ / √head_dim) v for new tokens after cached ones, as `attend` in model.py.
//
// This is flash attention with an online softmax. Keys and values are read in spans of SPAN tokens,
// once for BLOCK_OF_TOKENS new tokens and all query heads that share them. For each span, the
// largest score m is found first. Then the results are rescaled to the largest score so far, and
// added:
//
//     most' = max(most, m)     out' = e^(most − most')·out + e^(m − most')·Σ e^(score − m)·value
//     total' likewise, with 1 instead of the values
//
// The final result is out / total. The result for a query does not depend on the other queries: its
// scores and spans are the same, and its sums are added in the same order.
// Sources: Dao et al. 2022, arXiv:2205.14135; Milakov and Gimelshein 2018, arXiv:1805.02867 (online
// softmax).

#pragma once

#include "rows.h"

namespace llama_scratch {

constexpr int64_t SPAN = 256;
constexpr int64_t BLOCK_OF_TOKENS = 16;

// The dimensions of a network.
struct Shape {
  int64_t dim, n_heads, n_kv_heads, head_dim, ffn_dim;
  float eps;

  // query heads per key/value head
  int64_t group() const { return n_heads / n_kv_heads; }
};

// The cache of one layer: keys and values (n_kv_heads, capacity, head_dim).
struct Cache {
  float *keys, *values;
  int64_t capacity;
};

// The result of M queries over the spans so far: out (M, head_dim), and per query the largest score
// `most` and the total Σ e^(score − most).
struct Taken {
  int64_t head_dim;
  std::vector<float> out, most, total;

  Taken(int64_t M, int64_t head_dim)
      : head_dim(head_dim), out(M * head_dim), most(M, -INFINITY), total(M) {}

  // Add the result of one more span for query m.
  void add(int64_t m, float span_most, float span_total, const float* span_out) {
    if (span_total == 0) return;  // the query sees no token of the span; NaN ≠ 0, so NaN propagates
    float higher = std::max(most[m], span_most), before = std::exp(most[m] - higher),
          now = std::exp(span_most - higher);
    for (int64_t d = m * head_dim; d < (m + 1) * head_dim; d++)
      out[d] = before * out[d] + now * span_out[d - m * head_dim];
    total[m] = before * total[m] + now * span_total;
    most[m] = higher;
  }
};

// Multiply the attention weights of Q queries, shares (Q, SPAN), by values (count, head_dim), for
// the part of a head that fills H registers → out (Q, head_dim).
template <int Q, int H>
void mix(const float* shares, const float* values, int64_t count, int64_t head_dim, float* out) {
  Vector sum[Q][H] = {};
  for (int64_t i = 0; i < count; i++)
    for (int h = 0; h < H; h++) {
      Vector value = vector_at(values + i * head_dim + LANES * h);
      for (int q = 0; q < Q; q++) sum[q][h] = fma(all(shares[q * SPAN + i]), value, sum[q][h]);
    }
  for (int q = 0; q < Q; q++)
    for (int h = 0; h < H; h++) store(out + q * head_dim + LANES * h, sum[q][h]);
}

// The same for M queries and a whole head.
template <int H>
void mix_all(const float* shares, const float* values, int64_t M, int64_t count, int64_t head_dim,
             float* out) {
  constexpr int Q = LANES == 16 ? 6 : 3;
  for (int64_t h = 0; h < head_dim; h += H * LANES) {
    int64_t m = 0;
    for (; m + Q <= M; m += Q)
      mix<Q, H>(shares + m * SPAN, values + h, count, head_dim, out + m * head_dim + h);
    for (; m < M; m++)
      mix<1, H>(shares + m * SPAN, values + h, count, head_dim, out + m * head_dim + h);
  }
}

// Replace the scores of one query by e^(score − most). The query sees the first `seen` of `count`
// keys. Returns most and total.
inline std::pair<float, float> soften(float* scores, int64_t seen, int64_t count) {
  for (int64_t i = std::max<int64_t>(seen, 0); i < SPAN; i++) scores[i] = -INFINITY;
  if (seen <= 0) {
    std::fill(scores, scores + SPAN, 0);
    return {-INFINITY, 0};
  }
  Vector largest = all(-INFINITY), total = {};
  for (int64_t i = 0; i < seen; i += LANES)
    largest = vector_at(scores + i) > largest ? vector_at(scores + i) : largest;
  float most = largest[0];
  for (int i = 1; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
  for (int64_t i = 0; i < count; i += LANES) {
    Vector score = vector_at(scores + i), share = exp(score - most);
    share = score == -INFINITY ? all(0) : share;
    store(scores + i, share);
    total += share;
  }
  float sum[4];
  sums(total, total, total, total, sum);
  return {most, sum[0]};
}

// Add one span of a key/value head, which starts at key `first`, to the results of M queries.
// queries: (M, head_dim), already divided by √head_dim: for each token from `position` on, the
// queries of all heads of the group.
template <int H>
void take_span(const Shape& shape, const Cache& cache, int64_t head, int64_t first,
               const float* queries, int64_t M, int64_t position, Taken& taken) {
  static thread_local Buffer<float> score_buffer, mixed_buffer;
  int64_t head_dim = shape.head_dim, group = shape.group(),
          at = (head * cache.capacity + first) * head_dim;
  int64_t count = std::min(SPAN, position + (M - 1) / group + 1 - first);
  float *scores = score_buffer.take(M * SPAN), *mixed = mixed_buffer.take(M * head_dim);
  product_in_cache<F32, TALL>((const uint8_t*)(cache.keys + at), head_dim * sizeof(float), count,
                              queries, head_dim, M, head_dim, scores, SPAN, 1, false);
  std::vector<std::pair<float, float>> most_and_total(M);
  for (int64_t m = 0; m < M; m++)
    most_and_total[m] =
        soften(scores + m * SPAN, std::min(count, position + m / group + 1 - first), count);
  mix_all<H>(scores, cache.values + at, M, count, head_dim, mixed);
  for (int64_t m = 0; m < M; m++)
    taken.add(m, most_and_total[m].first, most_and_total[m].second, mixed + m * head_dim);
}

// Attention for T new tokens after `start` cached ones. q: rotated queries of the new tokens, with
// `q_stride` numbers per token → out (T, n_heads · head_dim).
template <int H>
void attend(const Shape& shape, const Cache& cache, const float* q, int64_t q_stride, int64_t T,
            int64_t start, float* out) {
  int64_t head_dim = shape.head_dim, group = shape.group(), width = group * head_dim,
          spans = (start + T + SPAN - 1) / SPAN;
  int64_t blocks = (T + BLOCK_OF_TOKENS - 1) / BLOCK_OF_TOKENS, units = shape.n_kv_heads * blocks;
  float scale = 1 / std::sqrt((float)head_dim);
  struct Unit {
    int64_t head, token, count;
    std::vector<float> queries;
  };
  auto unit = [&](int64_t i) {
    Unit u{i / blocks, i % blocks * BLOCK_OF_TOKENS};
    u.count = std::min(BLOCK_OF_TOKENS, T - u.token);
    u.queries.resize(u.count * width);
    for (int64_t t = 0; t < u.count; t++)
      for (int64_t d = 0; d < width; d++)
        u.queries[t * width + d] = q[(u.token + t) * q_stride + u.head * width + d] * scale;
    return u;
  };
  auto finish = [&](const Unit& u, const Taken& taken) {
    for (int64_t m = 0; m < u.count * group; m++)
      for (int64_t d = 0; d < head_dim; d++)
        out[(u.token + m / group) * shape.n_heads * head_dim + u.head * width +
            m % group * head_dim + d] = taken.out[m * head_dim + d] / taken.total[m];
  };
  auto take = [&](const Unit& u, int64_t span, Taken& taken) {
    if (span * SPAN < start + u.token + u.count)
      take_span<H>(shape, cache, u.head, span * SPAN, u.queries.data(), u.count * group,
                   start + u.token, taken);
  };
  if (units >= 4 * threads())
    return parallel(units, [&](int64_t i) {
      Unit u = unit(i);
      Taken taken(u.count * group, head_dim);
      for (int64_t span = 0; span < spans; span++) take(u, span, taken);
      finish(u, taken);
    });
  // Few tokens: distribute the spans over the threads too, and add their results in order.
  for (int64_t i = 0; i < units; i++) {
    Unit u = unit(i);
    std::vector<Taken> parts(spans, Taken(u.count * group, head_dim));
    parallel(spans, [&](int64_t span) { take(u, span, parts[span]); });
    for (int64_t span = 1; span < spans; span++)
      for (int64_t m = 0; m < u.count * group; m++)
        parts[0].add(m, parts[span].most[m], parts[span].total[m], &parts[span].out[m * head_dim]);
    finish(u, parts[0]);
  }
}

inline void attend(const Shape& shape, const Cache& cache, const float* q, int64_t q_stride,
                   int64_t T, int64_t start, float* out) {
  int64_t registers = shape.head_dim / LANES;
  auto attention = registers % 4 == 0 ? attend<4> : registers % 2 == 0 ? attend<2> : attend<1>;
  attention(shape, cache, q, q_stride, T, start, out);
}

}  // namespace llama_scratch
