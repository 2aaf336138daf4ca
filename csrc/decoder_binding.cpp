// torchquant._C.Decoder(blocks, heads, kv_heads, head_dim, scale, activation): a decoder (core/decoder.h) from Python's
// description.
//
// blocks: dictionaries with the norms "input_norm", "post_norm", "q_norm" and "k_norm" (the last two may be missing),
// each (weight or None, eps), and the layers "q", "k", "v", "o", "gate", "up" and "down". A layer is a dictionary:
//
//   kind                      "int8" (formats/int8_tiles.h) or "intx" (formats/intx_tiles.h)
//   in_features, out_features, packed, bias (None: none)
//   weight_scale, weight_zero_point (None: symmetric)             int8
//   bits, group_size (None: per channel), has_zero_point          intx
//   symmetric, activation_bits    rows with a scale of their own; intx with symmetric = None: rows stay floats
//   input_scale, input_zero_point, input_qmin, input_qmax         one scale for all rows, instead
#include "decoder_binding.h"

#include <memory>
#include <string>
#include <utility>

#include "common/checks.h"
#include "cpu/core_call.h"
#include "cpu/decoder.h"
#include "cpu/intx.h"
#include "formats/packed_weight.h"

namespace torchquant::decoder {
namespace {

namespace py = pybind11;

constexpr const char* kName = "Decoder";

class Reader {  // of one dictionary
 public:
  Reader(py::dict from, std::vector<at::Tensor>& held) : from_(std::move(from)), held_(held) {}

  bool has(const char* name) const { return from_.contains(name) && !from_[name].is_none(); }
  template <class T>
  T get(const char* name) const {
    TORCH_CHECK_VALUE(from_.contains(name), kName, ": a layer or a block must have \"", name, "\", got none");
    return from_[name].cast<T>();
  }

  Norm norm(const char* name, int64_t size) const {
    if (!has(name)) return {};
    const auto [weight, eps] = get<std::pair<std::optional<at::Tensor>, double>>(name);
    TORCH_CHECK_VALUE(eps >= 0.0 && eps <= 0x1.fffffep127, kName, ": eps of ", name,
                      " must be finite and not negative, got ", eps);
    const float* w = weight ? hold_per_output<float>(kName, held_, *weight, at::kFloat, size) : nullptr;
    return {true, w, static_cast<float>(eps)};
  }

  Layer layer(int64_t k) const {
    Layer l{};
    const auto kind = get<std::string>("kind");
    TORCH_CHECK_VALUE(kind == "int8" || kind == "intx", kName, ": kind must be int8 or intx, got ", kind);
    l.kind = kind == "int8" ? Kind::kInt8 : Kind::kIntx;
    const auto n = get<int64_t>("out_features"), inputs = get<int64_t>("in_features");
    TORCH_CHECK_VALUE(inputs == k, kName, ": in_features must be ", k, " as the layer's place wants, got ", inputs);
    const auto packed = get<at::Tensor>("packed");
    if (l.kind == Kind::kInt8) {
      check_features(kName, packed, n, k);
      const at::Tensor& own = hold(kName, held_, packed, at::kChar, 64);
      check_packed(kName, own, n, k);
      l.packed = own.const_data_ptr();
      l.shape.n = n;
      l.shape.k = k;
      l.weight_scale = hold_per_output<float>(kName, held_, get<at::Tensor>("weight_scale"), at::kFloat, n);
      if (has("weight_zero_point")) {
        l.weight_zero_point = hold_per_output<int32_t>(kName, held_, get<at::Tensor>("weight_zero_point"), at::kInt, n);
        check_zero_points(kName, "weight_zero_point", l.weight_zero_point, n, -128, 127);
      }
    } else {
      const IntxShape shape = intx_shape(kName, n, k, get<int64_t>("bits"), get<std::optional<int64_t>>("group_size"),
                                         get<bool>("has_zero_point"));
      const at::Tensor& own = hold(kName, held_, packed, at::kByte, 64);
      intx::check_packed(kName, own, shape);
      l.packed = own.const_data_ptr();
      l.shape = intx::core_shape(shape);
    }
    if (has("bias")) l.bias = hold_per_output<float>(kName, held_, get<at::Tensor>("bias"), at::kFloat, n);
    if (has("input_scale")) {
      l.how = static_rows();
    } else if (has("symmetric")) {
      l.how = dynamic_rows();
    } else {
      TORCH_CHECK_VALUE(l.kind == Kind::kIntx, kName, ": symmetric must be True or False for int8 layers, got None");
      l.kind = Kind::kIntxFloats;
    }
    return l;
  }

  Group group(std::initializer_list<const char*> names, int64_t k, bool side_by_side = false) const {
    std::vector<Layer> layers;
    for (const char* name : names) layers.push_back(Reader(get<py::dict>(name), held_).layer(k));
    return Group(std::move(layers), side_by_side);
  }

 private:
  tq_row_quantization dynamic_rows() const {
    const auto bits = get<int64_t>("activation_bits");
    check_activation_bits(kName, bits);
    tq_row_quantization how{};
    how.mode = get<bool>("symmetric") ? TQ_SYMMETRIC : TQ_ASYMMETRIC;
    how.qmax = (1 << (bits - 1)) - 1;
    how.qmin = -how.qmax - 1;
    return how;
  }

  tq_row_quantization static_rows() const {
    tq_row_quantization how{};
    how.mode = TQ_STATIC;
    how.scale = get<float>("input_scale");
    check_scale(kName, "input_scale", how.scale);
    how.zero_point = get<int32_t>("input_zero_point");
    how.qmin = get<int32_t>("input_qmin");
    how.qmax = get<int32_t>("input_qmax");
    TORCH_CHECK_VALUE(-128 <= how.qmin && how.qmin < how.qmax && how.qmax <= 127 && how.qmin <= how.zero_point &&
                          how.zero_point <= how.qmax,
                      kName, ": input_qmin <= input_zero_point <= input_qmax must lie within -128 .. 127, got ",
                      how.qmin, ", ", how.zero_point, ", ", how.qmax);
    return how;
  }

  py::dict from_;
  std::vector<at::Tensor>& held_;
};

void check_outputs(const Group& group, std::initializer_list<int64_t> wanted, const char* names) {
  size_t i = 0;
  for (const int64_t n : wanted) {
    TORCH_CHECK_VALUE(group.layers[i].shape.n == n, kName, ": out_features of ", names, " must be ",
                      at::IntArrayRef(wanted), ", got ", group.layers[i].shape.n);
    ++i;
  }
}

std::unique_ptr<TensorDecoder> make(const py::list& blocks, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                    double scale, const std::string& activation) {
  TORCH_CHECK_VALUE(heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0 && heads <= (1 << 16), kName,
                    ": kv_heads must divide heads, got ", kv_heads, " and ", heads);
  TORCH_CHECK_VALUE(1 <= head_dim && head_dim <= (1 << 16), kName, ": head_dim must be positive, got ", head_dim);
  TORCH_CHECK_VALUE(std::abs(scale) <= 0x1p126, kName, ": scale must be finite, got ", scale);
  TORCH_CHECK_VALUE(!blocks.empty(), kName, ": blocks must have at least one block, got none");
  Sizes sizes{};
  sizes.heads = heads;
  sizes.kv_heads = kv_heads;
  sizes.head_dim = head_dim;
  sizes.scale_in_powers_of_2 = static_cast<float>(scale * 0x1.71547652b82fep+0);
  sizes.activation = activation_of(kName, activation);
  const auto first = blocks[0].cast<py::dict>();
  std::vector<at::Tensor> held;
  const auto inputs_of = [&](const char* name) {
    return Reader(Reader(first, held).get<py::dict>(name), held).get<int64_t>("in_features");
  };
  sizes.hidden = inputs_of("q");
  sizes.intermediate = inputs_of("down");
  std::vector<Block> own;
  for (const auto& block : blocks) {
    const Reader reader(block.cast<py::dict>(), held);
    Block b;
    b.input_norm = reader.norm("input_norm", sizes.hidden);
    b.post_norm = reader.norm("post_norm", sizes.hidden);
    TORCH_CHECK_VALUE(b.input_norm.present && b.post_norm.present, kName,
                      ": a block must have input_norm and post_norm, got None");
    b.q_norm = reader.norm("q_norm", head_dim);
    b.k_norm = reader.norm("k_norm", head_dim);
    b.qkv = reader.group({"q", "k", "v"}, sizes.hidden);
    check_outputs(b.qkv, {sizes.q_width(), sizes.kv_width(), sizes.kv_width()}, "q, k and v");
    b.o = reader.group({"o"}, sizes.q_width());
    check_outputs(b.o, {sizes.hidden}, "o");
    b.gate_up = reader.group({"gate", "up"}, sizes.hidden, true);
    check_outputs(b.gate_up, {sizes.intermediate, sizes.intermediate}, "gate and up");
    b.down = reader.group({"down"}, sizes.intermediate);
    check_outputs(b.down, {sizes.hidden}, "down");
    own.push_back(std::move(b));
  }
  return std::make_unique<TensorDecoder>(std::move(own), sizes, held);
}

using Tensors = std::vector<at::Tensor>;

at::Tensor run_tensors(TensorDecoder& decoder, const at::Tensor& hidden, const at::Tensor& cos, const at::Tensor& sin,
                       Tensors keys, Tensors values, int64_t position, int64_t bits, std::optional<int64_t> group_size,
                       std::optional<Tensors> recent_keys, std::optional<Tensors> recent_values, int64_t recent) {
  const CacheTensors cache{std::move(keys),        std::move(values),        position, bits, group_size,
                           std::move(recent_keys), std::move(recent_values), recent};
  return decoder.run(hidden, cos, sin, cache);
}

}  // namespace
}  // namespace torchquant::decoder

void torchquant::add_decoder(pybind11::module_& m) {
  namespace py = pybind11;
  namespace d = torchquant::decoder;
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<d::TensorDecoder>(m, "Decoder", "The blocks of a decoder, run by one call.")
      .def(py::init(&d::make), py::arg("blocks"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
           py::arg("scale"), py::arg("activation"))
      .def("run", &d::run_tensors, py::arg("hidden"), py::arg("cos"), py::arg("sin"), py::arg("keys"),
           py::arg("values"), py::arg("position"), py::arg("bits") = 32, py::arg("group_size") = py::none(),
           py::arg("recent_keys") = py::none(), py::arg("recent_values") = py::none(), py::arg("recent") = 0,
           Released(), "The hidden states behind the last block; the cache gets the rows of the new tokens.");
}
