// Convolutions through the C interface: dense, grouped, of one position, the first layer of a network, of one dimension,
// depthwise; with a residual and without, to every type, on images with gaps.
#pragma once

#include "core_image_case.h"

namespace native {

inline const int8_t* pack(Memory& memory, const Layer& l) {
  if (tq_conv_is_depthwise(l.channels(), l.groups)) {
    const int64_t bytes = tq_depthwise_blocks(l.outputs) * tq_depthwise_block_bytes(l.kernel_h, l.kernel_w);
    auto* packed = memory.take<int8_t>(bytes);
    std::vector<int8_t> back(l.weight.size());
    CHECK(tq_pack_depthwise(l.weight.data(), l.outputs, l.kernel_h, l.kernel_w, packed, nullptr) == TQ_OK, "pack");
    CHECK(tq_unpack_depthwise(packed, l.outputs, l.kernel_h, l.kernel_w, back.data(), nullptr) == TQ_OK, "unpack");
    CHECK(back == l.weight, "tq_unpack_depthwise gives another weight");
    return packed;
  }
  const int64_t n = l.outputs / l.groups, k = l.channels() * l.kernel_h * l.kernel_w;
  const int64_t bytes = tq_tiles(n) * tq_tile_bytes(k);
  auto* packed = memory.take<int8_t>(l.groups * bytes);
  for (int64_t group = 0; group < l.groups; ++group)
    CHECK(tq_pack_weight(l.weight.data() + group * n * k, k, 1, n, k, packed + group * bytes, nullptr) == TQ_OK,
          "pack");
  return packed;
}

inline Layer draw_layer(Trial& trial, Random& random, Layer l) {  // whose sizes are set
  Draw& draw = trial.draw;
  const int64_t kind = draw.below(4);  // all bytes; no -128; only -128 and 127; small ones
  l.weight.resize(static_cast<size_t>(l.outputs * l.kernel_h * l.kernel_w * l.channels()));
  for (int8_t& w : l.weight) {
    w = static_cast<int8_t>(random.next());
    if (kind == 1 && w == -128) w = -127;
    if (kind == 2) w = random.one_in(2) ? -128 : 127;
    if (kind == 3) w = static_cast<int8_t>(random.below(7) - 3);
  }
  l.packed = pack(trial.inputs, l);
  const bool odd = draw.one_in(4), bias = !draw.one_in(3);
  const int flavour = draw.one_in(4) ? 2 : 0;
  l.scale = filled<float>(trial.inputs, l.outputs, [&] {
    const float scale = 0.0005f + random.unit() * 0.01f;
    return odd && random.one_in(3) ? (random.one_in(5) ? 0.0f : -scale) : scale;
  });
  l.bias = bias ? filled<float>(trial.inputs, l.outputs, [&] { return draw_float(random, flavour); }) : nullptr;
  return l;
}

// The shape of a layer and of the image that it reads.
struct Plan {
  Layer layer;
  Size image;
  std::string kind;
};

inline Plan draw_plan(Draw& draw) {
  Layer l{};
  l.groups = 1;
  Size s{1 + draw.below(3), 1 + draw.below(9), 1 + draw.below(12), 0};
  const auto kernel = [&](int64_t most) {
    l.kernel_h = 1 + draw.below(most);
    l.kernel_w = draw.one_in(2) ? l.kernel_h : 1 + draw.below(most);
  };
  std::string kind;
  switch (draw.below(8)) {
    case 0:
      kind = "grouped";
      kernel(4);
      l.groups = 2 + draw.below(4);
      l.inputs = l.groups * (2 + draw.below(20));
      l.outputs = l.groups * (1 + draw.below(24));
      break;
    case 1:
      kind = "1x1";
      l.kernel_h = l.kernel_w = 1;
      l.inputs = draw_size(draw, 300);
      l.outputs = draw_size(draw, 150);
      break;
    case 2:
      kind = "stem";
      l.kernel_h = l.kernel_w = draw.pick<int64_t>({3, 5, 7});
      l.inputs = 1 + draw.below(4);
      l.outputs = draw.pick<int64_t>({16, 32, 64, 33});
      s = {1 + draw.below(2), 5 + draw.below(20), 5 + draw.below(20), 0};
      break;
    case 3:
      kind = "1-d";
      l.kernel_h = 1;
      l.kernel_w = 1 + draw.below(7);
      l.inputs = draw_size(draw, 100);
      l.outputs = draw_size(draw, 100);
      s = {1 + draw.below(4), 1, 1 + draw.below(60), 0};
      break;
    case 4:
    case 5:
      kind = "depthwise";
      kernel(7);
      l.inputs = l.groups = 2 + draw_size(draw, 150);
      l.outputs = l.inputs * draw.pick<int64_t>({1, 1, 1, 2, 3});
      if (draw.one_in(3)) s = {1 + draw.below(2), 10 + draw.below(10), 20 + draw.below(20), 0};
      break;
    case 6:
      kind = "large";
      l.kernel_h = l.kernel_w = draw.pick<int64_t>({1, 3});
      l.inputs = draw.pick<int64_t>({16, 64, 65, 128});
      l.outputs = draw.pick<int64_t>({16, 48, 64, 80, 130});
      s = {1 + draw.below(2), 7 + draw.below(8), 7 + draw.below(8), 0};
      break;
    default:
      kind = "dense";
      kernel(4);
      l.inputs = draw_size(draw, 70);
      l.outputs = draw_size(draw, 70);
  }
  if (draw.one_in(40)) {  // sums of 32 and of 64 bits
    kind = "deep";
    l.groups = 1;
    l.kernel_h = l.kernel_w = 1;
    l.inputs = draw.pick<int64_t>({33020, 65790, 65800});
    l.outputs = 1 + draw.below(20);
    s = {1, 1, 1 + draw.below(3), 0};
  }
  s.c = l.inputs;
  return {l, s, kind};
}

// Padding of both sides apart, strides and dilations; returns the sizes of the result, which are at least 1.
inline Geometry draw_geometry(Draw& draw, const Plan& plan, int64_t* out_h, int64_t* out_w) {
  Geometry g{1, 1, 0, 0, 1, 1};
  const auto along = [&](int64_t size, int64_t kernel, int64_t* stride, int64_t* before, int64_t* dilation) {
    *stride = draw.pick<int64_t>({1, 1, 1, 2, 3});
    *dilation = draw.pick<int64_t>({1, 1, 1, 2, 3});
    *before = draw.one_in(6) ? draw.below(2 * kernel + 1) : draw.below(kernel / 2 + 1);
    const int64_t reach = *dilation * (kernel - 1) + 1;
    const int64_t least = std::max<int64_t>(0, reach - size - *before);  // behind the image
    const int64_t after = least + (draw.one_in(6) ? draw.below(2 * kernel + 1) : draw.below(kernel / 2 + 1));
    return (size + *before + after - reach) / *stride + 1;
  };
  *out_h = along(plan.image.h, plan.layer.kernel_h, &g.stride_h, &g.pad_top, &g.dilation_h);
  *out_w = along(plan.image.w, plan.layer.kernel_w, &g.stride_w, &g.pad_left, &g.dilation_w);
  return g;
}

inline void check_core_conv(Trial& trial) {
  trial.begin();
  Draw& draw = trial.draw;
  const Plan plan = draw_plan(draw);
  int64_t out_h, out_w;
  const Geometry g = draw_geometry(draw, plan, &out_h, &out_w);
  const tq_type type = draw.pick({TQ_I8, TQ_I8, TQ_I8, TQ_F32, TQ_BF16, TQ_F16});
  const tq_activation activation = draw.pick({TQ_NONE, TQ_RELU, draw_activation(draw)});
  const tq_qparams outq = draw_qparams(draw), residualq = draw_qparams(draw);
  const int64_t residual_kind = draw.below(4);  // int8, float32, none
  const bool per_image = draw.one_in(3), has_zero = draw.one_in(2), bad = per_image && draw.one_in(3);
  Random random(draw.seed());
  tq_image in;
  const Picture x = random_image(trial, random, plan.image, &in);
  const Layer l = draw_layer(trial, random, plan.layer);

  tq_conv_call call{};
  call.input = in;
  call.per_image = per_image;
  const int64_t scales = per_image ? in.n : 1;
  call.input_scale = filled<float>(trial.inputs, scales, [&] {
    return bad && random.one_in(2) ? std::numeric_limits<float>::quiet_NaN() : 0.001f + random.unit() * 0.02f;
  });
  if (has_zero)
    call.input_zero_point =
        filled<int32_t>(trial.inputs, scales, [&] { return static_cast<int32_t>(random.below(256)) - 128; });
  call.kernel_h = l.kernel_h;
  call.kernel_w = l.kernel_w;
  call.stride_h = g.stride_h;
  call.stride_w = g.stride_w;
  call.pad_top = g.pad_top;
  call.pad_left = g.pad_left;
  call.dilation_h = g.dilation_h;
  call.dilation_w = g.dilation_w;
  call.groups = l.groups;
  call.packed = l.packed;
  call.weight_scale = l.scale;
  call.bias = l.bias;
  call.activation = activation;
  call.out_qparams = outq;

  Picture y = convolved(x, l, g, out_h, out_w, [&](int64_t n) {
    const int64_t i = per_image ? n : 0;
    return InputScale{call.input_scale[i], has_zero ? call.input_zero_point[i] : 0};
  });
  tq_image residual;
  if (residual_kind < 2) {
    Picture r = random_bytes(random, in.n, out_h, out_w, l.outputs);
    if (residual_kind == 1) r = each(r, [&](float) { return random.normal(); });
    residual = lay_out(draw, residual_kind == 0 ? TQ_I8 : TQ_F32, in.n, out_h, out_w, l.outputs);
    place(trial.inputs, residual);
    write(residual, r);
    call.residual = &residual;
    call.residual_qparams = residualq;
    y = combined(false, y, residual_kind == 0 ? real_values(r, residualq) : r);
  }
  const Picture want = finished(activated(y, activation), type, outq);
  const std::string text = plan.kind + " " + std::to_string(in.n) + " x " + std::to_string(in.h) + " x " +
                           std::to_string(in.w) + " x " + std::to_string(in.c) + ", kernel " +
                           std::to_string(l.kernel_h) + " x " + std::to_string(l.kernel_w) + ", groups " +
                           std::to_string(l.groups) + ", activation " + std::to_string(int(activation)) +
                           ", residual " + std::to_string(residual_kind) + ", type " + std::to_string(int(type));
  check_step(trial, lay_out(draw, type, in.n, out_h, out_w, l.outputs), want, text,
             [&](const tq_image& out, const tq_parallel* parallel) {
               tq_conv_call each_call = call;
               each_call.out = out;
               return tq_conv(&each_call, parallel);
             });
}

}  // namespace native
