// torchquant._C.Program(values, steps): a program (core/program.h) from Python's description.
//
// values: None for float32, or (scale, zero_point, qmin, qmax). steps: dictionaries with "kind" and what the step has;
// torchquant/chains/program.py writes them.
#include "program_binding.h"

#include <map>
#include <string>
#include <utility>

#include "common/checks.h"
#include "cpu/core_call.h"
#include "cpu/program.h"
#include "formats/int8_conv.h"

namespace torchquant {
namespace {

namespace py = pybind11;
using program::Kind;
using program::Pair;
using program::Step;
using program::Value;

const std::map<std::string, Kind> kKinds = {
    {"input", Kind::kInput},
    {"conv", Kind::kConv},
    {"linear", Kind::kLinear},
    {"add", Kind::kAdd},
    {"mul", Kind::kMul},
    {"map", Kind::kMap},
    {"max_pool", Kind::kMaxPool},
    {"avg_pool", Kind::kAvgPool},
    {"adaptive_avg_pool", Kind::kAdaptiveAvgPool},
    {"affine", Kind::kAffine},
    {"norm", Kind::kNorm},
    {"adaptive_max_pool", Kind::kAdaptiveMaxPool},
    {"channels", Kind::kChannels},
    {"crop", Kind::kCrop},
    {"pad", Kind::kPad},
    {"pixel_shuffle", Kind::kPixelShuffle},
    {"concat", Kind::kConcat},
    {"upsample", Kind::kUpsample},
    {"flatten", Kind::kFlatten},
    {"output", Kind::kOutput},
};

using Held = std::vector<at::Tensor>;
constexpr const char* kName = "Program";

class Reader {  // of one step
 public:
  Reader(py::dict step, Held& held) : step_(std::move(step)), held_(held) {}

  Step read() {
    const auto kind = kKinds.find(get<std::string>("kind"));
    TORCH_CHECK_VALUE(kind != kKinds.end(), "Program: kind must be that of a step, got ", get<std::string>("kind"));
    Step s{};
    s.kind = kind->second;
    set("inputs", s.inputs);
    set("residual", s.residual);
    set("output", s.output);
    set("place", s.place);
    TORCH_CHECK_VALUE(s.place >= 0, "Program: place must not be negative, got ", s.place);
    if (has("activation")) s.activation = activation_of("Program", get<std::string>("activation"));
    for (auto [name, pair] : {std::pair<const char*, Pair*>{"kernel", &s.kernel},
                              {"stride", &s.stride},
                              {"before", &s.before},
                              {"after", &s.after},
                              {"dilation", &s.dilation},
                              {"size", &s.size},
                              {"factor", &s.factor}}) {
      set(name, *pair);
      const bool may_be_zero = pair == &s.before || pair == &s.after || pair == &s.size;
      for (const int64_t n : *pair)
        TORCH_CHECK_VALUE(n >= (may_be_zero ? 0 : 1) && n < (int64_t{1} << 31), "Program: ", name,
                          " is out of range, got ", n);
    }
    set("ceil_mode", s.ceil_mode);
    set("count_include_pad", s.count_include_pad);
    set("divisor", s.divisor);
    set("index", s.index);
    set("last", s.last);
    set("inverse", s.inverse);
    set("eps", s.eps);
    set("begin", s.begin);
    set("end", s.end);
    if (s.kind == Kind::kAffine || s.kind == Kind::kNorm) read_channels(s.channel);
    for (const auto& table : get_or<std::vector<at::Tensor>>("tables")) {
      const bool is_float = s.kind == Kind::kMap && table.scalar_type() == at::kFloat;
      TORCH_CHECK_VALUE((table.numel() == 0 && !is_float) || table.numel() == 256,
                        "Program: a table must have 256 elements, got ", describe(table));
      TORCH_CHECK_TYPE(table.is_cpu() && table.is_contiguous() && (is_float || table.scalar_type() == at::kChar),
                       "Program: a table must be int8, contiguous and on the CPU, got ", describe(table));
      if (is_float) {
        s.float_table.assign(table.const_data_ptr<float>(), table.const_data_ptr<float>() + 256);
        continue;
      }
      const int8_t* const first = table.const_data_ptr<int8_t>();
      s.tables.emplace_back(first, first + table.numel());
    }
    if (s.kind == Kind::kConv || s.kind == Kind::kLinear) read_weight(s);
    return s;
  }

 private:
  bool has(const char* name) const { return step_.contains(name) && !step_[name].is_none(); }
  template <class T>
  T get(const char* name) const {
    return step_[name].cast<T>();
  }
  template <class T>
  T get_or(const char* name) const {
    return has(name) ? get<T>(name) : T{};
  }
  template <class T>
  void set(const char* name, T& value) const {
    if (has(name)) value = get<T>(name);
  }

  void read_channels(program::PerChannel& c) {
    set("channels", c.count);
    if (has("gain")) c.gain = hold_per_output<float>(kName, held_, get<at::Tensor>("gain"), at::kFloat, c.count);
    if (has("shift")) c.shift = hold_per_output<float>(kName, held_, get<at::Tensor>("shift"), at::kFloat, c.count);
  }

  void read_weight(Step& s) {
    program::Weight& w = s.weight;
    set("in_channels", w.inputs);
    set("out_channels", w.outputs);
    set("groups", w.groups);
    TORCH_CHECK_VALUE(0 < w.inputs && w.inputs < (int64_t{1} << 31) && 0 < w.outputs && w.outputs < (int64_t{1} << 31),
                      "Program: in_channels and out_channels must be positive, got ", w.inputs, " and ", w.outputs);
    TORCH_CHECK_VALUE(w.groups > 0 && w.inputs % w.groups == 0 && w.outputs % w.groups == 0,
                      "Program: groups must divide in_channels and out_channels, got ", w.groups, ", ", w.inputs,
                      " and ", w.outputs);
    const bool is_conv = s.kind == Kind::kConv;
    TORCH_CHECK_VALUE(is_conv || (w.groups == 1 && s.kernel == Pair{1, 1}),
                      "Program: a linear layer must have one group and no kernel");
    const ConvShape shape{w.outputs, w.inputs / w.groups, s.kernel[0], s.kernel[1], w.groups};
    TORCH_CHECK_VALUE(shape.kernel_h < (1 << 15) && shape.kernel_w < (1 << 15) &&
                          shape.channels * shape.kernel_h < (int64_t{1} << 31) / shape.kernel_w,
                      "Program: kernel is out of range, got [", s.kernel[0], ", ", s.kernel[1], "]");
    const PackedShape size = packed_shape(shape);
    const at::Tensor& packed = hold(kName, held_, get<at::Tensor>("packed"), at::kChar, 64);
    w.packed = packed.const_data_ptr<int8_t>();
    TORCH_CHECK_VALUE(packed.numel() == size.rows * size.columns && is_packed_conv(w.packed, shape),
                      "Program: packed must be the weight of ", w.outputs, " outputs and ", shape.channels,
                      " inputs with kernel [", s.kernel[0], ", ", s.kernel[1], "], packed to [", size.rows, ", ",
                      size.columns, "], got ", describe(packed));
    w.scale = hold_per_output<float>(kName, held_, get<at::Tensor>("weight_scale"), at::kFloat, w.outputs);
    if (has("weight_zero_point"))
      w.zero_point = hold_per_output<int32_t>(kName, held_, get<at::Tensor>("weight_zero_point"), at::kInt, w.outputs);
    if (has("bias")) w.bias = hold_per_output<float>(kName, held_, get<at::Tensor>("bias"), at::kFloat, w.outputs);
  }

  py::dict step_;
  Held& held_;
};

// What the steps read without a look at it: the number and the types of their inputs, their tables. The values exist.
void check_step(size_t index, const Step& s, const std::vector<Value>& values) {
  const auto require = [&](bool condition, const char* what) {
    TORCH_CHECK_VALUE(condition, "Program: step ", index, " ", what);
  };
  const auto is_int8 = [&](int32_t v) { return values[static_cast<size_t>(v)].type == TQ_I8; };
  const bool two = s.kind == Kind::kAdd || s.kind == Kind::kMul;
  const size_t wanted = s.kind == Kind::kInput ? 0 : two ? 2 : 1;
  require(s.kind == Kind::kConcat ? !s.inputs.empty() : s.inputs.size() == wanted, "has another number of inputs");
  const bool adds = s.kind == Kind::kConv || s.kind == Kind::kLinear || s.kind == Kind::kAffine;
  require(s.residual < 0 || adds, "must not have a residual");
  switch (s.kind) {
    case Kind::kConv:
    case Kind::kLinear: require(is_int8(s.inputs[0]), "must read int8 values"); break;
    case Kind::kNorm: require(!is_int8(s.inputs[0]) && !is_int8(s.output), "must read and write floats"); break;
    case Kind::kMap:
      if (!is_int8(s.inputs[0])) break;
      if (is_int8(s.output)) require(s.tables.size() == 1 && s.tables[0].size() == 256, "must have a table of int8");
      else require(s.float_table.size() == 256, "must have a table of floats");
      break;
    case Kind::kMaxPool:
    case Kind::kAdaptiveMaxPool:
      require(is_int8(s.inputs[0]) && is_int8(s.output), "must read and write int8 values");
      break;
    case Kind::kConcat:
      if (is_int8(s.output)) require(s.tables.size() == s.inputs.size(), "must have a table for each input");
      break;
    case Kind::kChannels:
    case Kind::kCrop:
    case Kind::kPad:
    case Kind::kPixelShuffle:
    case Kind::kUpsample:
    case Kind::kFlatten: require(is_int8(s.inputs[0]) == is_int8(s.output), "must write what it reads"); break;
    case Kind::kAdd:
    case Kind::kMul:
    case Kind::kAffine:
    case Kind::kAvgPool:
    case Kind::kAdaptiveAvgPool:
    case Kind::kInput:
    case Kind::kOutput: break;
  }
}

std::unique_ptr<TensorProgram> make(const py::list& values, const py::list& steps) {
  std::vector<Value> own_values;
  for (const auto& value : values) {
    Value v{TQ_F32, {1.0f, 0, -128, 127}};
    if (!value.is_none()) {
      const auto [scale, zero, qmin, qmax] = value.cast<std::tuple<float, int32_t, int32_t, int32_t>>();
      v = {TQ_I8, {scale, zero, qmin, qmax}};
      TORCH_CHECK_VALUE(-128 <= qmin && qmin <= zero && zero <= qmax && qmax <= 127,
                        "Program: qmin <= zero_point <= qmax must lie within -128 .. 127, got ", qmin, ", ", zero, ", ",
                        qmax);
      TORCH_CHECK_VALUE(scale >= 0x1p-126f && scale <= 0x1.fffffep127f, "Program: scale must be a normal number, got ",
                        scale);
    }
    own_values.push_back(v);
  }
  Held held;
  std::vector<Step> own_steps;
  for (const auto& step : steps) own_steps.push_back(Reader(step.cast<py::dict>(), held).read());
  program::Program program(std::move(own_values), std::move(own_steps));
  for (size_t i = 0; i < program.steps().size(); ++i) check_step(i, program.steps()[i], program.values());
  return std::make_unique<TensorProgram>(std::move(program), held);
}

}  // namespace

void add_program(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<TensorProgram>(m, "Program", "The steps of a chain, run by one call.")
      .def(py::init(&make), py::arg("values"), py::arg("steps"))
      .def("run", &TensorProgram::run, py::arg("inputs"), Released(),
           "The results; None where an input holds NaN or infinities.")
      .def("arena_bytes", &TensorProgram::arena_bytes, py::arg("inputs"))
      .def_property(
          "uses_team", [](const TensorProgram& p) { return p.uses_team.load(); },
          [](TensorProgram& p, bool value) { p.uses_team = value; })
      .def_property(
          "images_together", [](const TensorProgram& p) { return p.images_together.load(); },
          [](TensorProgram& p, int64_t value) { p.images_together = value; });
}

}  // namespace torchquant
