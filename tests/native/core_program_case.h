// Programs (csrc/core/program.h): random steps on random shapes, planned and run in an arena, results and arguments that
// end at a hole, against the same steps by the reference, one after the other on whole images.
#pragma once

#include <atomic>

#include "core/program.h"
#include "core_conv_case.h"

namespace native {

namespace program = torchquant::program;

// A program that grows step by step, and the value of each step by the reference.
class ProgramCase {
 public:
  explicit ProgramCase(Trial& trial) : trial_(trial), draw_(trial.draw), random_(trial.draw.seed()) {}

  void grow() {
    first_size_ = {1 + draw_.below(3), 1 + draw_.below(8), 1 + draw_.below(8), draw_size(draw_, 80)};
    rank_ = draw_.one_in(5) ? 3 : 4;
    if (rank_ == 3) first_size_.h = 1;
    request_.channels_last = draw_.one_in(2);
    for (int64_t i = 0, count = 1 + draw_.below(2); i < count; ++i) add_input();
    for (int64_t i = 0, count = 2 + draw_.below(9); i < count; ++i) add_step();
    add_output(static_cast<int32_t>(pictures_.size()) - 1);
    for (int64_t i = draw_.below(3); i > 0; --i) add_output(any_value());
  }

  void check() {
    const program::Program program(values_, steps_);
    const program::Plan plan = program.plan(request_);
    on_every_path(trial_, draw_.seed(), [&](const tq_parallel* parallel, const std::string& name) {
      if (trial_.real_threads) {  // another thread runs the same program at the same time
        const RunMemory own = memory_of(plan), other = memory_of(plan);
        tq_status status = TQ_OUT_OF_MEMORY;
        std::thread thread([&] { status = run(program, plan, other, nullptr); });
        const tq_status here = run(program, plan, own, parallel);
        thread.join();
        CHECK(here == TQ_OK && status == TQ_OK, "%s: %s", name.c_str(), text_.c_str());
        check_results(own, name);
        check_results(other, name + ", the other thread");
        return;
      }
      const RunMemory own = memory_of(plan);
      CHECK(run(program, plan, own, parallel) == TQ_OK, "%s: %s", name.c_str(), text_.c_str());
      check_results(own, name);
    });
  }

 private:
  using Kind = program::Kind;

  struct RunMemory {
    uint8_t* arena;
    std::vector<tq_image_float> results;
  };

  tq_status run(const program::Program& program, const program::Plan& plan, const RunMemory& memory,
                const tq_parallel* parallel) const {
    std::atomic<bool> has_nonfinite{false};
    const tq_status status =
        program.run(plan, arguments_.data(), memory.results.data(), memory.arena, has_nonfinite, parallel);
    CHECK(!has_nonfinite, "finite arguments: %s", text_.c_str());
    return status;
  }

  // ---------------------------------------------------------------- values

  const program::Value& value(int32_t v) const { return values_[static_cast<size_t>(v)]; }
  const Picture& of(int32_t v) const { return pictures_[static_cast<size_t>(v)]; }
  int32_t rank(int32_t v) const { return ranks_[static_cast<size_t>(v)]; }
  bool is_int8(int32_t v) const { return value(v).type == TQ_I8; }
  bool same_shape(int32_t a, int32_t b) const { return of(a).same_size(of(b)) && rank(a) == rank(b); }
  int32_t any_value() { return static_cast<int32_t>(draw_.below(static_cast<int64_t>(pictures_.size()))); }

  // One of the values that fit, rather a late one; -1: none.
  template <class Fits>
  int32_t value_that(const Fits& fits) {
    std::vector<int32_t> all;
    for (int32_t v = 0; v < static_cast<int32_t>(pictures_.size()); ++v)
      if (fits(v)) all.push_back(v);
    if (all.empty()) return -1;
    return draw_.one_in(2) ? all[static_cast<size_t>(draw_.below(static_cast<int64_t>(all.size())))] : all.back();
  }
  int32_t int8_image() {
    return value_that([&](int32_t v) { return is_int8(v) && rank(v) >= 3; });
  }

  program::Value draw_value(bool may_be_float) {
    if (may_be_float && draw_.one_in(4)) return {TQ_F32, {}};
    return {TQ_I8, draw_qparams(draw_)};
  }
  // y: real values, or (as they are) what is stored.
  void add(program::Step step, const program::Value& value, const Picture& stored, int32_t rank) {
    step.output = static_cast<int32_t>(values_.size());
    text_ += " " + std::to_string(static_cast<int>(step.kind)) + (value.type == TQ_F32 ? "f" : "");
    steps_.push_back(std::move(step));
    values_.push_back(value);
    pictures_.push_back(stored);
    ranks_.push_back(rank);
  }
  void add_rounded(program::Step step, const program::Value& value, const Picture& y, int32_t rank) {
    const Picture stored = finished(y, value.type, value.qparams);
    add(std::move(step), value, stored, rank);
  }
  Picture real(int32_t v) const { return is_int8(v) ? real_values(of(v), value(v).qparams) : of(v); }

  static program::Step step_of(Kind kind, std::vector<int32_t> inputs) {
    program::Step s{};
    s.kind = kind;
    s.inputs = std::move(inputs);
    return s;
  }

  // ---------------------------------------------------------------- the steps

  void add_input() {
    const int32_t rank = rank_;
    Size s = first_size_;
    if (!request_.arguments.empty() && draw_.one_in(2)) s.c = draw_size(draw_, 80);
    tq_image_float x{nullptr, TQ_F32, s.n, s.h, s.w, s.c, s.c * s.h * s.w, s.c * s.w, s.c, 1};  // channels_last
    if (draw_.one_in(2)) x = {nullptr, TQ_F32, s.n, s.h, s.w, s.c, s.c * s.h * s.w, s.w, 1, s.h * s.w};
    x.data = random_elements(trial_.inputs, random_, s.n * s.h * s.w * s.c, TQ_F32, 0);
    const Picture p = picture(s.n, s.h, s.w, s.c, [&](int64_t n, int64_t y, int64_t w, int64_t c) {
      return static_cast<float*>(
          x.data)[n * x.image_stride + y * x.row_stride + w * x.pixel_stride + c * x.channel_stride];
    });
    program::Step step = step_of(Kind::kInput, {});
    step.place = static_cast<int32_t>(request_.arguments.size());
    request_.arguments.push_back({s.n, s.h, s.w, s.c, rank});
    arguments_.push_back(x);
    add_rounded(step, draw_value(true), p, rank);
  }

  void add_step() {
    switch (draw_.below(12)) {
      case 0: return add_linear();
      case 1: return add_two(Kind::kAdd);
      case 2: return add_two(Kind::kMul);
      case 3: return add_map();
      case 4: return add_pool(Kind::kMaxPool);
      case 5: return add_pool(Kind::kAvgPool);
      case 6: return add_adaptive_pool();
      case 7: return add_concat();
      case 8: return add_upsample();
      case 9: return add_flatten();
      default: return add_conv();
    }
  }

  void set_weight(program::Step& s, const Layer& l) {
    s.weight.packed = l.packed;
    s.weight.scale = l.scale;
    s.weight.bias = l.bias;
    s.weight.inputs = l.inputs;
    s.weight.outputs = l.outputs;
    s.weight.groups = l.groups;
  }

  void add_conv() {
    const int32_t v = int8_image();
    if (v < 0) return;
    const Picture& in = of(v);
    Layer l{};
    l.inputs = in.c;
    l.groups = in.c > 1 && draw_.one_in(3) ? in.c : (in.c % 2 == 0 && draw_.one_in(4) ? 2 : 1);
    l.outputs = l.groups * (l.groups == in.c && in.c > 1 ? 1 : 1 + draw_.below(40));
    if (l.groups == 1 && draw_.one_in(3)) l.outputs = in.c;
    l.kernel_h = rank(v) == 3 ? 1 : 1 + draw_.below(3);
    l.kernel_w = rank(v) == 3 ? 1 + draw_.below(3) : l.kernel_h;
    program::Step s = step_of(Kind::kConv, {v});
    s.kernel = {l.kernel_h, l.kernel_w};
    const int64_t stride = draw_.pick<int64_t>({1, 1, 1, 2});
    s.stride = {rank(v) == 3 ? 1 : stride, stride};
    const auto pad = [&](int64_t size, int64_t kernel, int64_t* before, int64_t* after) {  // the same size mostly
      *before = kernel / 2;
      *after = std::max<int64_t>(0, draw_.one_in(4) ? kernel - size - *before : kernel - 1 - *before);
    };
    pad(in.h, l.kernel_h, &s.before[0], &s.after[0]);
    pad(in.w, l.kernel_w, &s.before[1], &s.after[1]);
    const auto windows = [&](int64_t size, size_t i) {
      return (size + s.before[i] + s.after[i] - s.kernel[i]) / s.stride[i] + 1;
    };
    l = draw_layer(trial_, random_, l);
    set_weight(s, l);
    s.activation = draw_activation(draw_);
    const tq_qparams q = value(v).qparams;
    Picture y = convolved(in, l, {s.stride[0], s.stride[1], s.before[0], s.before[1], 1, 1}, windows(in.h, 0),
                          windows(in.w, 1), [&](int64_t) { return InputScale{q.scale, q.zero_point}; });
    s.residual = value_that([&](int32_t r) { return of(r).same_size(y) && rank(r) == rank(v); });
    if (s.residual >= 0 && draw_.one_in(3)) s.residual = -1;
    if (s.residual >= 0) y = combined(false, y, real(s.residual));
    const tq_activation activation = s.activation;
    add_rounded(std::move(s), draw_value(true), activated(y, activation), rank(v));
  }

  void add_linear() {
    const int32_t v = value_that([&](int32_t i) { return is_int8(i) && rank(i) == 2; });
    if (v < 0) return add_flatten();
    Layer l{};
    l.inputs = of(v).c;
    l.outputs = draw_size(draw_, 60);
    l.groups = l.kernel_h = l.kernel_w = 1;
    l = draw_layer(trial_, random_, l);
    program::Step s = step_of(Kind::kLinear, {v});
    set_weight(s, l);
    s.activation = draw_activation(draw_);
    const tq_qparams q = value(v).qparams;
    const Picture y =
        convolved(of(v), l, {1, 1, 0, 0, 1, 1}, 1, 1, [&](int64_t) { return InputScale{q.scale, q.zero_point}; });
    const tq_activation activation = s.activation;
    add_rounded(std::move(s), draw_value(true), activated(y, activation), 2);
  }

  void add_two(Kind kind) {
    const int32_t a = value_that([&](int32_t v) { return is_int8(v); });
    if (a < 0) return;
    const bool one_pixel = kind == Kind::kMul && draw_.one_in(2);
    const int32_t b = value_that([&](int32_t v) {
      const Picture &left = of(a), &right = of(v);
      return is_int8(v) && (same_shape(a, v) || (one_pixel && rank(a) == rank(v) && right.h * right.w == 1 &&
                                                 right.n == left.n && right.c == left.c));
    });
    program::Step s = step_of(kind, {a, b});
    s.activation = draw_activation(draw_);
    const tq_activation activation = s.activation;
    add_rounded(std::move(s), draw_value(true), activated(combined(kind == Kind::kMul, real(a), real(b)), activation),
                rank(a));
  }

  std::vector<int8_t> table_of(int32_t from, tq_activation activation, const tq_qparams& to) {
    std::vector<float> y(256);
    for (int64_t i = 0; i < 256; ++i)
      y[static_cast<size_t>(i)] = real_value(static_cast<float>(i - 128), value(from).qparams);
    activate(y, activation);
    std::vector<int8_t> table;
    for (const float v : y) table.push_back(static_cast<int8_t>(quantized(v, to)));
    return table;
  }

  void add_map() {
    const int32_t v = any_value();
    program::Step s = step_of(Kind::kMap, {v});
    const program::Value out = draw_value(true);
    if (is_int8(v) || out.type == TQ_F32) s.activation = draw_activation(draw_);
    const Picture y = activated(real(v), s.activation);
    if (is_int8(v) && out.type == TQ_I8) s.tables.push_back(table_of(v, s.activation, out.qparams));
    if (is_int8(v) && out.type == TQ_F32) {
      for (int64_t i = 0; i < 256; ++i)
        s.float_table.push_back(real_value(static_cast<float>(i - 128), value(v).qparams));
      activate(s.float_table, s.activation);
    }
    add_rounded(std::move(s), out, y, rank(v));
  }

  void add_pool(Kind kind) {
    const int32_t v = int8_image();
    if (v < 0) return;
    const Picture& in = of(v);
    program::Step s = step_of(kind, {v});
    int64_t out_h = 0, out_w = 0;
    tq_window w{};
    while (out_h < 1 || out_w < 1) {
      w = {1 + draw_.below(3), 1 + draw_.below(3), 1 + draw_.below(2), 1 + draw_.below(2), 0, 0, 1, 1};
      if (rank(v) == 3) w.kernel_h = w.stride_h = 1;
      w.pad_h = draw_.below(w.kernel_h / 2 + 1);
      w.pad_w = draw_.below(w.kernel_w / 2 + 1);
      s.ceil_mode = draw_.one_in(2);
      out_h = windows_of(in.h, w.kernel_h, w.stride_h, w.pad_h, 1, s.ceil_mode);
      out_w = windows_of(in.w, w.kernel_w, w.stride_w, w.pad_w, 1, s.ceil_mode);
    }
    s.kernel = {w.kernel_h, w.kernel_w};
    s.stride = {w.stride_h, w.stride_w};
    s.before = s.after = {w.pad_h, w.pad_w};
    s.count_include_pad = draw_.one_in(2);
    s.divisor = draw_.pick<int64_t>({0, 0, 5});
    if (kind == Kind::kMaxPool) return add(std::move(s), value(v), max_pooled(in, w, out_h, out_w), rank(v));
    const Picture y = average_pooled(in, value(v).qparams, w, s.count_include_pad, s.divisor, out_h, out_w);
    add_rounded(std::move(s), draw_value(true), y, rank(v));
  }

  void add_adaptive_pool() {
    const int32_t v = int8_image();
    if (v < 0) return;
    program::Step s = step_of(Kind::kAdaptiveAvgPool, {v});
    s.size = {rank(v) == 3 ? 1 : draw_.below(4), draw_.below(4)};
    const Picture y =
        adaptive_pooled(of(v), value(v).qparams, s.size[0] ? s.size[0] : of(v).h, s.size[1] ? s.size[1] : of(v).w);
    add_rounded(std::move(s), draw_value(true), y, rank(v));
  }

  void add_concat() {
    const int32_t first = any_value();
    program::Value out = draw_value(false);
    if (is_int8(first) && draw_.one_in(2)) out = value(first);  // which lies in its place then
    program::Step s = step_of(Kind::kConcat, {first});
    for (int64_t i = 1 + draw_.below(2); i > 0; --i)
      s.inputs.push_back(value_that([&](int32_t v) {
        return rank(v) == rank(first) && of(v).n == of(first).n && of(v).h == of(first).h && of(v).w == of(first).w;
      }));
    int64_t channels = 0;
    for (const int32_t v : s.inputs) channels += of(v).c;
    Picture whole(of(first).n, of(first).h, of(first).w, channels);
    int64_t at = 0;
    for (const int32_t v : s.inputs) {
      const bool copied = is_int8(v) && !std::memcmp(&value(v).qparams, &out.qparams, sizeof(tq_qparams));
      s.tables.emplace_back();
      if (is_int8(v) && !copied) s.tables.back() = table_of(v, TQ_NONE, out.qparams);
      const Picture part = copied ? of(v) : finished(real(v), TQ_I8, out.qparams);
      for (int64_t n = 0; n < part.n; ++n)
        for (int64_t y = 0; y < part.h; ++y)
          for (int64_t x = 0; x < part.w; ++x)
            for (int64_t c = 0; c < part.c; ++c) whole.at(n, y, x, at + c) = part.at(n, y, x, c);
      at += part.c;
    }
    add(std::move(s), out, whole, rank(first));
  }

  void add_upsample() {
    const int32_t v = value_that([&](int32_t i) { return rank(i) >= 3 && of(i).h * of(i).w < 80; });
    if (v < 0) return;
    const Picture& in = of(v);
    program::Step s = step_of(Kind::kUpsample, {v});
    std::array<float, 2> scale{};
    std::array<int64_t, 2> out{};
    const bool by_size = draw_.one_in(2);
    for (size_t i = 0; i < 2; ++i) {
      const int64_t from = i == 0 ? in.h : in.w;
      const bool fixed = i == 0 && rank(v) == 3;
      s.size[i] = by_size ? (fixed ? 1 : 1 + draw_.below(2 * from)) : 0;
      s.factor[i] = fixed ? 1 : 1 + draw_.below(3);
      out[i] = by_size ? s.size[i] : from * s.factor[i];
      scale[i] = by_size ? static_cast<float>(from) / static_cast<float>(out[i])
                         : static_cast<float>(1.0 / static_cast<double>(s.factor[i]));
    }
    add(std::move(s), value(v), upsampled(in, scale[0], scale[1], out[0], out[1]), rank(v));
  }

  void add_flatten() {
    const int32_t v = value_that([&](int32_t i) { return rank(i) >= 3; });
    add(step_of(Kind::kFlatten, {v}), value(v), flattened(of(v)), 2);
  }

  void add_output(int32_t v) {
    program::Step s = step_of(Kind::kOutput, {v});
    s.place = static_cast<int32_t>(outputs_.size());
    outputs_.push_back(v);
    steps_.push_back(std::move(s));
  }

  // ---------------------------------------------------------------- running

  RunMemory memory_of(const program::Plan& plan) {
    RunMemory run{trial_.outputs.take<uint8_t>(plan.arena_bytes), {}};
    for (const program::Shape& s : plan.results) {
      tq_image_float r{nullptr, TQ_F32, s.n, s.h, s.w, s.c, s.c * s.h * s.w, s.w, 1, s.h * s.w};
      if (s.rank == 4 && request_.channels_last) {
        r.row_stride = s.w * s.c;
        r.pixel_stride = s.c;
        r.channel_stride = 1;
      }
      r.data = trial_.outputs.take<float>(s.elements());
      run.results.push_back(r);
    }
    return run;
  }

  void check_results(const RunMemory& run, const std::string& name) const {
    for (size_t i = 0; i < outputs_.size(); ++i) {
      const Picture want = real(outputs_[i]);
      const tq_image_float& r = run.results[i];
      CHECK(r.n == want.n && r.h == want.h && r.w == want.w && r.c == want.c, "%s: shape of result %ld", name.c_str(),
            long(i));
      for (int64_t n = 0; n < r.n; ++n)
        for (int64_t y = 0; y < r.h; ++y)
          for (int64_t x = 0; x < r.w; ++x)
            for (int64_t c = 0; c < r.c; ++c) {
              const float got = static_cast<float*>(
                  r.data)[n * r.image_stride + y * r.row_stride + x * r.pixel_stride + c * r.channel_stride];
              CHECK(same_float(got, want.at(n, y, x, c)),
                    "%s: result %ld of the steps%s: [%ld, %ld, %ld, %ld] is %a, not %a", name.c_str(), long(i),
                    text_.c_str(), long(n), long(y), long(x), long(c), static_cast<double>(got),
                    static_cast<double>(want.at(n, y, x, c)));
            }
    }
  }

  Trial& trial_;
  Draw& draw_;
  Random random_;
  Size first_size_{};
  int32_t rank_ = 4;
  program::Request request_;
  std::vector<tq_image_float> arguments_;
  std::vector<program::Value> values_;
  std::vector<program::Step> steps_;
  std::vector<Picture> pictures_;  // of values; of int8 ones the integers
  std::vector<int32_t> ranks_;     // of values
  std::vector<int32_t> outputs_;   // the value of each result
  std::string text_;
};

inline void check_core_program(Trial& trial) {
  trial.begin();
  ProgramCase program(trial);
  program.grow();
  program.check();
}

}  // namespace native
