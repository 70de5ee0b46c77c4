// C++ kernels for the CPU, and their registration as torch operators. Each file begins with a
// description of its computation:
//
//     cpp/vectors.h    vector registers and threads
//     cpp/rows.h       products with 32-bit and 16-bit weights and GGUF blocks, in file format
//     cpp/panels.h     products with 8-bit and 4-bit weights, packed for vector instructions
//     cpp/search.h     quantization to 8 or 4 bits with a search for the best scales
//     cpp/attention.h  softmax(q kᵀ) v
//     cpp/layer.h      one layer of a network
//
// Slower Python versions of the same computations: `Rows` in rows.py, `Panels` in panels.py, and
// model.py.
//
// For readers who know Python:
//
//     template <int R>         compiled once per value of R, which is a constant in each version
//     template <class W>       the same for a type W
//     [&](int64_t i) { … }     a lambda that can use the local variables around it
//     x + t * dim              address of element t * dim: row t of a row-major array (T, dim)
//     (int8_t*)p               the bytes at address p, read as int8
//     constexpr                computed by the compiler
//     static thread_local      one variable per thread, which keeps its value between calls
//     #pragma GCC unroll       tells the compiler to unroll the loop

#include "cpp/layer.h"
#include "cpp/search.h"

#if !defined(LLAMA_SCRATCH_ALONE)
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace {

using ::at::Tensor;
using namespace llama_scratch;

// --- Weights ----------------------------------------------------------------------------------

constexpr const char* NAMES[] = {"int8", "int4", "float32", "float16", "bfloat16", "Q8_0", "Q4_0",
                                 "Q4_1", "Q5_0", "Q5_1",    "Q4_K",    "Q5_K",     "Q6_K"};

Type type_of(std::string_view name) {
  for (size_t i = 0; i < std::size(NAMES); i++)
    if (name == NAMES[i]) return Type(i);
  TORCH_CHECK(false, "No kernel supports the format ", name, ". Convert the weight to float32.");
}

// Check the tensors of a weight in panels, with these shapes and dtypes:
// int8: values (panels, in/4, 16, 4) int8 and scales (panels, in/32, 16) float16
// int4: values (panels, in/8, 16, 4) uint8 and scales (panels, in/64, 16) float16
Weight in_panels(Type type, const Tensor& values, const Tensor& scales) {
  int bits = type == Type::INT8 ? 8 : 4;
  TORCH_CHECK(values.dim() == 4 && values.size(2) == PANEL && values.size(3) == GROUP &&
                  values.is_contiguous() &&
                  values.scalar_type() == (bits == 8 ? ::at::kChar : ::at::kByte) &&
                  scales.dim() == 3 && scales.size(2) == PANEL && scales.is_contiguous() &&
                  scales.scalar_type() == ::at::kHalf && values.size(0) == scales.size(0) &&
                  values.size(1) * GROUP * 8 / bits == scales.size(1) * block_of(bits),
              "Values of shape ", values.sizes(), " and scales of shape ", scales.sizes(),
              " are not ", bits, "-bit panels. Pack the weight with `to_panels`.");
  return {type, values.const_data_ptr(), (const uint16_t*)scales.const_data_ptr(),
          values.size(0) * PANEL, scales.size(1) * block_of(bits)};
}

// Check the tensor of a weight in rows: (out, in) in a float dtype, or (out, bytes per row) uint8
// in one of GGUF's formats.
Weight in_rows(Type type, const Tensor& data) {
  int64_t in = 0;
  with_format(type, [&]<class W>() {
    int64_t size = W::COLUMNS_A_BLOCK == 1 ? data.element_size() * data.size(1) : data.size(1);
    TORCH_CHECK(size % W::BYTES_A_BLOCK == 0, "Rows of ", size, " bytes are not whole blocks of ",
                NAMES[int(type)], ". Pass complete rows, or another format.");
    in = size / W::BYTES_A_BLOCK * W::COLUMNS_A_BLOCK;
  });
  auto expected = type == Type::F32    ? ::at::kFloat
                  : type == Type::F16  ? ::at::kHalf
                  : type == Type::BF16 ? ::at::kBFloat16
                                       : ::at::kByte;
  TORCH_CHECK(data.dim() == 2 && data.is_contiguous() && data.scalar_type() == expected,
              "A weight of shape ", data.sizes(), " and dtype ", data.scalar_type(),
              " does not contain rows of ", NAMES[int(type)], ". Pass another format.");
  return {type, data.const_data_ptr(), nullptr, data.size(0), in};
}

// Reads the matrices from a list of tensors, one after the other. `types` has the format of each
// weight. A weight in panels has two tensors, other weights have one.
struct Reader {
  ::at::TensorList tensors;
  const std::vector<std::string>& types;
  size_t tensor = 0, type = 0;

  Matrix matrix(int64_t count) {
    Matrix found;
    for (int64_t i = 0; i < count; i++) {
      TORCH_CHECK(type < types.size(), "There are only ", types.size(),
                  " formats. Pass one format per weight.");
      Type t = type_of(types[type++]);
      bool panels = t == Type::INT8 || t == Type::INT4;
      TORCH_CHECK(tensor + panels < tensors.size() && (!panels || count == 1),
                  "A tensor is missing, or a weight in panels is stacked with other weights. Pass "
                  "all tensors, and only one weight if it is in panels.");
      found.parts.push_back(panels ? in_panels(t, tensors[tensor], tensors[tensor + 1])
                                   : in_rows(t, tensors[tensor]));
      tensor += 1 + panels;
      TORCH_CHECK(found.parts[i].in == found.in(), "Weights with ", found.in(), " and ",
                  found.parts[i].in, " inputs cannot be stacked. Pass weights with equal inputs.");
    }
    TORCH_CHECK(count > 0, "A product has no weights. Pass at least one.");
    return found;
  }
};

bool fits(const Tensor& t, ::at::IntArrayRef sizes) {
  return t.sizes() == sizes && t.is_contiguous() && t.scalar_type() == ::at::kFloat;
}

// --- Operators --------------------------------------------------------------------------------

// Multiply x (T, in) float32 by weights that are stacked along their rows → (T, total rows)
// float32.
Tensor linear(const Tensor& x, ::at::TensorList weights, std::vector<std::string> types) {
  Matrix w = Reader{weights, types}.matrix(types.size());
  TORCH_CHECK(x.dim() == 2 && fits(x, {x.size(0), w.in()}), "x has the shape ", x.sizes(),
              ". Pass a contiguous float32 tensor (T, ", w.in(), ").");
  Tensor y = ::at::empty({x.size(0), w.out()}, x.options());
  product(w, x.const_data_ptr<float>(), x.size(0), y.data_ptr<float>());
  return y;
}

// Look up rows of a weight (the embedding): ids (n,) int64 → (n, in) float32.
Tensor rows(const Tensor& weight, std::string type, const Tensor& ids) {
  Weight w = in_rows(type_of(type), weight);
  TORCH_CHECK(ids.dim() == 1 && ids.is_contiguous() && ids.scalar_type() == ::at::kLong,
              "ids has the shape ", ids.sizes(), " and dtype ", ids.scalar_type(),
              ". Pass a contiguous int64 tensor (n,).");
  Tensor y = ::at::empty({ids.size(0), w.in}, ids.options().dtype(::at::kFloat));
  for (int64_t i = 0; i < ids.size(0); i++) {
    int64_t id = ids.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(0 <= id && id < w.out, "There is no row ", id, ". Choose one from 0 to ",
                      w.out - 1, ".");
    with_format(w.type, [&]<class W>() {
      unpack<W>((const uint8_t*)w.data + id * bytes_of<W>(w.in), 0, w.in,
                y.data_ptr<float>() + i * w.in);
    });
  }
  return y;
}

// Causal attention for the last T of S tokens: q (T, n_heads, head_dim), k and v (n_kv_heads, S,
// head_dim) → (T, n_heads, head_dim).
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(q.dim() == 3 && fits(q, q.sizes()) && k.dim() == 3 && k.sizes() == v.sizes() &&
                  k.strides() == v.strides() && k.stride(2) == 1 && k.stride(1) == k.size(2) &&
                  k.stride(0) % k.size(2) == 0 && k.scalar_type() == ::at::kFloat &&
                  v.scalar_type() == ::at::kFloat && q.size(2) == k.size(2) &&
                  q.size(1) % k.size(0) == 0 && q.size(0) <= k.size(1) && k.size(2) % PANEL == 0,
              "q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not match. Pass "
              "float32 tensors q (T, n_heads, head_dim) and k, v (n_kv_heads, S, head_dim).");
  Tensor out = ::at::empty_like(q);
  Cache cache{(float*)k.const_data_ptr(), (float*)v.const_data_ptr(), k.stride(0) / k.size(2)};
  attend({0, q.size(1), k.size(0), q.size(2)}, cache, q.const_data_ptr<float>(),
         q.size(1) * q.size(2), q.size(0), k.size(1) - q.size(0), out.data_ptr<float>());
  return out;
}

// Run the layers of a network on the residual stream x (T, dim), in place.
// norms: two weights per layer, (dim,).
// parts: four numbers per layer: how many weights are stacked in wqkv, wo, w13 and w2.
// cache: two tensors per layer, keys and values, (n_kv_heads, capacity, head_dim).
void layers(Tensor x, ::at::TensorList norms, ::at::TensorList weights,
            std::vector<std::string> types, ::at::IntArrayRef parts, const Tensor& freqs_cis,
            ::at::TensorList cache, int64_t start, int64_t n_heads, double eps) {
  int64_t T = x.size(0), dim = x.size(1), count = norms.size() / 2;
  TORCH_CHECK(count && norms.size() == 2 * count && parts.size() == 4 * count &&
                  cache.size() == 2 * count && cache[0].dim() == 3,
              "The lists have different numbers of layers. Pass two norms, four parts and two "
              "cache tensors per layer.");
  int64_t n_kv_heads = cache[0].size(0), capacity = cache[0].size(1), head_dim = cache[0].size(2),
          q_dim = n_heads * head_dim;
  TORCH_CHECK(fits(x, {T, dim}) && fits(freqs_cis, {T, head_dim}) && n_heads % n_kv_heads == 0 &&
                  start >= 0 && start + T <= capacity && dim % PANEL == 0 && head_dim % PANEL == 0,
              "x ", x.sizes(), ", freqs_cis ", freqs_cis.sizes(), " and the cache ",
              cache[0].sizes(), " do not match. Pass x (T, dim), freqs_cis (T, head_dim) and a "
              "cache with room for T more tokens.");
  Reader reader{weights, types};
  static thread_local Space space;  // reused between calls: allocation takes longer than the work
  for (int64_t i = 0; i < count; i++) {
    const Tensor *norm = &norms[2 * i], *held = &cache[2 * i];
    TORCH_CHECK(fits(held[0], cache[0].sizes()) && fits(held[1], cache[0].sizes()),
                "The caches of layers 0 and ", i, " do not match. Pass caches of the same shape.");
    const int64_t* part = &parts[4 * i];
    Matrix wqkv = reader.matrix(part[0]), wo = reader.matrix(part[1]), w13 = reader.matrix(part[2]),
           w2 = reader.matrix(part[3]);
    TORCH_CHECK(fits(norm[0], {dim}) && fits(norm[1], {dim}) && wqkv.in() == dim &&
                    wqkv.out() == q_dim + 2 * n_kv_heads * head_dim && wo.in() == q_dim &&
                    wo.out() == dim && w13.in() == dim && w13.out() == 2 * w2.in() &&
                    w2.out() == dim && w2.in() % PANEL == 0,
                "The weights of layer ", i, " do not match. Pass weights of the same network.");
    Shape shape{dim, n_heads, n_kv_heads, head_dim, w2.in(), (float)eps};
    layer(shape,
          Layer{norm[0].const_data_ptr<float>(), norm[1].const_data_ptr<float>(), wqkv, wo, w13, w2,
                Cache{held[0].data_ptr<float>(), held[1].data_ptr<float>(), capacity}},
          freqs_cis.const_data_ptr<float>(), T, start, x.data_ptr<float>(), space);
  }
}

// Quantize rows (out, in) float32 → values and scales in panels, and false if a weight is NaN or
// too large. See cpp/search.h.
std::tuple<Tensor, Tensor, bool> quantize(const Tensor& rows, ::at::ArrayRef<double> steps,
                                          int64_t bits) {
  TORCH_CHECK((bits == 8 || bits == 4) && rows.is_cpu() && rows.dim() == 2 &&
                  fits(rows, rows.sizes()) && rows.size(1) % block_of(bits) == 0,
              "Rows of shape ", rows.sizes(), " cannot be quantized to ", bits,
              " bits. Pass float32 rows of whole blocks, and 8 or 4 bits.");
  int64_t out = rows.size(0), in = rows.size(1), panels = (out + PANEL - 1) / PANEL;
  Tensor values = ::at::empty({panels, in * bits / (8 * GROUP), PANEL, GROUP},
                              rows.options().dtype(bits == 8 ? ::at::kChar : ::at::kByte));
  Tensor scales =
      ::at::empty({panels, in / block_of(bits), PANEL}, rows.options().dtype(::at::kHalf));
  bool all_fit =
      search::quantize(rows.const_data_ptr<float>(), out, in, bits,
                       std::vector<float>(steps.begin(), steps.end()).data(), steps.size(),
                       (uint8_t*)values.mutable_data_ptr(), (uint16_t*)scales.mutable_data_ptr());
  return {values, scales, all_fit};
}

}  // namespace

TORCH_LIBRARY(llama_scratch, m) {
  m.def("linear(Tensor x, Tensor[] weights, str[] types) -> Tensor", &linear);
  m.def("attention(Tensor q, Tensor k, Tensor v) -> Tensor", &attention);
  m.def("rows(Tensor weight, str type, Tensor ids) -> Tensor", &rows);
  m.def(
      "layers(Tensor(a!) x, Tensor[] norms, Tensor[] weights, str[] types, int[] parts, Tensor "
      "freqs_cis, Tensor[] cache, int start, "
      "int n_heads, float eps) -> ()",
      &layers);
  m.def(
      "quantize(Tensor rows, float[] steps, int bits) -> (Tensor values, Tensor scales, bool fits)",
      &quantize);
  m.def("machine() -> str", [] { return std::string(MACHINE); });
}
#endif
