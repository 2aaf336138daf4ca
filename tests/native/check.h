// A check that stops the program: under a fuzzer, an abort is a finding.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace native {

[[noreturn, gnu::format(printf, 3, 4)]] inline void fail(const char* file, int line, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "%s:%d: ", file, line);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::abort();
}

}  // namespace native

#define CHECK(condition, ...) ((condition) ? (void)0 : ::native::fail(__FILE__, __LINE__, __VA_ARGS__))
