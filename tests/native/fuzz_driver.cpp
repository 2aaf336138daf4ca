// libFuzzer's main function for compilers without it: the same options, inputs from a generator instead of from
// coverage. Inputs are new, or earlier ones with a few bytes changed.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

#include "draw.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

double option(int argc, char** argv, const char* name, double otherwise) {
  for (int i = 1; i < argc; ++i)
    if (!std::strncmp(argv[i], name, std::strlen(name))) return std::atof(argv[i] + std::strlen(name));
  return otherwise;
}

std::vector<uint8_t> next_input(native::Random& random, std::vector<std::vector<uint8_t>>& kept) {
  std::vector<uint8_t> input;
  if (kept.empty() || random.one_in(2)) {
    input.resize(static_cast<size_t>(1 + random.below(64)));
    for (uint8_t& b : input) b = static_cast<uint8_t>(random.next());
  } else {
    input = kept[static_cast<size_t>(random.below(static_cast<int64_t>(kept.size())))];
    for (int64_t i = random.below(4); i >= 0; --i)
      input[static_cast<size_t>(random.below(static_cast<int64_t>(input.size())))] =
          static_cast<uint8_t>(random.next());
  }
  if (kept.size() < 256) kept.push_back(input);
  else kept[static_cast<size_t>(random.below(256))] = input;
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (argv[i][0] == '-') continue;
    std::ifstream file(argv[i], std::ios::binary);  // a finding, to run again
    const std::vector<char> content{std::istreambuf_iterator<char>(file), {}};
    if (!content.empty()) LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(content.data()), content.size());
  }
  const double seconds = option(argc, argv, "-max_total_time=", 10), runs = option(argc, argv, "-runs=", -1);
  native::Random random(static_cast<uint64_t>(option(argc, argv, "-seed=", 1)));
  std::vector<std::vector<uint8_t>> kept;
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  long cases = 0;
  for (; cases != static_cast<long>(runs) && std::chrono::steady_clock::now() < until; ++cases) {
    const std::vector<uint8_t> input = next_input(random, kept);
    std::ofstream("last-input", std::ios::binary)
        .write(reinterpret_cast<const char*>(input.data()), long(input.size()));
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("Done %ld runs, drawn at random\n", cases);
  return 0;
}
