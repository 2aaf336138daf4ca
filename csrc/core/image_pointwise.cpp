// tq_image_add, tq_image_mul, tq_image_map: element by element.
#include <cstring>

#include "core/image.h"
#include "isa.h"

namespace torchquant {
namespace {

tq_status combine(bool multiply, const tq_image& a, tq_qparams aq, const tq_image& b, tq_qparams bq,
                  tq_activation activation, const tq_image& out, tq_qparams outq, const tq_parallel* parallel) {
  if (is_empty(out)) return TQ_OK;
  ImageCombineArgs args{};
  args.a_scale = aq.scale;
  args.b_scale = bq.scale;
  args.a_zero = aq.zero_point;
  args.b_zero = bq.zero_point;
  args.multiply = multiply;
  args.result = result_args(out, outq, &activation);
  args.activation = activation_of(activation);
  const Runs<3> runs = runs_of<3>(out, {&a, &b, &out});
  args.a_row = runs.row_stride()[0];
  args.b_row = runs.row_stride()[1];
  args.out_row = runs.row_stride()[2];
  const KernelTable& table = kernels();
  runs.run(parallel, [&](const Runs<3>::Offsets& at, int64_t rows, int64_t length) {
    ImageCombineArgs g = args;
    g.a = static_cast<const uint8_t*>(a.data) + at[0];
    g.b = static_cast<const uint8_t*>(b.data) + at[1];
    g.out = element_at(out.data, out.type, at[2]);
    g.rows = rows;
    g.length = length;
    table.combine_pixels(g);
  });
  return TQ_OK;
}

}  // namespace
}  // namespace torchquant

using namespace torchquant;

tq_status tq_image_add(const tq_image* a, tq_qparams a_qparams, const tq_image* b, tq_qparams b_qparams,
                       tq_activation activation, const tq_image* out, tq_qparams out_qparams,
                       const tq_parallel* parallel) {
  return combine(false, *a, a_qparams, *b, b_qparams, activation, *out, out_qparams, parallel);
}

tq_status tq_image_mul(const tq_image* a, tq_qparams a_qparams, const tq_image* b, tq_qparams b_qparams,
                       tq_activation activation, const tq_image* out, tq_qparams out_qparams,
                       const tq_parallel* parallel) {
  return combine(true, *a, a_qparams, *b, b_qparams, activation, *out, out_qparams, parallel);
}

tq_status tq_image_map(const tq_image* in, const void* table, const tq_image* out, const tq_parallel* parallel) {
  if (is_empty(*out)) return TQ_OK;
  const Runs<2> runs = runs_of<2>(*out, {in, out});
  const int64_t in_row = runs.row_stride()[0], out_row = runs.row_stride()[1];
  const uint8_t* const from = static_cast<const uint8_t*>(in->data);
  if (!table) {
    runs.run(parallel, [&](const Runs<2>::Offsets& at, int64_t rows, int64_t length) {
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(static_cast<char*>(out->data) + at[1] + row * out_row, from + at[0] + row * in_row,
                    static_cast<size_t>(length));
    });
    return TQ_OK;
  }
  // Indexed by the byte itself: -128 .. -1 are the bytes 128 .. 255.
  const int64_t half = 128 * element_bytes(out->type);
  alignas(64) char by_byte[256 * sizeof(float)];
  std::memcpy(by_byte, static_cast<const char*>(table) + half, static_cast<size_t>(half));
  std::memcpy(by_byte + half, table, static_cast<size_t>(half));
  ImageMapArgs args{};
  args.in_row = in_row;
  args.out_row = out_row;
  args.bytes = out->type == TQ_I8 ? reinterpret_cast<const uint8_t*>(by_byte) : nullptr;
  args.floats = out->type == TQ_I8 ? nullptr : reinterpret_cast<const float*>(by_byte);
  const KernelTable& k = kernels();
  runs.run(parallel, [&](const Runs<2>::Offsets& at, int64_t rows, int64_t length) {
    ImageMapArgs g = args;
    g.in = from + at[0];
    g.out = element_at(out->data, out->type, at[1]);
    g.rows = rows;
    g.length = length;
    k.map_pixels(g);
  });
  return TQ_OK;
}
