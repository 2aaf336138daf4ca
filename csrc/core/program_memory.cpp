// Where the values of a program lie: values whose lives do not meet share memory.
//
// A block is a stretch of memory with a life: the steps from the first that writes it to the last that reads it. Most
// values have a block of their own. Some lie in another value's block, so that nothing is copied: the parts of a
// concatenation that have its qparams, a concatenation of parts that lie side by side already, adjacent channels or
// pixels of another value, and the output of kFlatten where no pixel changes its place. A value that is a result lies in
// the result's tensor.
#include <algorithm>
#include <numeric>

#include "core/program.h"

namespace torchquant::program {
namespace {

constexpr int64_t kLine = 64;  // a block begins on a cache line, and kernels may read a line beyond its end

struct Block {
  int64_t bytes = 0;
  int32_t first = 0, last = 0;  // steps
  int32_t result = -1;
  int64_t offset = 0;
};

struct Home {  // of a value: in which value's block it lies, how far from its beginning
  int32_t owner;
  int64_t offset;  // bytes
  int64_t image_stride, row_stride, pixel_stride;
};

Home own_home(int32_t value, const Shape& s) { return {value, 0, s.h * s.w * s.c, s.w * s.c, s.c}; }

bool is_adjacent(const std::vector<int32_t>& channels) {
  for (size_t i = 1; i < channels.size(); ++i)
    if (channels[i] != channels[0] + static_cast<int32_t>(i)) return false;
  return !channels.empty();
}

int64_t bytes_of(const Value& value, const Shape& shape) { return shape.elements() * (value.type == TQ_F32 ? 4 : 1); }

bool is_held(const tq_qparams& a, const tq_qparams& b) {  // an integer of a is the same number in b
  return a.scale == b.scale && a.zero_point == b.zero_point && a.qmin >= b.qmin && a.qmax <= b.qmax;
}

// The pixels of a result [n, c, h, w] lie as those of a value do.
bool dense_in(const Shape& s, bool channels_last) {
  return (s.rank == 4 && channels_last) || s.c == 1 || (s.h == 1 && s.w == 1);
}

// Blocks of the arena one above the other, the largest first, each at the least offset that is free for its whole life.
int64_t stack_blocks(std::vector<Block*> blocks) {
  std::stable_sort(blocks.begin(), blocks.end(), [](const Block* a, const Block* b) { return a->bytes > b->bytes; });
  std::vector<const Block*> placed;
  int64_t height = 0;
  for (Block* block : blocks) {
    int64_t offset = 0;
    for (const Block* other : placed) {  // sorted by offset
      const bool meet = block->first <= other->last && other->first <= block->last;
      if (!meet || other->offset + other->bytes <= offset) continue;
      if (offset + block->bytes <= other->offset) break;
      offset = other->offset + other->bytes;
    }
    block->offset = offset;
    height = std::max(height, offset + block->bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), block,
                                   [](const Block* a, const Block* b) { return a->offset < b->offset; }),
                  block);
  }
  return height;
}

}  // namespace

void place_values(const std::vector<Value>& values, const std::vector<Step>& steps, Plan& plan) {
  const auto at = [](int32_t i) { return static_cast<size_t>(i); };
  std::vector<Home> homes(values.size());
  std::vector<int32_t> writer(values.size(), 0);
  for (size_t v = 0; v < values.size(); ++v) homes[v] = own_home(static_cast<int32_t>(v), plan.shapes[v]);
  const auto is_free = [&](int32_t v) { return homes[at(v)].owner == v; };

  const auto element = [&](int32_t v) { return values[at(v)].type == TQ_F32 ? int64_t{4} : int64_t{1}; };

  // Values in the block of a later one: the parts of concatenations. From the last step to the first, so that a part
  // that is a concatenation itself takes its parts along. Where the parts lie side by side already, in a later
  // concatenation that has them too, the whole lies there.
  plan.runs.assign(steps.size(), true);
  for (size_t i = 0; i < steps.size(); ++i)
    if (steps[i].output >= 0) writer[at(steps[i].output)] = static_cast<int32_t>(i);
  const auto can_move = [&](int32_t v) {  // its step can write pixels that are apart, or computes nothing
    const Kind kind = steps[at(writer[at(v)])].kind;
    return is_free(v) && kind != Kind::kFlatten && kind != Kind::kNorm && kind != Kind::kCrop &&
           !(kind == Kind::kChannels && is_adjacent(steps[at(writer[at(v)])].index));
  };
  const auto held = [&](int32_t part, int32_t whole) {
    const Value &a = values[at(part)], &b = values[at(whole)];
    return a.type == b.type && (a.type == TQ_F32 || is_held(a.qparams, b.qparams));
  };
  for (size_t i = steps.size(); i-- > 0;) {
    const Step& step = steps[i];
    if (step.kind != Kind::kConcat) continue;
    const Home first = homes[at(step.inputs[0])];
    bool side_by_side = is_free(step.output) && !is_free(step.inputs[0]);
    int64_t channel = 0;
    for (const int32_t part : step.inputs) {
      const Home& home = homes[at(part)];
      side_by_side = side_by_side && held(part, step.output) && home.owner == first.owner &&
                     home.offset == first.offset + channel * element(part) && home.pixel_stride == first.pixel_stride &&
                     home.row_stride == first.row_stride && home.image_stride == first.image_stride;
      channel += plan.shapes[at(part)].c;
    }
    if (side_by_side) {
      homes[at(step.output)] = first;
      plan.runs[i] = false;
      continue;
    }
    const Home whole = homes[at(step.output)];
    channel = 0;
    for (const int32_t part : step.inputs) {
      if (held(part, step.output) && can_move(part)) {
        homes[at(part)] = whole;
        homes[at(part)].offset += channel * element(part);
      }
      channel += plan.shapes[at(part)].c;
    }
  }
  // Values in the block of an earlier one: adjacent channels, a part of the pixels, flattened images of one pixel.
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    if (step.output < 0 || step.inputs.empty() || !is_free(step.output)) continue;
    const Shape& in = plan.shapes[at(step.inputs[0])];
    Home home = homes[at(step.inputs[0])];
    if (step.kind == Kind::kChannels && is_adjacent(step.index)) {
      home.offset += step.index[0] * element(step.output);
    } else if (step.kind == Kind::kCrop) {
      const Span rows = cropped(step.begin[0], step.end[0], in.h), columns = cropped(step.begin[1], step.end[1], in.w);
      home.offset += (rows.first * home.row_stride + columns.first * home.pixel_stride) * element(step.output);
    } else if (step.kind == Kind::kFlatten) {
      const bool moves = in.h * in.w > 1 && (in.c > 1 || home.pixel_stride != 1 || home.row_stride != in.w);
      if (moves) continue;
      home.row_stride = home.pixel_stride = in.h * in.w * in.c;
    } else {
      continue;
    }
    homes[at(step.output)] = home;
    plan.runs[i] = false;
  }

  // Lives of blocks.
  std::vector<Block> blocks(values.size());
  std::vector<bool> used(values.size(), false);
  const auto touch = [&](int32_t value, size_t step) {
    const size_t owner = at(homes[at(value)].owner);
    Block& block = blocks[owner];
    const int32_t now = static_cast<int32_t>(step);
    if (!used[owner]) block.first = block.last = now;
    used[owner] = true;
    block.first = std::min(block.first, now);
    block.last = std::max(block.last, now);
  };
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    int64_t touched = 0;
    for (const int32_t value : step.inputs) {
      touch(value, i);
      touched += bytes_of(values[at(value)], plan.shapes[at(value)]);
    }
    for (const int32_t value : {step.residual, step.output}) {
      if (value < 0) continue;
      touch(value, i);
      touched += bytes_of(values[at(value)], plan.shapes[at(value)]);
    }
    plan.touched.push_back(touched);
  }

  // Float values that are results lie there.
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    if (step.kind != Kind::kOutput) continue;
    const int32_t value = step.inputs[0];
    Block& block = blocks[at(value)];
    const bool alone = is_free(value) && values[at(value)].type == TQ_F32 && block.result < 0;
    if (!alone || !dense_in(plan.shapes[at(value)], plan.request.channels_last || step.last)) continue;
    block.result = step.place;
    plan.runs[i] = false;
  }

  std::vector<Block*> arena;
  for (size_t v = 0; v < values.size(); ++v) {
    if (!used[v] || !is_free(static_cast<int32_t>(v))) continue;
    blocks[v].bytes = (bytes_of(values[v], plan.shapes[v]) + kLine - 1) / kLine * kLine + kLine;
    if (blocks[v].result < 0) arena.push_back(&blocks[v]);
  }
  plan.arena_bytes = stack_blocks(arena);
  plan.places.resize(values.size());
  for (size_t v = 0; v < values.size(); ++v) {
    const Block& block = blocks[at(homes[v].owner)];
    const Home& home = homes[v];
    plan.places[v] = {block.result, block.offset + home.offset, home.image_stride, home.row_stride, home.pixel_stride};
  }
}

}  // namespace torchquant::program
