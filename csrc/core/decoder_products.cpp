// The linear layers of a decoder. Many tokens go through the drivers of the operators. One token is cheap to prepare and
// its weights are read once, so that threads meet as seldom as possible: one thread prepares the input, and then each
// takes a share of the tiles of all layers that read it.
#include <algorithm>
#include <array>

#include "core/convert.h"
#include "core/decoder_work.h"
#include "core/intx_panel.h"

namespace torchquant::decoder {
namespace {

constexpr size_t kMostLayers = 3;            // of a group
constexpr int64_t kFetchedBytes = 24 << 10;  // of a thread's next weights, while the threads prepare their input

bool same_quantization(const tq_row_quantization& a, const tq_row_quantization& b) {
  return a.mode == b.mode && a.qmin == b.qmin && a.qmax == b.qmax &&
         (a.mode != TQ_STATIC || (a.scale == b.scale && a.zero_point == b.zero_point));
}

bool same_input(const Layer& a, const Layer& b) {
  if (a.kind != b.kind) return false;
  if (a.kind == Kind::kIntxFloats) return true;
  return same_quantization(a.how, b.how) && (a.kind == Kind::kInt8 || a.shape.group_size == b.shape.group_size);
}

// ---------------------------------------------------------------- many tokens

tq_linear_part int8_part(const Layer& layer, float* out) {
  tq_linear_part part{};
  part.n = layer.shape.n;
  part.packed = static_cast<const int8_t*>(layer.packed);
  part.weight_scale = layer.weight_scale;
  part.weight_zero_point = layer.weight_zero_point;
  part.bias = layer.bias;
  part.activation = TQ_NONE;
  part.out_type = TQ_F32;
  part.out = out;
  part.out_stride = layer.shape.n;
  return part;
}

tq_intx_part intx_part(const Layer& layer, float* out) {
  tq_intx_part part{};
  part.shape = layer.shape;
  part.packed = static_cast<const uint8_t*>(layer.packed);
  part.bias = layer.bias;
  part.activation = TQ_NONE;
  part.out_type = TQ_F32;
  part.out = out;
  part.out_stride = layer.shape.n;
  return part;
}

tq_status multiply_many(const Work& work, const Group& group, const float* x, float* const* outs) {
  const int64_t k = group.layers[0].shape.k;
  const tq_rows rows{x, TQ_F32, work.call.tokens, k, k};
  for (const size_t input : group.inputs) {
    const Layer& first = group.layers[input];
    std::array<tq_linear_part, kMostLayers> int8{};
    std::array<tq_intx_part, kMostLayers> intx{};
    int64_t count = 0;
    for (size_t i = 0; i < group.layers.size(); ++i) {
      if (group.input[i] != input) continue;
      const auto place = static_cast<size_t>(count++);
      if (first.kind == Kind::kInt8) int8[place] = int8_part(group.layers[i], outs[i]);
      else intx[place] = intx_part(group.layers[i], outs[i]);
    }
    tq_status status = TQ_OK;
    if (first.kind == Kind::kInt8) {
      tq_linear_input in{};
      in.rows = rows;
      in.quantization = first.how;
      status = tq_linear(&in, int8.data(), count, work.parallel);
    } else if (first.kind == Kind::kIntx) {
      status = tq_linear_intx_parts(&rows, &first.how, intx.data(), count, work.parallel);
    } else {
      for (int64_t i = 0; i < count && status == TQ_OK; ++i)
        status = tq_linear_intx_float(&rows, &intx[static_cast<size_t>(i)], work.parallel);
    }
    if (status != TQ_OK) return status;
  }
  return TQ_OK;
}

// ---------------------------------------------------------------- one token

struct Input {  // a row as the kernels of a layer read it
  const float* x;
  uint8_t* q;  // kInt8
  float* row_scale;
  int32_t* row_zero;
  int32_t* row_term;  // or null
  intx::Panel panel;  // kIntx
};

struct Inputs {
  std::array<Input, kMostLayers> of_layer;
};

Input place_input(const KernelTable& table, const Group& group, size_t layer, Pieces& pieces) {
  const Layer& l = group.layers[layer];
  Input input{};
  if (l.kind == Kind::kInt8) {
    input.q = pieces.take<uint8_t>(panel_bytes(1, l.shape.k, 1));
    input.row_scale = pieces.take<float>(1);
    input.row_zero = pieces.take<int32_t>(1);
    input.row_term = pieces.take<int32_t>(1);
    if (!group.want_term[layer]) input.row_term = nullptr;
  } else if (l.kind == Kind::kIntx) {
    const IntxShape shape = intx_shape_of(l.shape);
    const bool zero_rows = intx::has_zero_rows(l.how);
    const int64_t bytes = intx::place_panel(table, shape, 1, zero_rows, nullptr).bytes;
    input.panel = intx::place_panel(table, shape, 1, zero_rows, pieces.take<uint8_t>(bytes));
  }
  return input;
}

void prepare(const KernelTable& table, const Layer& l, const float* x, Input& input) {
  input.x = x;
  const tq_rows rows{x, TQ_F32, 1, l.shape.k, l.shape.k};
  if (l.kind == Kind::kInt8) {
    QuantizeRowsArgs q{};
    q.x = x;
    q.x_type = FloatType::kF32;
    q.x_stride = q.k = l.shape.k;
    q.mode = row_mode(l.how.mode);
    q.scale = l.how.scale;
    q.zero_point = l.how.zero_point;
    q.qmin = l.how.qmin;
    q.qmax = l.how.qmax;
    q.offset = table.panel_offset;
    q.q = input.q;
    q.panel_rows = 1;
    q.row_scale = input.row_scale;
    q.row_zero = input.row_zero;
    q.row_term = input.row_term;
    table.quantize_rows(q, 0, 1);
  } else if (l.kind == Kind::kIntx) {
    const IntxShape shape = intx_shape_of(l.shape);
    intx::quantize(table, rows, l.how, input.panel, 0, 1, 0);
    intx::arrange(table, shape, input.panel, 0, 1);
    if (intx::has_many_rests(input.panel, 1, shape.k)) {
      intx::take_ones(table, 1, input.panel);
      intx::arrange(table, shape, input.panel, 0, 1);
    }
  }
}

Inputs prepare_all(const Work& work, const Group& group, const float* x) {
  Inputs inputs{};
  Pieces pieces(work.inputs);
  for (const size_t i : group.inputs) {
    inputs.of_layer[i] = place_input(work.table, group, i, pieces);
    prepare(work.table, group.layers[i], x, inputs.of_layer[i]);
  }
  return inputs;
}

int64_t tile_block(const KernelTable& table, const Layer& layer) {
  switch (layer.kind) {
    case Kind::kInt8: return table.tile_block;
    case Kind::kIntx: return table.intx_tile_block;
    case Kind::kIntxFloats: return table.float_tile_block;
  }
  return 1;
}

// body(layer, tile0, tile1) for a share of the tiles of a group. Blocks of tiles of all layers are numbered through, or
// each layer has its own.
template <class Body>
void for_tiles(const KernelTable& table, const Group& group, const Share& share, const Body& body) {
  const auto tiles_of = [&](size_t i) { return num_tiles(group.layers[i].shape.n); };
  if (group.side_by_side) {
    int64_t block = 1;
    for (const Layer& layer : group.layers) block = std::max(block, tile_block(table, layer));
    const int64_t tiles = tiles_of(0), blocks = ceil_div(tiles, block);
    const int64_t tile0 = share.begin(blocks) * block, tile1 = std::min(tiles, share.end(blocks) * block);
    for (size_t i = 0; i < group.layers.size() && tile0 < tile1; ++i) body(i, tile0, tile1);
    return;
  }
  int64_t blocks = 0;
  for (size_t i = 0; i < group.layers.size(); ++i) blocks += ceil_div(tiles_of(i), tile_block(table, group.layers[i]));
  int64_t begin = share.begin(blocks), end = share.end(blocks);
  for (size_t i = 0; i < group.layers.size(); ++i) {
    const int64_t block = tile_block(table, group.layers[i]), own = ceil_div(tiles_of(i), block);
    const int64_t tile0 = std::max<int64_t>(0, begin) * block,
                  tile1 = std::min(tiles_of(i), std::min(own, end) * block);
    if (tile0 < tile1) body(i, tile0, tile1);
    begin -= own;
    end -= own;
  }
}

int64_t bytes_of_tile(const Layer& layer) {
  return layer.kind == Kind::kInt8 ? tile_bytes(layer.shape.k) : intx_shape_of(layer.shape).tile_bytes();
}

void fetch(const KernelTable& table, const Group& group, const Share& share) {
  int64_t left = kFetchedBytes;
  for_tiles(table, group, share, [&](size_t i, int64_t tile0, int64_t tile1) {
    const int64_t bytes = bytes_of_tile(group.layers[i]), size = std::min(left, (tile1 - tile0) * bytes);
    const char* at = static_cast<const char*>(group.layers[i].packed) + tile0 * bytes;
    for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(at + line, 0, 2);
    left -= size;
  });
}

void multiply_tiles(const KernelTable& table, const Layer& layer, const Input& input, float* out, int64_t tile0,
                    int64_t tile1) {
  if (layer.kind == Kind::kInt8) {
    GemmArgs g{};
    g.a = input.q;
    g.panel_rows = 1;
    g.k = layer.shape.k;
    g.n = layer.shape.n;
    g.packed = static_cast<const int8_t*>(layer.packed);
    g.row_scale = input.row_scale;
    g.row_zero = input.row_zero;
    g.same_row_zero = true;  // of one row
    g.row_term = layer.weight_zero_point ? input.row_term : nullptr;
    g.weight_scale = layer.weight_scale;
    g.weight_zero = layer.weight_zero_point;
    g.bias = layer.bias;
    g.activation = Activation::kNone;
    g.out_type = OutType::kF32;
    g.c = out;
    g.ldc = layer.shape.n;
    table.gemm(g, 0, 1, tile0, tile1);
  } else if (layer.kind == Kind::kIntx) {
    table.intx_gemm(intx::product_args(input.panel, intx_part(layer, out), intx::has_zero_rows(layer.how), 0), 0, 1,
                    tile0, tile1);
  } else {
    IntxFloatArgs g{};
    g.x = input.x;
    g.panel_rows = 1;
    g.shape = intx_shape_of(layer.shape);
    g.packed = static_cast<const uint8_t*>(layer.packed);
    g.bias = layer.bias;
    g.activation = Activation::kNone;
    g.out_type = OutType::kF32;
    g.c = out;
    g.ldc = layer.shape.n;
    table.intx_float(g, 0, 1, tile0, tile1);
  }
}

void multiply_one(const Work& work, const Group& group, const float* x, float* const* outs, const Group* next) {
  const Inputs inputs = prepare_all(work, group, x);
  for_shares(work.threads, work.parallel, [&](const Share& share) {
    for_tiles(work.table, group, share, [&](size_t i, int64_t tile0, int64_t tile1) {
      multiply_tiles(work.table, group.layers[i], inputs.of_layer[group.input[i]], outs[i], tile0, tile1);
    });
    if (next) fetch(work.table, *next, share);
  });
}

}  // namespace

Group::Group(std::vector<Layer> own, bool together)
    : layers(std::move(own)), side_by_side(together), input(layers.size()), want_term(layers.size(), false) {
  for (size_t i = 0; i < layers.size(); ++i) {
    size_t first = 0;
    while (!same_input(layers[first], layers[i])) ++first;
    input[i] = first;
    if (first == i) inputs.push_back(i);
    if (layers[i].weight_zero_point) want_term[first] = true;
  }
}

int64_t input_bytes(const KernelTable& table, const Group& group) {
  Pieces pieces(nullptr);
  for (const size_t i : group.inputs) place_input(table, group, i, pieces);
  return pieces.bytes();
}

tq_status multiply(const Work& work, const Group& group, const float* x, float* const* outs, const Group* next) {
  if (work.call.tokens > 1) return multiply_many(work, group, x, outs);
  multiply_one(work, group, x, outs, next);
  return TQ_OK;
}

tq_status multiply_gated(const Work& work, const Group& group, const float* x, float* gate, float* up,
                         const Group& next) {
  float* const outs[] = {gate, up};
  if (work.call.tokens > 1) {
    const tq_status status = multiply_many(work, group, x, outs);
    if (status != TQ_OK) return status;
    tq_activation_call a{};
    a.x = a.out = gate;
    a.up = up;
    a.x_type = a.out_type = TQ_F32;
    a.activation = work.sizes.activation;
    a.rows = 1;
    a.length = work.call.tokens * work.sizes.intermediate;
    return tq_activate(&a, work.parallel);
  }
  const Inputs inputs = prepare_all(work, group, x);
  for_shares(work.threads, work.parallel, [&](const Share& share) {
    int64_t first = 0, last = 0;  // outputs of this share, which are those of both layers
    for_tiles(work.table, group, share, [&](size_t i, int64_t tile0, int64_t tile1) {
      multiply_tiles(work.table, group.layers[i], inputs.of_layer[group.input[i]], outs[i], tile0, tile1);
      first = tile0 * kTileN;
      last = std::min(group.layers[i].shape.n, tile1 * kTileN);
    });
    fetch(work.table, next, share);
    ActivationArgs a{};
    a.x = gate + first;
    a.out = gate + first;
    a.up = up + first;
    a.n = last - first;
    a.in_type = a.out_type = FloatType::kF32;
    a.activation = activation_of(work.sizes.activation);
    if (first < last) work.table.activate_span(a);
  });
  return TQ_OK;
}

}  // namespace torchquant::decoder
