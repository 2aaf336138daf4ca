// Target for a coverage-guided fuzzer: bytes -> one layer, span or norm -> every instruction set against the reference.
// With clang: -fsanitize=fuzzer. With any other compiler fuzz_driver.cpp brings the main function.
#include "norm_case.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace native;
  static Memory memory;
  static Scratch scratch, span_inputs;
  Draw draw(data, size);
  const uint32_t kind = draw.byte();
  if (kind % 4 == 3) {
    if (kind % 16 == 11) check_norm(draw, span_inputs, scratch);
    else if (kind % 8 == 3) check_span(draw, span_inputs, scratch);
    else check_activation(draw, span_inputs, scratch);
    return 0;
  }
  Case c = draw_case(draw, memory);
  if (c.l.m * c.l.n * c.l.k > 1 << 18) return -1;  // too slow to be worth it: not for the corpus
  check_case(c, scratch, kind);
  return 0;
}
