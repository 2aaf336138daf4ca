// A program: the steps of a chain of quantized layers, run one after the other on raw pointers.
//
//   values   images [n, h, w, c] with adjacent channels, int8 or float32; each is written by one step
//   steps    read values and write one
//   a plan   what follows from the shapes of the arguments: the shape of each value, its place in one block of memory
//            (the arena), the shapes of the results
//
// torchquant/chains/steps.py says what each step means. A step calls one function of core/torchquant_core.h; nothing is
// allocated while a program runs. Programs and plans do not change once they are made: threads may share them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "core/torchquant_core.h"

namespace torchquant::program {

struct Value {
  tq_type type;        // TQ_I8 or TQ_F32
  tq_qparams qparams;  // of int8
};

enum class Kind {
  kInput,
  kConv,
  kLinear,
  kAdd,
  kMul,
  kMap,
  kAffine,
  kNorm,
  kMaxPool,
  kAvgPool,
  kAdaptiveMaxPool,
  kAdaptiveAvgPool,
  kConcat,
  kChannels,
  kCrop,
  kPad,
  kPixelShuffle,
  kUpsample,
  kFlatten,
  kOutput
};

struct Weight {  // of a convolution or a linear layer
  const int8_t* packed = nullptr;
  const float* scale = nullptr;         // [outputs]
  const int32_t* zero_point = nullptr;  // [outputs] or null
  const float* bias = nullptr;          // [outputs] or null
  int64_t inputs = 0, outputs = 0, groups = 1;
};

struct PerChannel {              // of kAffine and kNorm
  const float* gain = nullptr;   // [count] or null
  const float* shift = nullptr;  // [count] or null
  int64_t count = 0;
};

using Pair = std::array<int64_t, 2>;  // of height and width

struct Step {
  Kind kind;
  std::vector<int32_t> inputs;  // values
  int32_t residual = -1, output = -1;
  int32_t place = 0;  // kInput: the argument; kOutput: the result
  tq_activation activation = TQ_NONE;
  Weight weight;
  PerChannel channel;
  float eps = 0;                // kNorm
  std::vector<int32_t> index;   // kChannels: the input's channel for each of the output's
  bool last = false;            // kOutput: the result is channels_last whatever the first argument is
  bool inverse = false;         // kPixelShuffle, with the factor in `factor`
  Pair begin{0, 0}, end{0, 0};  // kCrop: as in Python's slices, a negative number counts from the end
  Pair kernel{1, 1}, stride{1, 1}, before{0, 0}, after{0, 0}, dilation{1, 1};  // before, after: the padding
  bool ceil_mode = false, count_include_pad = true;
  int64_t divisor = 0;
  Pair size{0, 0};    // kAdaptive...: 0 keeps the input's; kUpsample: 0 where there is a factor
  Pair factor{1, 1};  // kUpsample, kPixelShuffle
  // kMap: 256 entries; kConcat: 256 for each input. Of int8 for int8 outputs; empty: the integers are copied.
  std::vector<std::vector<int8_t>> tables;
  std::vector<float> float_table;  // kMap with an int8 input and a float output
};

// A tensor's shape as an image. rank: 4 [n, c, h, w], 3 [n, c, w] or 2 [n, c].
struct Shape {
  int64_t n = 0, h = 1, w = 1, c = 0;
  int32_t rank = 4;
  bool operator==(const Shape& o) const { return n == o.n && h == o.h && w == o.w && c == o.c && rank == o.rank; }
  int64_t elements() const { return n * h * w * c; }
};

struct Request {  // what a plan depends on
  std::vector<Shape> arguments;
  bool channels_last = false;  // of 4-d results
  bool operator==(const Request& o) const { return channels_last == o.channels_last && arguments == o.arguments; }
};

struct Place {                                                 // where a value lies
  int32_t result = -1;                                         // in this result; -1: in the arena
  int64_t offset = 0;                                          // bytes from there
  int64_t image_stride = 0, row_stride = 0, pixel_stride = 0;  // elements; pixels are apart in a part of another value
};

struct Plan {
  Request request;
  std::vector<Shape> shapes;       // of values
  std::vector<Shape> results;      // of results
  std::vector<bool> results_last;  // whether they are channels_last whatever the first argument is
  std::vector<Place> places;       // of values
  std::vector<bool> runs;          // of steps: false where the output lies in its place already
  std::vector<int64_t> touched;    // of steps: bytes read and written, without weights
  int64_t arena_bytes = 0;
};

class Program {
 public:
  // Throws std::invalid_argument where the steps do not fit each other.
  Program(std::vector<Value> values, std::vector<Step> steps);

  const std::vector<Value>& values() const { return values_; }
  const std::vector<Step>& steps() const { return steps_; }
  int32_t arguments() const { return arguments_; }
  int32_t results() const { return results_; }
  int64_t weight_bytes() const { return weight_bytes_; }

  // Throws std::invalid_argument where a step cannot take its input's shape.
  Plan plan(const Request& request) const;

  // `arguments` and `results` have the shapes of the plan; `arena` has plan.arena_bytes bytes, aligned to 64.
  // Where an argument holds NaN or infinities, `has_nonfinite` becomes true, and the results mean nothing.
  tq_status run(const Plan& plan, const tq_image_float* arguments, const tq_image_float* results, uint8_t* arena,
                std::atomic<bool>& has_nonfinite, const tq_parallel* parallel) const;

 private:
  std::vector<Value> values_;
  std::vector<Step> steps_;
  int32_t arguments_ = 0, results_ = 0;
  std::vector<bool> quantized_;  // of arguments: an Input rounds it to integers
  int64_t weight_bytes_ = 0;
};

// The first row or column of a kCrop and how many there are, of `size`.
struct Span {
  int64_t first, count;
};
Span cropped(int64_t begin, int64_t end, int64_t size);

// The shape of a step's output; `shapes` holds those of the values before it. (program_shapes.cpp)
Shape output_shape(const Step& step, const std::vector<Shape>& shapes, const Request& request);

// Fills plan.places, runs, touched and arena_bytes. (program_memory.cpp)
void place_values(const std::vector<Value>& values, const std::vector<Step>& steps, Plan& plan);

}  // namespace torchquant::program
