// One linear layer, drawn, computed by the reference and by every instruction set of this machine, and compared bit for
// bit: the quantized rows, their scales, the packed weight and the output.
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "draw.h"
#include "memory.h"
#include "reference.h"

namespace native {

struct Shape {
  int64_t m, n, k;
};

// Sizes by class: small ones, around powers of two (and so around every register tile), deep.
inline int64_t draw_size(Draw& draw, int64_t most) {
  const int64_t kind = draw.below(4);
  int64_t size = 1 + draw.below(20);
  if (kind == 2) size = (int64_t{1} << draw.below(9)) + draw.below(3) - 1;
  if (kind == 3) size = 1 + draw.below(most);
  return size < 1 ? 1 : (size > most ? most : size);
}

inline Shape draw_shape(Draw& draw) {
  Shape s{draw_size(draw, 110), draw_size(draw, 130), draw_size(draw, 700)};
  if (draw.one_in(64)) s = {1 + draw.below(3), 1 + draw.below(20), 33020 + draw.below(10)};  // sums of 32 and 64 bits
  if (draw.one_in(256)) s = {1 + draw.below(2), 1 + draw.below(4), 65720 + draw.below(80)};
  return s;
}

struct Case {
  Linear l;
  std::vector<int8_t> weight;  // [n, k]
  Place place = Place::kBeforeHole;
  bool raw = false;  // int32 sums (int8_mm): no scales, no zero points
  std::string text;
};

inline float draw_float(Random& random, int flavour) {
  if (flavour == 0) return random.normal();
  static constexpr uint32_t kOdd[] = {0,          0x80000000, 0x00000001, 0x80000001, 0x00800000, 0x7f7fffff,
                                      0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0x3f800000};
  if (flavour == 1) return random.one_in(40) ? bits_to_float(kOdd[random.below(7)]) : random.normal() * 100.0f;
  if (flavour == 2) return random.one_in(200) ? bits_to_float(kOdd[random.below(12)]) : random.normal();
  if (flavour == 3) return bits_to_float(static_cast<uint32_t>(random.next()));  // any bits
  if (flavour == 4) return std::ldexp(random.normal(), static_cast<int>(random.below(250)) - 125);
  if (flavour == 5) return static_cast<float>(random.below(9) - 4) * 0.5f;  // ties
  return 0.0f;
}

inline void fill_input(Linear& l, Memory& memory, Random& random, int flavour) {
  const int64_t count = (l.m - 1) * l.x_stride + l.k;
  if (!l.float_input) {
    uint8_t* x = memory.take<uint8_t>(count);
    for (int64_t i = 0; i < count; ++i)
      x[i] = static_cast<uint8_t>(random.one_in(8) ? 128 - random.below(2) : random.next());
    l.x = x;
  } else if (l.x_type == FloatType::kF32) {
    float* x = memory.take<float>(count);
    for (int64_t i = 0; i < count; ++i) x[i] = draw_float(random, flavour);
    l.x = x;
  } else {
    uint16_t* x = memory.take<uint16_t>(count);
    const bool bf16 = l.x_type == FloatType::kBF16;
    for (int64_t i = 0; i < count; ++i) {
      const float v = draw_float(random, flavour);
      x[i] = flavour == 3 ? static_cast<uint16_t>(random.next()) : (bf16 ? narrow(v, 8, 7) : narrow(v, 5, 10));
    }
    l.x = x;
  }
}

template <class T, class Make>
const T* filled(Memory& memory, int64_t count, const Make& make) {
  T* values = memory.take<T>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = make();
  return values;
}

inline void fill_weight(Case& c, Memory& memory, Random& random, Draw& draw) {
  Linear& l = c.l;
  const int64_t kind = draw.below(4);  // all bytes; no -128; only -128 and 127; one -128 somewhere
  c.weight.resize(static_cast<size_t>(l.n * l.k));
  for (int8_t& w : c.weight) {
    w = static_cast<int8_t>(random.next());
    if (kind == 2) w = random.one_in(2) ? -128 : 127;
    else if (kind && w == -128) w = -127;
  }
  if (kind == 3) c.weight[static_cast<size_t>(random.below(l.n * l.k))] = -128;

  // Packed from guarded memory in either order, in two parts, and read back.
  const bool by_columns = draw.one_in(2);
  const int64_t gap = draw.below(3), stride = (by_columns ? l.n : l.k) + gap;
  int8_t* source = memory.take<int8_t>(((by_columns ? l.k : l.n) - 1) * stride + (by_columns ? l.n : l.k));
  for (int64_t n = 0; n < l.n; ++n)
    for (int64_t k = 0; k < l.k; ++k) source[by_columns ? k * stride + n : n * stride + k] = c.weight[n * l.k + k];
  int8_t* packed = memory.take<int8_t>(torchquant::packed_bytes(l.n, l.k));
  const int64_t tiles = torchquant::num_tiles(l.n), half = draw.below(tiles + 1);
  const int64_t row = by_columns ? 1 : stride, column = by_columns ? stride : 1;
  torchquant::pack_weight(source, row, column, l.n, l.k, half, tiles, packed);
  torchquant::pack_weight(source, row, column, l.n, l.k, 0, half, packed);
  l.packed = packed;
  int8_t* back = memory.take<int8_t>(l.n * l.k);
  torchquant::unpack_weight(packed, l.n, l.k, 0, half, back);
  torchquant::unpack_weight(packed, l.n, l.k, half, tiles, back);
  CHECK(!std::memcmp(back, c.weight.data(), c.weight.size()), "%s: unpack_weight gives another weight", c.text.c_str());
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int8_t* t = torchquant::tile_at(packed, l.k, tile);
    bool minus_128 = false;
    for (int64_t j = 0; j < 16; ++j) {
      int64_t sum = 0;
      for (int64_t k = 0; tile * 16 + j < l.n && k < l.k; ++k) {
        sum += c.weight[(tile * 16 + j) * l.k + k];
        minus_128 |= c.weight[(tile * 16 + j) * l.k + k] == -128;
      }
      CHECK(torchquant::tile_sums(t, l.k)[j] == sum, "%s: column sum of tile %ld", c.text.c_str(), long(tile));
    }
    CHECK(torchquant::tile_holds_minus_128(t, l.k) == minus_128, "%s: flag of tile %ld", c.text.c_str(), long(tile));
  }
}

inline Case draw_case(Draw& draw, Memory& memory, const Shape* fixed = nullptr) {
  Case c;
  Linear& l = c.l;
  const Shape shape = draw_shape(draw);
  l.m = fixed ? fixed->m : shape.m;
  l.n = fixed ? fixed->n : shape.n;
  l.k = fixed ? fixed->k : shape.k;
  c.place = draw.pick({Place::kBeforeHole, Place::kBehindHole, Place::kHeap});
  memory.begin(c.place);
  c.raw = draw.one_in(6);
  l.float_input = !c.raw && draw.below(3) != 0;
  l.x_stride = l.k + draw.pick<int64_t>({0, 0, 1, 7});
  l.x_type = draw.pick({FloatType::kF32, FloatType::kBF16, FloatType::kF16});
  l.mode = draw.pick({RowMode::kSymmetric, RowMode::kAsymmetric, RowMode::kStatic});
  l.x_signed = draw.one_in(2);
  l.activation = c.raw ? Activation::kNone : kActivations[draw.below(kNumActivations)];
  l.out_type = draw.pick({OutType::kF32, OutType::kBF16, OutType::kF16, OutType::kI8, OutType::kU8});
  if (c.raw) l.out_type = OutType::kI32;
  l.ldc = l.n + draw.pick<int64_t>({0, 0, 1, 5});
  const int flavour = static_cast<int>(draw.below(7));
  const bool weight_zero = !c.raw && draw.one_in(3), integer_bias = !c.raw && draw.one_in(5);
  const bool bias = !c.raw && !integer_bias && draw.one_in(2);
  const bool input_zero = draw.one_in(2);
  l.qmin = static_cast<int32_t>(draw.below(100)) - 128;
  l.qmax = l.qmin + 1 + static_cast<int32_t>(draw.below(127 - l.qmin));
  if (l.mode != RowMode::kStatic) {  // of 8 bits mostly, down to 2
    const int64_t bits = draw.one_in(2) ? 8 : 2 + draw.below(6);
    l.qmax = (1 << (bits - 1)) - 1;
    l.qmin = -l.qmax - 1;
  }
  l.zero_point = l.qmin + static_cast<int32_t>(draw.below(l.qmax - l.qmin + 1));
  const int32_t least = l.out_type == OutType::kU8 ? 0 : -128;
  l.out_qmin = least + static_cast<int32_t>(draw.below(100));
  l.out_qmax = l.out_qmin + 1 + static_cast<int32_t>(draw.below(least + 255 - l.out_qmin));
  l.out_zero = l.out_qmin + static_cast<int32_t>(draw.below(l.out_qmax - l.out_qmin + 1));
  c.text = std::to_string(l.m) + " x " + std::to_string(l.n) + " x " + std::to_string(l.k);
  c.text +=
      l.float_input ? " float " + std::to_string(int(l.x_type)) + " mode " + std::to_string(int(l.mode)) : " bytes";
  c.text += " values " + std::to_string(flavour) + " activation " + std::to_string(int(l.activation)) + " out " +
            std::to_string(int(l.out_type)) + (weight_zero ? " weight zero" : "") + (integer_bias ? " int bias" : "");

  Random random(draw.seed());
  l.scale = std::ldexp(0.5f + random.unit(), flavour == 4 ? static_cast<int>(random.below(200)) - 120 : -5);
  l.out_scale = std::ldexp(0.5f + random.unit(), static_cast<int>(random.below(12)) - 4);
  fill_input(l, memory, random, flavour);
  fill_weight(c, memory, random, draw);
  const auto scale = [&] { return 0.0005f + random.unit() * 0.01f; };
  const auto byte = [&] { return static_cast<int32_t>(random.below(256)) - 128; };
  if (!l.float_input && !c.raw) {
    const int32_t shift = l.x_signed ? 0 : 128;
    l.in_scale = filled<float>(memory, l.m, scale);
    if (input_zero) l.in_zero = filled<int32_t>(memory, l.m, [&] { return byte() + shift; });
  }
  if (!c.raw) l.weight_scale = filled<float>(memory, l.n, scale);
  if (weight_zero) l.weight_zero = filled<int32_t>(memory, l.n, byte);
  if (bias) l.bias = filled<float>(memory, l.n, [&] { return draw_float(random, random.one_in(9) ? flavour : 0); });
  if (integer_bias)
    l.bias_i32 = filled<int32_t>(memory, l.n, [&] { return static_cast<int32_t>(random.next()) >> random.below(30); });
  return c;
}

// ---------------------------------------------------------------- the reference's results

struct Expected {
  std::vector<int32_t> q;  // [m, k]
  std::vector<RowQuantization> rows;
  std::vector<float> y;       // [m, n]: after the activation
  std::vector<int32_t> sums;  // raw
};

inline Expected expected_of(const Case& c) {
  const Linear& l = c.l;
  Expected e;
  e.q.resize(static_cast<size_t>(l.m * l.k));
  e.y.resize(static_cast<size_t>(l.m * l.n));
  e.sums.resize(e.y.size());
  for (int64_t m = 0; m < l.m; ++m) {
    RowQuantization r{1.0f, 0, false};
    if (l.float_input) r = row_quantization(l, m);
    else if (!c.raw) r = {l.in_scale[m], l.in_zero ? l.in_zero[m] : 0, false};
    e.rows.push_back(r);
    int32_t* q = &e.q[static_cast<size_t>(m * l.k)];
    for (int64_t k = 0; k < l.k; ++k) q[k] = row_value(l, r, m, k);
    for (int64_t n = 0; n < l.n; ++n) {
      const int64_t sum = exact_sum(l, r, q, c.weight.data(), n);
      const size_t at = static_cast<size_t>(m * l.n + n);
      if (c.raw) e.sums[at] = static_cast<int32_t>(sum);
      else e.y[at] = finished(l, r, sum, n);
    }
  }
  return e;
}

// ---------------------------------------------------------------- the kernels'

struct Scratch {  // of one thread: C and the panel, fresh for every instruction set
  Memory memory;
};

inline int64_t element_bytes(OutType type) {
  return type == OutType::kF32 || type == OutType::kI32 ? 4 : (type == OutType::kBF16 || type == OutType::kF16 ? 2 : 1);
}

// Rows and tiles in parts, as threads would share them; `cut` determines the parts.
inline void run(const KernelTable& table, Linear& l, Scratch& scratch, Place place, uint64_t cut, Panel& panel) {
  Memory& memory = scratch.memory;
  memory.begin(place);
  Random random(cut);
  panel.q = memory.take<uint8_t>(panel_size(table, l.m, l.k));
  panel.row_scale = memory.take<float>(l.m);
  panel.row_zero = memory.take<int32_t>(l.m);
  panel.row_term = l.weight_zero ? memory.take<int32_t>(l.m) : nullptr;
  l.c = memory.take<uint8_t>(((l.m - 1) * l.ldc + l.n) * element_bytes(l.out_type));
  const int64_t unit = tile_unit(table), tiles = torchquant::num_tiles(l.n);
  const int64_t made = random.below(l.m + 1),
                half = std::min(tiles, random.below((tiles + unit - 1) / unit + 1) * unit);
  make_rows(table, l, panel, made, l.m);
  make_rows(table, l, panel, 0, made);
  multiply(table, l, panel, half, tiles);
  multiply(table, l, panel, 0, half);
}

// The same rows once more, without a panel: what quantize_per_token writes.
inline void check_plain_rows(const Case& c, const KernelTable& table, Scratch& scratch, const Expected& e) {
  const Linear& l = c.l;
  if (!l.float_input || l.mode == RowMode::kStatic) return;
  Memory& memory = scratch.memory;
  memory.begin(c.place);
  const Panel p{memory.take<uint8_t>(l.m * l.k), memory.take<float>(l.m), memory.take<int32_t>(l.m), nullptr};
  make_plain_rows(table, l, p, 0, l.m);
  for (int64_t i = 0; i < l.m * l.k; ++i)
    CHECK(static_cast<int8_t>(p.q[i]) == e.q[static_cast<size_t>(i)], "%s, %s: plain q[%ld]", table.name,
          c.text.c_str(), long(i));
  for (int64_t m = 0; m < l.m; ++m)
    CHECK(p.row_zero[m] == e.rows[static_cast<size_t>(m)].zero, "%s, %s: zero point of row %ld is %d", table.name,
          c.text.c_str(), long(m), p.row_zero[m]);
}

inline void check_rows(const Case& c, const KernelTable& table, const Panel& panel, const Expected& e) {
  const Linear& l = c.l;
  for (int64_t m = 0; l.float_input && m < l.m; ++m) {
    const RowQuantization& r = e.rows[static_cast<size_t>(m)];
    CHECK(r.bad ? std::isnan(panel.row_scale[m]) : panel.row_scale[m] == r.scale,
          "%s, %s: scale of row %ld: %a, not %a", table.name, c.text.c_str(), long(m), panel.row_scale[m], r.scale);
    for (int64_t k = 0; k < l.k; ++k) {
      const int32_t got = panel_value(table, l, panel, m, k), want = e.q[static_cast<size_t>(m * l.k + k)];
      CHECK(got == want, "%s, %s: q[%ld, %ld] is %d, not %d", table.name, c.text.c_str(), long(m), long(k), got, want);
    }
  }
}

inline bool same_float(float a, float b) { return (std::isnan(a) && std::isnan(b)) || !std::memcmp(&a, &b, 4); }

inline void check_output(const Case& c, const KernelTable& table, const Expected& e) {
  const Linear& l = c.l;
  const int64_t bytes = element_bytes(l.out_type);
  const auto* base = static_cast<const uint8_t*>(l.c);
  for (int64_t m = 0; m < l.m; ++m) {
    for (int64_t n = 0; n < l.n; ++n) {
      const int64_t at = m * l.ldc + n;
      const float y = e.y[static_cast<size_t>(m * l.n + n)];
      bool same = true;
      double got = 0;
      switch (l.out_type) {
        case OutType::kF32: same = same_float(static_cast<float>(got = static_cast<const float*>(l.c)[at]), y); break;
        case OutType::kI32: same = (got = static_cast<const int32_t*>(l.c)[at]) == e.sums[size_t(m * l.n + n)]; break;
        case OutType::kI8:
        case OutType::kU8: {
          const int32_t q = quantize_value(y, 1.0f / l.out_scale, l.out_zero, l.out_qmin, l.out_qmax);
          same = (got = l.out_type == OutType::kI8 ? static_cast<int8_t>(base[at]) : base[at]) == q;
          break;
        }
        default: {
          const bool bf16 = l.out_type == OutType::kBF16;
          const uint16_t want = bf16 ? narrow(y, 8, 7) : narrow(y, 5, 10);
          const uint16_t h = static_cast<const uint16_t*>(l.c)[at];
          got = bf16 ? widen(h, 8, 7) : widen(h, 5, 10);
          same = std::isnan(y) ? std::isnan(got) : h == want;
        }
      }
      CHECK(same, "%s, %s: output [%ld, %ld] is %a, not as from %a", table.name, c.text.c_str(), long(m), long(n), got,
            double(y));
    }
    for (int64_t i = (m * l.ldc + l.n) * bytes; m + 1 < l.m && i < (m + 1) * l.ldc * bytes; ++i)
      CHECK(base[i] == Memory::kUntouched, "%s, %s: written behind row %ld", table.name, c.text.c_str(), long(m));
  }
}

// The reference's activation is the scalar path's in fp32, after a check of its distance from the true function.
inline void apply_activation(Case& c, Scratch& scratch, Expected& e) {
  const Linear& l = c.l;
  if (l.activation == Activation::kNone) return;
  if (is_hard(l.activation)) {
    for (float& y : e.y) y = hard_activation(l.activation, y);
    return;
  }
  Linear in_floats = l;
  in_floats.out_type = OutType::kF32;
  in_floats.ldc = l.n;
  Panel panel;
  run(scalar_table(), in_floats, scratch, c.place, 0, panel);
  const float* got = static_cast<const float*>(in_floats.c);
  for (size_t i = 0; i < e.y.size(); ++i) {
    const double x = e.y[i], want = true_activation(l.activation, x);
    CHECK(close_to_activation(l.activation, x, got[i]), "%s: activation of %a is %a, not %a", c.text.c_str(), x,
          double(got[i]), want);
    e.y[i] = got[i];
  }
}

inline void check_case(Case& c, Scratch& scratch, uint64_t cut) {
  Expected expected = expected_of(c);
  if (!c.raw) apply_activation(c, scratch, expected);
  for (torchquant::Isa isa : torchquant::usable_isas()) {
    const KernelTable& table = table_of(isa);
    Panel panel;
    run(table, c.l, scratch, c.place, cut, panel);
    check_rows(c, table, panel, expected);
    check_output(c, table, expected);
    check_plain_rows(c, table, scratch, expected);
  }
}

}  // namespace native
