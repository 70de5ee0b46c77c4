// One fused layer of a network. It has the same steps as `TransformerBlock` in model.py, which is
// easier to read.
//
// Decoding with a small model is not memory-bound. It is limited by the overhead of about thirty
// operator calls per layer, which this file replaces by one call. Each row of activations is
// computed in the same order whatever the other rows, so the results for several tokens at once are
// bit-identical to those for one token at a time.

#pragma once

#include "attention.h"
#include "panels.h"

namespace llama_scratch {

// --- Any weight -------------------------------------------------------------------------------

// A stored weight (out, in). data: rows in file format, or the values of panels. scales: the scales
// of panels, or null.
struct Weight {
  Type type;
  const void* data;
  const uint16_t* scales;
  int64_t out, in;

  bool in_panels() const { return type == Type::INT8 || type == Type::INT4; }
  Panels panels() const {
    return {(const int8_t*)data, scales, out, in, type == Type::INT8 ? 8 : 4};
  }
};

// Weights with the same inputs, stacked along their rows: either one weight in panels, or several
// weights in file format.
struct Matrix {
  std::vector<Weight> parts;

  int64_t in() const { return parts[0].in; }
  int64_t out() const {
    int64_t sum = 0;
    for (const Weight& w : parts) sum += w.out;
    return sum;
  }
};

// Compute y = x·Wᵀ, or y += x·Wᵀ if `add`: x (T, in), y (T, out). The rows of all parts form one
// range, which is divided among the threads.
inline void product(const Matrix& w, const float* x, int64_t T, float* y, bool add = false) {
  if (w.parts[0].in_panels()) {
    Panels panels = w.parts[0].panels();
    Rounded rows(T, panels);
    parallel(T, [&](int64_t t) { rows.round(t, x + t * w.in()); });
    return panels_product(panels, rows, y, add);
  }
  int64_t out = w.out();
  parallel_pieces((out + BLOCK - 1) / BLOCK, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Weight& part : w.parts) {
      int64_t from = std::max(begin * BLOCK - first, int64_t(0)),
              to = std::min(end * BLOCK - first, part.out);
      if (from < to)
        with_format(part.type, [&]<class W>() {
          rows_product<W>({(const uint8_t*)part.data, part.out, part.in}, from, to, x, T, y + first,
                          out, add);
        });
      first += part.out;
    }
  });
}

// --- The steps between the products -----------------------------------------------------------

// RMSNorm of x (dim,) float32, as in model.py.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t dim, float* y) {
  Vector squares = {};
  for (int64_t i = 0; i < dim; i += LANES)
    squares = fma(vector_at(x + i), vector_at(x + i), squares);
  float sum[4];
  sums(squares, squares, squares, squares, sum);
  float inverse_rms = 1 / std::sqrt(sum[0] / dim + eps);
  for (int64_t i = 0; i < dim; i += LANES)
    store(y + i, vector_at(x + i) * inverse_rms * vector_at(weight + i));
}

// RoPE: rotate each pair of numbers of one head. freqs_cis (head_dim,) alternates the cosine and
// sine of each angle.
inline void rotate(float* x, const float* freqs_cis, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; i += 2) {
    float a = x[i], b = x[i + 1], cos = freqs_cis[i], sin = freqs_cis[i + 1];
    x[i] = a * cos - b * sin;
    x[i + 1] = a * sin + b * cos;
  }
}

// y = SiLU(gate) · value, (ffn_dim,) each.
inline void swiglu(const float* gate, const float* value, int64_t ffn_dim, float* y) {
  for (int64_t i = 0; i < ffn_dim; i += LANES) {
    Vector g = vector_at(gate + i);
    store(y + i, g / (1 + exp(-g)) * vector_at(value + i));
  }
}

// --- The layer --------------------------------------------------------------------------------

struct Layer {
  const float *attention_norm, *ffn_norm;
  Matrix wqkv, wo, w13, w2;  // wq, wk and wv stacked; w1 and w3 stacked
  Cache cache;
};

// Intermediate results of a layer for T tokens. The next layer overwrites them.
struct Space {
  Buffer<float> normed, qkv, mixed, gates, gated;
};

// Add the outputs of attention and feed-forward to the residual stream x (T, dim), and the new keys
// and values to the cache.
// freqs_cis: (T, head_dim), alternating cosine and sine.
inline void layer(const Shape& shape, const Layer& layer, const float* freqs_cis, int64_t T,
                  int64_t start, float* x, Space& space) {
  int64_t dim = shape.dim, head_dim = shape.head_dim, q_dim = shape.n_heads * head_dim,
          kv_dim = shape.n_kv_heads * head_dim;
  int64_t qkv_dim = q_dim + 2 * kv_dim, ffn_dim = shape.ffn_dim;
  float *normed = space.normed.take(T * dim), *qkv = space.qkv.take(T * qkv_dim),
        *mixed = space.mixed.take(T * q_dim);
  float *gates = space.gates.take(T * 2 * ffn_dim), *gated = space.gated.take(T * ffn_dim);

  // 1. RMSNorm
  parallel(T, [&](int64_t t) {
    rms_norm(x + t * dim, layer.attention_norm, shape.eps, dim, normed + t * dim);
  });
  // 2. Queries, keys and values, in one product
  product(layer.wqkv, normed, T, qkv);
  parallel(T, [&](int64_t t) {
    float *q = qkv + t * qkv_dim, *k = q + q_dim, *v = k + kv_dim;
    // 3. RoPE of queries and keys
    for (float* head = q; head < v; head += head_dim)
      rotate(head, freqs_cis + t * head_dim, head_dim);
    // 4. Write keys and values to the cache
    for (int64_t head = 0; head < shape.n_kv_heads; head++) {
      int64_t at = (head * layer.cache.capacity + start + t) * head_dim;
      std::memcpy(layer.cache.keys + at, k + head * head_dim, head_dim * sizeof(float));
      std::memcpy(layer.cache.values + at, v + head * head_dim, head_dim * sizeof(float));
    }
  });
  // 5. Attention
  attend(shape, layer.cache, qkv, qkv_dim, T, start, mixed);
  // 6. Output projection, added to the residual stream
  product(layer.wo, mixed, T, x, true);

  // 7. RMSNorm and SwiGLU, added to the residual stream
  parallel(T, [&](int64_t t) {
    rms_norm(x + t * dim, layer.ffn_norm, shape.eps, dim, normed + t * dim);
  });
  product(layer.w13, normed, T, gates);
  parallel(T, [&](int64_t t) {
    const float* gate = gates + t * 2 * ffn_dim;
    swiglu(gate, gate + ffn_dim, ffn_dim, gated + t * ffn_dim);
  });
  product(layer.w2, gated, T, x, true);
}

}  // namespace llama_scratch
