// torchquant._C: what is not a tensor operator. Importing it registers the operators too.
#include <ATen/autocast_mode.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "bench/call_cost.h"
#include "bench/peak.h"
#include "fast_call.h"
#include "isa.h"
#include "formats/int8_tiles.h"

namespace {

std::vector<std::string> names(const std::vector<torchquant::Isa>& isas) {
  std::vector<std::string> out;
  for (torchquant::Isa isa : isas) out.emplace_back(torchquant::isa_name(isa));
  return out;
}

// torchquant::linear_dynamic without the detour through torch.ops, which parses every argument against the schema
// (some 2 us, 5 for the many of linear_static). It still goes through the dispatcher: autograd, fake tensors and
// tracing see the operator. Inside an autocast region the output has autocast's type.
at::Tensor linear_dynamic(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& weight_scale,
                          const std::optional<at::Tensor>& weight_zero_point, const std::optional<at::Tensor>& bias,
                          int64_t out_features, bool symmetric, std::string_view activation, int64_t activation_bits) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("torchquant::linear_dynamic", "")
                       .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, int64_t,
                                         bool, std::string_view, std::optional<at::ScalarType>, int64_t)>();
  std::optional<at::ScalarType> output_dtype;
  const at::DeviceType device = input.device().type();
  if (at::autocast::is_autocast_enabled(device)) output_dtype = at::autocast::get_autocast_dtype(device);
  return op.call(input, packed, weight_scale, weight_zero_point, bias, out_features, symmetric, activation,
                 output_dtype, activation_bits);
}

// The same for torchquant::linear_dynamic_split.
std::vector<at::Tensor> linear_dynamic_split(const at::Tensor& input, const at::Tensor& packed,
                                             const at::Tensor& weight_scale,
                                             const std::optional<at::Tensor>& weight_zero_point,
                                             const std::optional<at::Tensor>& bias,
                                             const std::vector<int64_t>& out_features, bool symmetric,
                                             const std::vector<std::string>& activations) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("torchquant::linear_dynamic_split", "")
                       .typed<std::vector<at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                      const std::optional<at::Tensor>&,
                                                      const std::optional<at::Tensor>&, at::IntArrayRef, bool,
                                                      const c10::List<std::string>&, std::optional<at::ScalarType>)>();
  std::optional<at::ScalarType> output_dtype;
  const at::DeviceType device = input.device().type();
  if (at::autocast::is_autocast_enabled(device)) output_dtype = at::autocast::get_autocast_dtype(device);
  return op.call(input, packed, weight_scale, weight_zero_point, bias, out_features, symmetric,
                 c10::List<std::string>(activations), output_dtype);
}

// Without a look at autocast: the output's type is one of the arguments.
at::Tensor linear_static(const at::Tensor& input, const at::Tensor& input_scale,
                         const std::optional<at::Tensor>& input_zero_point, const at::Tensor& packed,
                         const at::Tensor& weight_scale, const std::optional<at::Tensor>& weight_zero_point,
                         const std::optional<at::Tensor>& bias, int64_t out_features, std::string_view activation,
                         at::ScalarType output_dtype, const std::optional<at::Tensor>& output_scale,
                         int64_t output_zero_point, int64_t output_qmin, int64_t output_qmax, int64_t input_qmin,
                         int64_t input_qmax) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torchquant::linear_static", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
                            const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                            int64_t, std::string_view, at::ScalarType, const std::optional<at::Tensor>&, int64_t,
                            int64_t, int64_t, int64_t, int64_t)>();
  return op.call(input, input_scale, input_zero_point, packed, weight_scale, weight_zero_point, bias, out_features,
                 activation, output_dtype, output_scale, output_zero_point, output_qmin, output_qmax, input_qmin,
                 input_qmax);
}

at::Tensor activation(const at::Tensor& input, std::string_view activation) {  // the same for torchquant::activation
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("torchquant::activation", "")
                       .typed<at::Tensor(const at::Tensor&, std::string_view, std::optional<at::ScalarType>)>();
  return op.call(input, activation, std::nullopt);
}

at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up, std::string_view activation) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("torchquant::gated_activation", "")
                       .typed<at::Tensor(const at::Tensor&, const at::Tensor&, std::string_view)>();
  return op.call(gate, up, activation);
}

at::Tensor rms_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight, double eps,
                    bool cast_before_weight) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("torchquant::rms_norm", "")
                       .typed<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, double, bool)>();
  return op.call(input, weight, eps, cast_before_weight);
}

at::Tensor layer_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double eps, const std::optional<at::Tensor>& residual) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("torchquant::layer_norm", "")
                       .typed<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&,
                                         const std::optional<at::Tensor>&, double, const std::optional<at::Tensor>&)>();
  return op.call(input, weight, bias, eps, residual);
}

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, std::optional<double> scale, bool causal) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("torchquant::attention", "")
                       .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const std::optional<at::Tensor>&, std::optional<double>, bool)>();
  return op.call(query, key, value, mask, scale, causal);
}

constexpr char kLinearDynamic[] = "linear_dynamic", kLinearDynamicSplit[] = "linear_dynamic_split",
               kLinearStatic[] = "linear_static", kActivation[] = "activation", kGatedActivation[] = "gated_activation",
               kRmsNorm[] = "rms_norm", kLayerNorm[] = "layer_norm", kAttention[] = "attention";

PyMethodDef fast_calls[] = {
    torchquant::FastCall<kLinearDynamic, &linear_dynamic>::method(),
    torchquant::FastCall<kLinearDynamicSplit, &linear_dynamic_split>::method(),
    torchquant::FastCall<kLinearStatic, &linear_static>::method(),
    torchquant::FastCall<kActivation, &activation>::method(),
    torchquant::FastCall<kGatedActivation, &gated_activation>::method(),
    torchquant::FastCall<kRmsNorm, &rms_norm>::method(),
    torchquant::FastCall<kLayerNorm, &layer_norm>::method(),
    torchquant::FastCall<kAttention, &attention>::method(),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "torchquant's C++ library: instruction sets and build facts; operators live in torch.ops.torchquant";
  m.def("built_isas", [] { return names(torchquant::built_isas()); });
  m.def("usable_isas", [] { return names(torchquant::usable_isas()); });
  m.def("active_isa", [] { return std::string(torchquant::isa_name(torchquant::active_isa())); });
  m.def("set_active_isa", [](const std::string& name) {
    const auto isa = torchquant::isa_from_name(name);
    if (!isa) throw std::invalid_argument("unknown instruction set: " + name);
    torchquant::set_active_isa(*isa);
  });
  if (PyModule_AddFunctions(m.ptr(), fast_calls) != 0) throw pybind11::error_already_set();
  m.def("cpu_name", &torchquant::cpu_name);
  using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("peak_names", &torchquant::bench::peak_names);
  m.def("measure_peak", &torchquant::bench::measure_peak, Released());
  m.def("measure_bandwidth", &torchquant::bench::measure_bandwidth, Released());
  m.def("naive_product_seconds", &torchquant::bench::naive_product_seconds, Released());
  m.def("part_seconds", &torchquant::bench::part_seconds, Released());
  m.def("tile_bytes", &torchquant::tile_bytes);
  m.attr("LAYOUT_VERSION") = torchquant::kLayoutVersion;
  m.attr("TILE_OUT_FEATURES") = torchquant::kTileN;
}
