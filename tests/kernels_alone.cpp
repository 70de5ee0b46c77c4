// The kernels without torch: a library for the tests, and a program that the sanitizers watch.

#define LLAMA_SCRATCH_ALONE
#include "../llama_scratch/kernels.cpp"

#include <cstdio>
#include <random>

using namespace llama_scratch;

extern "C" {

const char* machine_name() { return MACHINE; }

void quantise_rows(const float* x, int64_t T, int64_t in, int bits, int8_t* values, float* scales, int32_t* sums) {
  Rows rows(T, Weight{nullptr, nullptr, 0, in, bits});
  for (int64_t t = 0; t < T; t++) rows.quantise(t, x + t * in);
  std::copy(rows.values.begin(), rows.values.end(), values);
  std::copy(rows.scales.begin(), rows.scales.end(), scales);
  std::copy(rows.sums.begin(), rows.sums.end(), sums);
}

void product_of(const float* x, int64_t T, const int8_t* values, const uint16_t* scales, int64_t out, int64_t in, int bits,
                float* y, bool add) {
  Weight w{values, scales, out, in, bits};
  Rows rows(T, w);
  for (int64_t t = 0; t < T; t++) rows.quantise(t, x + t * in);
  product(w, rows, y, add);
}

void layer_of(float* x, int64_t T, const float** norms, const int8_t** values, const uint16_t** scales, int bits,
              const float* freqs_cis, float* keys, float* cached_values, int64_t capacity, int64_t start, int64_t dim,
              int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t ffn_dim) {
  int64_t q_dim = n_heads * head_dim, outs[] = {q_dim + 2 * n_kv_heads * head_dim, dim, 2 * ffn_dim, dim};
  int64_t ins[] = {dim, q_dim, dim, ffn_dim};
  Weight w[4];
  for (int i = 0; i < 4; i++) w[i] = {values[i], scales[i], outs[i], ins[i], bits};
  layer(Shape{dim, n_heads, n_kv_heads, head_dim, ffn_dim, 1e-5f},
        Layer{norms[0], norms[1], w[0], w[1], w[2], w[3], Cache{keys, cached_values, capacity}}, freqs_cis, T, start, x);
}

bool search_of(const float* rows, int64_t out, int64_t in, int64_t bits, const float* steps, int64_t n_steps, uint8_t* values,
               uint16_t* scales) {
  return search::quantize(rows, out, in, bits, steps, n_steps, values, scales);
}
}

// --- Under the sanitizers: each buffer as long as it has to be, and no longer -----------------

std::mt19937 generator(0);

int64_t any(int64_t least, int64_t most) { return least + generator() % (most - least + 1); }

// Usual numbers; in hard cases also the largest, the smallest, zeros and what is no number.
std::vector<float> numbers(int64_t count, bool hard) {
  constexpr float odd[] = {0, -0.0f, FLT_MAX, -FLT_MAX, FLT_MIN, 1e-44f, INFINITY, -INFINITY, NAN, 127.5f};
  std::vector<float> x(count);
  for (float& v : x) v = hard && any(0, 9) == 0 ? odd[any(0, 9)] : any(-1000, 1000) / 250.0f;
  return x;
}

struct Stored {
  std::vector<int8_t> values;
  std::vector<uint16_t> scales;

  Stored(int64_t out, int64_t in, int bits, bool hard) : values(out * in * bits / 8), scales(out * in / block_of(bits)) {
    for (auto& v : values) v = bits == 4 || hard ? any(-128, 127) : any(-127, 127);
    for (auto& s : scales) s = hard ? any(0, 65535) : 0x2000 + any(0, 255);
  }
};

int main() {
  for (int i = 0; i < 300; i++) {
    int bits = any(0, 1) ? 8 : 4;
    bool hard = any(0, 1);
    int64_t T = any(0, 17), out = PANEL * any(1, 5), in = block_of(bits) * any(1, 4);
    Stored w(out, in, bits, hard);
    std::vector<float> x = numbers(T * in, hard), y(T * out);
    product_of(x.data(), T, w.values.data(), w.scales.data(), out, in, bits, y.data(), any(0, 1));
  }
  for (int i = 0; i < 60; i++) {
    constexpr int64_t starts[] = {0, 1, 254, 255, 256, 300, 511, 700};
    int bits = any(0, 1) ? 8 : 4;
    bool hard = any(0, 1);
    int64_t head_dim = 16 << any(0, 3), n_kv_heads = any(1, 2), n_heads = n_kv_heads * (head_dim < 64 ? 4 : any(1, 3));
    if (n_heads * head_dim % 64) n_heads = n_kv_heads = 4;
    int64_t dim = 64 * any(1, 3), ffn_dim = 64 * any(1, 3), T = any(1, 5), start = starts[any(0, 7)], capacity = start + T;
    int64_t q_dim = n_heads * head_dim, kv_dim = n_kv_heads * head_dim;
    Stored w[] = {{q_dim + 2 * kv_dim, dim, bits, hard}, {dim, q_dim, bits, hard}, {2 * ffn_dim, dim, bits, hard}, {dim, ffn_dim, bits, hard}};
    const int8_t* values[] = {w[0].values.data(), w[1].values.data(), w[2].values.data(), w[3].values.data()};
    const uint16_t* scales[] = {w[0].scales.data(), w[1].scales.data(), w[2].scales.data(), w[3].scales.data()};
    std::vector<float> attention_norm = numbers(dim, hard), ffn_norm = numbers(dim, hard), x = numbers(T * dim, hard);
    std::vector<float> keys = numbers(kv_dim * capacity, hard), cached = numbers(kv_dim * capacity, hard);
    std::vector<float> freqs_cis = numbers(T * head_dim, false);
    const float* norms[] = {attention_norm.data(), ffn_norm.data()};
    layer_of(x.data(), T, norms, values, scales, bits, freqs_cis.data(), keys.data(), cached.data(), capacity, start, dim, n_heads,
             n_kv_heads, head_dim, ffn_dim);
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
