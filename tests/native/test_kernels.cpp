// The kernels without torch, shape class by shape class: every instruction set of this machine against a naive
// reference, in memory that ends at (or begins behind) an unmapped page. Arguments: how many times (1), the seed (0).
#include <array>
#include <cstddef>

#include "attention_float_case.h"

namespace {

using namespace native;

// A case's decisions, drawn.
std::array<uint8_t, 96> decisions(Random& random) {
  std::array<uint8_t, 96> bytes;
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(random.next());
  return bytes;
}

std::vector<Shape> shapes(int64_t times) {
  std::vector<Shape> all;
  for (int64_t size = 1; size <= 20; ++size) {
    all.push_back({size, 17, 33});
    all.push_back({3, size, 65});
    all.push_back({5, 18, size});
    all.push_back({1 + size * 7 % 20, 1 + size * 3 % 20, 1 + size * 11 % 20});
  }
  for (int64_t power = 2; power <= 512; power *= 2)
    for (int64_t step = -1; step <= 1; ++step) {
      all.push_back({2, 19, power + step});
      all.push_back({power < 200 ? power + step : 1, 20, 70});
      all.push_back({7, power + step, 33});
    }
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97})
    for (int64_t tiles : {1, 2, 3, 4, 5, 7, 8, 9}) all.push_back({rows, 16 * tiles - rows % 3, 67});  // register tiles
  std::vector<Shape> repeated;
  for (int64_t i = 0; i < times; ++i) repeated.insert(repeated.end(), all.begin(), all.end());
  for (int64_t rows : {1, 2, 5, 13, 25, 33, 49, 50, 100})  // more than one slice of K, chunk of rows, pair of blocks
    for (int64_t inputs : {511, 512, 513, 1025, 1600}) repeated.push_back({rows, 16 + rows, inputs});
  for (Shape deep : {Shape{2, 3, 33024}, {3, 2, 33025}, {2, 17, 33026}, {1, 5, 65728}, {2, 2, 65729}, {1, 1, 65793}})
    repeated.push_back(deep);
  return repeated;
}

// Every instruction set of this build has its name, its sizes and every kernel, whether this machine can run it or not.
void check_tables() {
  for (torchquant::Isa isa : torchquant::built_isas()) {
    const KernelTable& table = table_of(isa);
    const char* name = torchquant::isa_name(isa);
    CHECK(!std::strcmp(table.name, name), "the table of %s has the name %s", name, table.name);
    CHECK(table.panel_rows > 0 && table.row_block > 0 && table.tile_block > 0 && table.products_per_ns > 0,
          "%s: a size is missing", name);
    CHECK(table.panel_offset == 0 || table.panel_offset == 128, "%s: panel_offset is %d", name, table.panel_offset);
    int64_t kernels = 0;
#define NATIVE_CHECK_KERNEL(kernel, ...)                   \
  CHECK(table.kernel != nullptr, "%s: no " #kernel, name); \
  ++kernels;
    TQ_KERNELS(NATIVE_CHECK_KERNEL)
#undef NATIVE_CHECK_KERNEL
    // No field outside the list, which nothing would fill: the kernels are the end of the table.
    const int64_t first = offsetof(KernelTable, quantize_rows), size = sizeof(KernelTable);
    CHECK(first + kernels * int64_t{sizeof(void (*)())} == size, "KernelTable has %ld bytes for %ld kernels",
          long(size - first), long(kernels));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t times = argc > 1 ? std::atoll(argv[1]) : 1;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  check_tables();
  std::string names;
  for (torchquant::Isa isa : torchquant::usable_isas()) names += std::string(" ") + torchquant::isa_name(isa);
  Memory memory;
  Scratch scratch;
  int64_t cases = 0, spans = 0;
  for (const Shape& shape : shapes(times)) {
    const auto bytes = decisions(random);
    Draw draw(bytes.data(), bytes.size());
    Case c = draw_case(draw, memory, &shape);
    check_case(c, scratch, random.next());
    ++cases;
  }
  Scratch span_inputs;
  for (; spans < 2000 * times; ++spans) {
    const auto bytes = decisions(random);
    Draw draw(bytes.data(), bytes.size());
    if (spans % 2) check_span(draw, span_inputs, scratch);
    else check_activation(draw, span_inputs, scratch);
  }
  int64_t norms = 0;
  for (; norms < 1000 * times; ++norms) {
    const auto bytes = decisions(random);
    Draw draw(bytes.data(), bytes.size());
    check_norm(draw, span_inputs, scratch);
  }
  int64_t heads = 0;
  for (; heads < 600 * times; ++heads) {
    const auto bytes = decisions(random);
    Draw draw(bytes.data(), bytes.size());
    if (heads % 2) check_float_attention(draw, span_inputs, scratch);
    else check_rotation(draw, span_inputs, scratch);
  }
  std::printf("%ld linear cases, %ld spans, %ld norms and %ld heads, each on%s\n", long(cases), long(spans),
              long(norms), long(heads), names.c_str());
  return 0;
}
