// torchquant._C: what is not a tensor operator. Importing it registers the operators too.
#include <torch/csrc/utils/pybind.h>

#include "bench/call_cost.h"
#include "bench/peak.h"
#include "boxed/complete.h"
#include "caller.h"
#include "decoder_binding.h"
#include "fast_call.h"
#include "guard.h"
#include "isa.h"
#include "formats/int8_tiles.h"
#include "operators.h"
#include "program_binding.h"

namespace {

std::vector<std::string> names(const std::vector<torchquant::Isa>& isas) {
  std::vector<std::string> out;
  for (torchquant::Isa isa : isas) out.emplace_back(torchquant::isa_name(isa));
  return out;
}

namespace ops = torchquant::ops;
using torchquant::autocast_type;
using torchquant::FastCall;

PyMethodDef fast_calls[] = {
    FastCall<ops::linear_dynamic, &autocast_type>::method(),
    FastCall<ops::linear_dynamic_split, &autocast_type>::method(),
    FastCall<ops::linear_dynamic_intx, &autocast_type>::method(),
    FastCall<ops::linear_static_intx>::method(),
    FastCall<ops::embedding_intx>::method(),
    FastCall<ops::linear_intx, &autocast_type>::method(),
    FastCall<ops::linear_static>::method(),
    FastCall<ops::conv_dynamic, &autocast_type>::method(),
    FastCall<ops::conv_static>::method(),
    FastCall<ops::activation>::method(),
    FastCall<ops::gated_activation>::method(),
    FastCall<ops::rms_norm>::method(),
    FastCall<ops::layer_norm>::method(),
    FastCall<ops::attention>::method(),
    FastCall<ops::quantize_kv>::method(),
    FastCall<ops::attention_cached>::method(),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  torchquant::complete_autograd();
  torchquant::complete_vmap();
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
  if (PyModule_AddFunctions(m.ptr(), torchquant::caller_methods) != 0) throw pybind11::error_already_set();
  if (torchquant::add_guard(m.ptr()) != 0) throw pybind11::error_already_set();
  torchquant::add_program(m);
  torchquant::add_decoder(m);
  m.def("cpu_name", &torchquant::cpu_name);
  using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("peak_names", &torchquant::bench::peak_names);
  m.def("measure_peak", &torchquant::bench::measure_peak, Released());
  m.def("measure_bandwidth", &torchquant::bench::measure_bandwidth, Released());
  m.def("naive_product_seconds", &torchquant::bench::naive_product_seconds, Released());
  m.def("part_seconds", &torchquant::bench::part_seconds, Released());
  m.attr("TILE_OUT_FEATURES") = torchquant::kTileN;
}
