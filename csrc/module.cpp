// torchquant._C: what is not a tensor operator. Importing it registers the operators too.
#include <ATen/autocast_mode.h>
#include <torch/extension.h>

#include "bench/call_cost.h"
#include "isa.h"
#include "kernels/layout.h"

namespace {

std::vector<std::string> names(const std::vector<torchquant::Isa>& isas) {
  std::vector<std::string> out;
  for (torchquant::Isa isa : isas) out.emplace_back(torchquant::isa_name(isa));
  return out;
}

// torchquant::linear_dynamic without the detour through torch.ops, which parses every argument against the schema
// (some 2 us). It still goes through the dispatcher: autograd, fake tensors and tracing see the operator. Inside an
// autocast region the output has autocast's type.
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
  m.def("linear_dynamic", &linear_dynamic, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("linear_dynamic_split", &linear_dynamic_split, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("activation", &activation, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("gated_activation", &gated_activation, pybind11::call_guard<pybind11::gil_scoped_release>());
  torchquant::bench::bind(m);
  m.def("rms_norm", &rms_norm, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("layer_norm", &layer_norm, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("cpu_name", &torchquant::cpu_name);
  m.def("tile_bytes", &torchquant::tile_bytes);
  m.attr("LAYOUT_VERSION") = torchquant::kLayoutVersion;
  m.attr("TILE_OUT_FEATURES") = torchquant::kTileN;
}
