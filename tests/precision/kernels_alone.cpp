// The kernels without torch: a library for tests, and a program to run under sanitizers.

#define LLAMA_SCRATCH_ALONE
#include "../../llama_scratch/precision/kernels.cpp"

#include <cstdio>
#include <random>

using namespace llama_scratch;

extern "C" {

const char* machine_name() { return MACHINE; }

void round_rows(const float* x, int64_t T, int64_t in, int64_t bits, int8_t* values, float* scales, int32_t* sums) {
  Rounded rows(T, Panels{nullptr, nullptr, 0, in, (int)bits});
  for (int64_t t = 0; t < T; t++) rows.round(t, x + t * in);
  std::copy(rows.values, rows.values + T * in, values);
  std::copy(rows.scales, rows.scales + T * rows.blocks, scales);
  std::copy(rows.sums, rows.sums + T * rows.blocks, sums);
}

// type: index in `Type`. scales: only for panels.
void product_of(const float* x, int64_t T, const void* data, const uint16_t* scales, int64_t type, int64_t out, int64_t in, float* y,
                int64_t add) {
  product(Matrix{{Weight{Type(type), data, scales, out, in}}}, x, T, y, add);
}

void rows_of(const uint8_t* data, int64_t type, int64_t out, int64_t in, float* y) {
  with_format(Type(type), [&]<class W>() {
    for (int64_t i = 0; i < out; i++) unpack<W>(data + i * bytes_of<W>(in), 0, in, y + i * in);
  });
}

void attention_of(const float* q, int64_t T, float* keys, float* values, int64_t capacity, int64_t start, int64_t n_heads,
                  int64_t n_kv_heads, int64_t head_dim, float* out) {
  attend(Shape{0, n_heads, n_kv_heads, head_dim}, Cache{keys, values, capacity}, q, n_heads * head_dim, T, start, out);
}

bool search_of(const float* rows, int64_t out, int64_t in, int64_t bits, const float* steps, int64_t n_steps, uint8_t* values,
               uint16_t* scales) {
  return search::quantize(rows, out, in, bits, steps, n_steps, values, scales);
}
}

// --- For the sanitizers: every buffer has exactly the required size ---------------------------

std::mt19937 generator(0);

int64_t any(int64_t least, int64_t most) { return least + generator() % (most - least + 1); }

// Normal numbers, and for hard cases also the largest, the smallest, zeros, infinity and NaN.
std::vector<float> numbers(int64_t count, bool hard) {
  constexpr float odd[] = {0, -0.0f, FLT_MAX, -FLT_MAX, FLT_MIN, 1e-44f, INFINITY, -INFINITY, NAN, 127.5f};
  std::vector<float> x(count);
  for (float& v : x) v = hard && any(0, 9) == 0 ? odd[any(0, 9)] : any(-1000, 1000) / 250.0f;
  return x;
}

bool in_panels(Type type) { return type == Type::INT8 || type == Type::INT4; }

int64_t block_of(Type type) {
  int64_t columns = type == Type::INT8 ? block_of(8) : block_of(4);
  with_format(type, [&]<class W>() { columns = W::COLUMNS_A_BLOCK; });
  return columns;
}

// A weight of random bytes.
struct Stored {
  std::vector<uint8_t> data;
  std::vector<uint16_t> scales;
  Weight weight;

  Stored(Type type, int64_t out, int64_t in, bool hard) {
    int64_t bytes = type == Type::INT8 ? out * in : out * in / 2;
    with_format(type, [&]<class W>() { bytes = out * bytes_of<W>(in); });
    data.resize(bytes);
    for (auto& v : data) v = any(0, 255);
    if (in_panels(type)) scales.resize(out * in / block_of(type));
    for (auto& s : scales) s = hard ? any(0, 65535) : 0x2000 + any(0, 255);
    weight = {type, data.data(), scales.data(), out, in};
  }
};

// Stacked weights with `out` rows in total.
struct Several {
  std::vector<Stored> stored;
  Matrix matrix;

  Several(int64_t out, int64_t in, bool hard) {
    bool panels = any(0, 2) == 0;
    while (out) {
      Type type = Type(panels ? any(0, 1) : any(2, 12));
      if (in % block_of(type)) continue;
      int64_t rows = panels ? out : any(1, out);
      stored.emplace_back(type, rows, in, hard);
      matrix.parts.push_back(stored.back().weight);  // moving a vector keeps its memory
      out -= rows;
    }
  }
};

int main() {
  for (int i = 0; i < 600; i++) {
    Type type = Type(any(0, 12));
    bool hard = any(0, 1), panels = in_panels(type);
    int64_t T = any(0, 19), out = panels ? PANEL * any(1, 5) : any(1, 60), block = block_of(type);
    int64_t in = block * (block == 1 ? any(1, any(0, 3) ? 70 : 1100) : any(1, any(0, 3) ? 3 : 1400 / block));
    Stored w(type, out, in, hard);
    std::vector<float> x = numbers(T * in, hard), y(T * out), rows(out * in);
    product_of(x.data(), T, w.data.data(), w.scales.data(), (int64_t)type, out, in, y.data(), any(0, 1));
    if (!panels) rows_of(w.data.data(), (int64_t)type, out, in, rows.data());
  }
  constexpr int64_t starts[] = {0, 1, 254, 255, 256, 300, 511, 700};
  for (int i = 0; i < 100; i++) {
    bool hard = any(0, 1);
    int64_t head_dim = 16 * any(1, 8), n_kv_heads = any(1, 3), n_heads = n_kv_heads * any(1, 5), T = any(1, 40), start = starts[any(0, 7)];
    int64_t capacity = start + T;
    std::vector<float> q = numbers(T * n_heads * head_dim, hard), out(q.size());
    std::vector<float> keys = numbers(n_kv_heads * capacity * head_dim, hard), values = numbers(keys.size(), hard);
    attention_of(q.data(), T, keys.data(), values.data(), capacity, start, n_heads, n_kv_heads, head_dim, out.data());
  }
  for (int i = 0; i < 60; i++) {
    bool hard = any(0, 1);
    int64_t head_dim = 16 << any(0, 3), n_kv_heads = any(1, 2), n_heads = n_kv_heads * (head_dim < 64 ? 4 : any(1, 3));
    if (n_heads * head_dim % 64) n_heads = n_kv_heads = 4;
    int64_t dim = 64 * any(1, 4), ffn_dim = 64 * any(1, 4), T = any(1, 5), start = starts[any(0, 7)], capacity = start + T;
    int64_t q_dim = n_heads * head_dim, kv_dim = n_kv_heads * head_dim;
    Several wqkv(q_dim + 2 * kv_dim, dim, hard), wo(dim, q_dim, hard), w13(2 * ffn_dim, dim, hard), w2(dim, ffn_dim, hard);
    std::vector<float> attention_norm = numbers(dim, hard), ffn_norm = numbers(dim, hard), x = numbers(T * dim, hard);
    std::vector<float> keys = numbers(kv_dim * capacity, hard), values = numbers(kv_dim * capacity, hard);
    std::vector<float> freqs_cis = numbers(T * head_dim, false);
    Space space;
    layer(Shape{dim, n_heads, n_kv_heads, head_dim, ffn_dim, 1e-5f},
          Layer{attention_norm.data(), ffn_norm.data(), wqkv.matrix, wo.matrix, w13.matrix, w2.matrix,
                Cache{keys.data(), values.data(), capacity}},
          freqs_cis.data(), T, start, x.data(), space);
  }
  for (int i = 0; i < 100; i++) {
    int bits = any(0, 1) ? 8 : 4;
    int64_t out = any(0, 40), in = block_of(bits) * any(1, 3), panels = (out + PANEL - 1) / PANEL, n_steps = any(0, 33);
    std::vector<float> rows = numbers(out * in, any(0, 3) == 0), steps(n_steps);
    for (float& step : steps) step = any(500, 900) / (any(0, 1) ? 100.0f : -100.0f);
    std::vector<uint8_t> values(panels * PANEL * in * bits / 8);
    std::vector<uint16_t> scales(panels * PANEL * in / block_of(bits));
    search_of(rows.data(), out, in, bits, steps.data(), n_steps, values.data(), scales.data());
  }
  std::puts("clean");
}
