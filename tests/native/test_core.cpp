// The core without torch, through its C interface: every family on every instruction set of this machine, on one thread
// and with the work divided at random places, in memory that ends at (or begins behind) an unmapped page.
// Arguments: how many times (1), the seed (0), "threads" for threads that run at once.
#include <array>

#include "core_decoder_case.h"
#include "core_embedding_case.h"
#include "core_intx_case.h"
#include "core_layer_case.h"
#include "core_linear_case.h"
#include "core_program_case.h"
#include "core_qat_intx_case.h"
#include "core_span_case.h"

namespace {

using namespace native;

struct Kind {
  const char* name;
  int64_t cases;
  void (*check)(Trial&);
};

void check_linear(Trial& trial) {
  const Shape large{40 + trial.draw.below(60), 60 + trial.draw.below(60), 200 + trial.draw.below(300)};
  Case c = draw_case(trial.draw, trial.inputs, trial.draw.one_in(2) ? &large : nullptr);
  trial.place = c.place;
  Expected expected = expected_of(c);
  Scratch scratch;
  if (!c.raw) apply_activation(c, scratch, expected);
  check_core_linear(c, trial, expected, trial.draw.seed());
}

constexpr Kind kKinds[] = {
    {"linear", 60, check_linear},
    {"pack", 20, check_core_pack},
    {"quantize_pack", 60, check_core_quantize_pack},
    {"intx", 60, check_core_intx},
    {"quantize_pack_intx", 60, check_core_quantize_pack_intx},
    {"embedding", 60, check_core_embedding},
    {"affine", 150, check_core_affine},
    {"activation", 150, check_core_activation},
    {"norm", 100, check_core_norm},
    {"attention", 40, check_core_attention},
    {"fake_quantize", 150, check_core_fake_quantize},
    {"learned", 100, check_core_learned},
    {"minmax", 100, check_core_minmax},
    {"fake_quantize_rows", 60, check_core_fake_quantize_rows},
    {"image", 150, check_core_image},
    {"convolution", 150, check_core_conv},
    {"program", 150, check_core_program},
    {"decoder", 40, check_core_decoder},
};

// Calls on no elements at all change nothing and succeed.
void check_empty_calls() {
  const tq_linear_input in{};
  const tq_linear_part part{};
  const tq_activation_call activation{};
  const tq_norm_call norm{};
  const tq_spans none = tq_spans_per_group(0, 5, 2);
  const tq_scales scales{};
  float low = 0.0f, high = 0.0f;
  int64_t nonfinite = 7;
  CHECK(tq_linear(&in, &part, 1, nullptr) == TQ_OK, "linear of no rows");
  const tq_rows no_rows{nullptr, TQ_F32, 0, 5, 5};
  const tq_row_quantization how{TQ_SYMMETRIC, -128, 127, 0.0f, 0};
  const tq_intx_part intx{{3, 5, 4, 2, false}, nullptr, nullptr, TQ_NONE, TQ_F32, nullptr, 3};
  CHECK(tq_linear_intx(&no_rows, &how, &intx, nullptr) == TQ_OK, "linear of few bits of no rows");
  CHECK(tq_activate(&activation, nullptr) == TQ_OK, "activation of nothing");
  CHECK(tq_normalize(&norm, nullptr) == TQ_OK, "norm of no rows");
  CHECK(tq_quantize(nullptr, TQ_F32, nullptr, TQ_I8, &none, &scales, nullptr) == TQ_OK, "quantize of nothing");
  CHECK(tq_minmax(nullptr, TQ_F32, &none, 1, &low, &high, &nonfinite, nullptr) == TQ_OK, "minmax of nothing");
  CHECK(std::isinf(low) && low > 0 && std::isinf(high) && high < 0 && nonfinite == 0, "minmax of nothing has no range");
  const tq_conv_call conv{};
  const tq_image image{nullptr, TQ_I8, 0, 4, 4, 8, 128, 32, 8};
  const tq_image_float floats{nullptr, TQ_F32, 0, 4, 4, 8, 128, 32, 8, 1};
  const tq_qparams q{1.0f, 0, -128, 127};
  const tq_window window{2, 2, 2, 2, 0, 0, 1, 1};
  CHECK(tq_conv(&conv, nullptr) == TQ_OK && tq_conv_depthwise(&conv, nullptr) == TQ_OK, "convolution of no images");
  CHECK(tq_image_quantize(&floats, q, &image, nullptr) == TQ_OK, "quantize of no images");
  CHECK(tq_image_dequantize(&image, q, &floats, nullptr) == TQ_OK, "dequantize of no images");
  CHECK(tq_image_add(&image, q, &image, q, TQ_NONE, &image, q, nullptr) == TQ_OK, "sum of no images");
  CHECK(tq_image_mul(&image, q, &image, q, TQ_RELU, &image, q, nullptr) == TQ_OK, "product of no images");
  CHECK(tq_image_map(&image, nullptr, &image, nullptr) == TQ_OK, "map of no images");
  CHECK(tq_image_max_pool(&image, &window, &image, nullptr) == TQ_OK, "pool of no images");
  CHECK(tq_image_avg_pool(&image, q, &window, true, 0, &image, q, nullptr) == TQ_OK, "average of no images");
  CHECK(tq_image_adaptive_avg_pool(&image, q, &image, q, nullptr) == TQ_OK, "adaptive average of no images");
  CHECK(tq_image_upsample_nearest(&image, 1.0f, 1.0f, &image, nullptr) == TQ_OK, "upsampling of no images");
  CHECK(tq_image_flatten(&image, nullptr, 128, nullptr) == TQ_OK, "flattening of no images");
  CHECK(tq_set_active_isa(tq_isa_count() - 1) == (tq_isa_usable(tq_isa_count() - 1) ? TQ_OK : TQ_UNUSABLE_ISA),
        "an instruction set is active exactly where it is usable");
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t times = argc > 1 ? std::atoll(argv[1]) : 1;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  const bool real_threads = argc > 3 && !std::strcmp(argv[3], "threads");
  check_empty_calls();
  Memory inputs, outputs;
  std::string counts;
  int64_t cases = 0;
  for (const Kind& kind : kKinds) {
    const int64_t wanted = std::max<int64_t>(1, kind.cases * times / (real_threads ? 4 : 1));
    int64_t count = 0, divided = 0;  // more cases than wanted only until one has been divided
    for (; count < wanted || (divided == 0 && count < 20 * wanted); ++count) {
      std::array<uint8_t, 512> bytes;
      for (uint8_t& b : bytes) b = static_cast<uint8_t>(random.next());
      Draw draw(bytes.data(), bytes.size());
      Trial trial{draw, inputs, outputs, real_threads};
      kind.check(trial);
      divided += trial.divided;
    }
    CHECK(divided > 0, "%s: no case was large enough for a second thread", kind.name);
    counts += (counts.empty() ? "" : ", ") + std::to_string(count) + " " + kind.name;
    cases += count;
  }
  std::printf("%ld core cases: %s\n", long(cases), counts.c_str());
  return 0;
}
