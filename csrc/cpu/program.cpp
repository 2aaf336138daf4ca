#include "cpu/program.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#include "core/threads.h"
#include "cpu/core_call.h"
#include "cpu/fork.h"
#include "cpu/team.h"

namespace torchquant {

using program::Plan;
using program::Request;
using program::Shape;

// The images of a call go through the program in groups of `together`, the last group may be smaller.
struct TensorProgram::Prepared {
  Request request;
  int64_t threads, images_together;  // asked for
  int64_t together = 1, groups = 0;
  bool apart = false;       // every thread runs groups of its own, otherwise all threads share each group
  Plan whole, group, last;  // whole: of all images, for the results' shapes

  // Blocks are stacked greedily, so the plan of fewer images can need more memory.
  int64_t arena_bytes() const { return std::max(group.arena_bytes, last.arena_bytes); }
};

namespace {

constexpr size_t kPlans = 16;             // remembered
constexpr int64_t kCacheBytes = 1 << 20;  // half of a common second-level cache
constexpr int64_t kStepBytes = 1 << 14;   // what memory could deliver while a step is set up
constexpr int64_t kMostTogether = 64;

Request with_images(Request request, int64_t n) {
  for (Shape& s : request.arguments) s.n = n;
  return request;
}

bool same_count(const Request& request) {
  return std::all_of(request.arguments.begin(), request.arguments.end(),
                     [&](const Shape& s) { return s.n == request.arguments[0].n; });
}

// How many images to run together: few, so that values stay in the cache; many, so that weights are read seldom.
int64_t choose_together(const program::Program& program, const Plan& one, int64_t most) {
  const auto traffic = [&](int64_t images) {  // bytes for one image
    int64_t total = static_cast<int64_t>(program.steps().size()) * kStepBytes / images;
    if (program.weight_bytes() > kCacheBytes) total += program.weight_bytes() / images;
    for (const int64_t touched : one.touched) total += touched * images > kCacheBytes ? touched : 0;
    return total;
  };
  int64_t best = 1;
  for (int64_t images = 2; images <= std::min(most, kMostTogether); images *= 2)
    if (traffic(images) < traffic(best)) best = images;
  return best;
}

Shape shape_of(const at::Tensor& t, size_t argument) {
  const auto refuse = [&](const std::string& wanted) {
    throw std::invalid_argument("Program.run: argument " + std::to_string(argument) + " must be " + wanted + ", got " +
                                describe(t));
  };
  if (t.scalar_type() != at::kFloat || !t.is_cpu() || t.layout() != at::kStrided) refuse("a float32 tensor on the CPU");
  switch (t.dim()) {
    case 2: return {t.size(0), 1, 1, t.size(1), 2};
    case 3: return {t.size(0), 1, t.size(2), t.size(1), 3};
    case 4: return {t.size(0), t.size(2), t.size(3), t.size(1), 4};
    default: refuse("[n, c], [n, c, l] or [n, c, h, w]");
  }
  return {};
}

bool is_channels_last(const at::Tensor& t) {
  return t.dim() == 4 && t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

// One image after the other without gaps: contiguous or channels_last.
at::Tensor in_order(const at::Tensor& t) {
  if (t.is_contiguous() || (t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast))) return t;
  return is_channels_last(t) ? t.contiguous(at::MemoryFormat::ChannelsLast) : t.contiguous();
}

tq_image_float image_of(const at::Tensor& t, void* data) {
  tq_image_float i{};
  i.data = data;
  i.type = TQ_F32;
  i.n = t.size(0);
  i.c = t.size(1);
  i.h = i.w = 1;
  i.image_stride = t.stride(0);
  i.channel_stride = t.stride(1);
  if (t.dim() == 4) {
    i.h = t.size(2);
    i.row_stride = t.stride(2);
  }
  if (t.dim() >= 3) {
    i.w = t.size(-1);
    i.pixel_stride = t.stride(-1);
  }
  return i;
}

std::vector<at::Tensor> empty_results(const Plan& plan) {
  std::vector<at::Tensor> results;
  for (size_t i = 0; i < plan.results.size(); ++i) {
    const Shape& s = plan.results[i];
    const bool last = plan.request.channels_last || plan.results_last[i];
    const auto options = at::TensorOptions(at::kFloat);
    if (s.rank == 2) results.push_back(at::empty({s.n, s.c}, options));
    else if (s.rank == 3) results.push_back(at::empty({s.n, s.c, s.w}, options));
    else
      results.push_back(at::empty({s.n, s.c, s.h, s.w}, options,
                                  last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
  }
  return results;
}

using Images = c10::SmallVector<tq_image_float, 4>;

Images part_of(const Images& images, int64_t first, int64_t count) {
  Images parts = images;
  for (tq_image_float& i : parts) {
    i.data = static_cast<float*>(i.data) + first * i.image_stride;
    i.n = count;
  }
  return parts;
}

}  // namespace

TensorProgram::TensorProgram(program::Program program, const std::vector<at::Tensor>& held)
    : program_(std::move(program)), held_(held) {}

void TensorProgram::check_held() const {
  if (held_.unchanged()) return;
  throw std::invalid_argument(
      "Program.run: the tensors of the layers must keep their memory, but that of one was replaced; make the program "
      "again");
}

TensorProgram::~TensorProgram() = default;

std::shared_ptr<const TensorProgram::Prepared> TensorProgram::prepared(const Request& request, int64_t threads) {
  const int64_t asked = images_together;
  {
    const std::lock_guard<std::mutex> lock(program_mutex());
    for (size_t i = prepared_.size(); i-- > 0;) {
      const auto& p = prepared_[i];
      if (p->threads != threads || p->images_together != asked || !(p->request == request)) continue;
      std::rotate(prepared_.begin() + static_cast<int64_t>(i), prepared_.begin() + static_cast<int64_t>(i) + 1,
                  prepared_.end());
      return prepared_.back();
    }
  }
  auto made = std::make_shared<Prepared>();
  made->request = request;
  made->threads = threads;
  made->images_together = asked;
  made->whole = program_.plan(request);
  const int64_t n = request.arguments[0].n;
  if (n > 0 && same_count(request)) {
    made->apart = threads > 1 && n >= threads && (n >= 2 * threads || n % threads == 0);
    const int64_t share = made->apart ? n / threads : n;
    const Plan one = program_.plan(with_images(request, 1));
    int64_t together = asked > 0 ? std::min(asked, n) : choose_together(program_, one, share);
    if (threads > 1 && !made->apart && asked == 0) together = n;
    int64_t groups = (n + together - 1) / together;
    if (made->apart && asked == 0) {  // the same number of groups for each thread
      groups = (groups + threads - 1) / threads * threads;
      together = (n + groups - 1) / groups;
      groups = (n + together - 1) / together;
    }
    made->together = together;
    made->groups = groups;
    made->group = program_.plan(with_images(request, together));
    made->last = program_.plan(with_images(request, n - (groups - 1) * together));
  } else if (!same_count(request)) {  // arguments of different counts: a step has refused them, or they do not meet
    made->together = n;
    made->groups = 1;
    made->group = made->last = made->whole;
  }
  const std::lock_guard<std::mutex> lock(program_mutex());
  if (prepared_.size() == kPlans) prepared_.erase(prepared_.begin());
  prepared_.push_back(made);
  return made;
}

std::optional<std::vector<at::Tensor>> TensorProgram::run(const std::vector<at::Tensor>& given) {
  check_held();
  if (static_cast<int64_t>(given.size()) != program_.arguments()) {
    throw std::invalid_argument("Program.run: inputs must be " + std::to_string(program_.arguments()) +
                                " tensors, got " + std::to_string(given.size()));
  }
  Request request;
  std::vector<at::Tensor> arguments;
  Images from, to;
  for (size_t i = 0; i < given.size(); ++i) {
    request.arguments.push_back(shape_of(given[i], i));
    arguments.push_back(in_order(given[i]));
    from.push_back(image_of(arguments.back(), const_cast<void*>(arguments.back().const_data_ptr())));
  }
  request.channels_last = is_channels_last(given[0]);
  const int64_t threads = std::max<int64_t>(1, torch_threads(nullptr));
  const std::shared_ptr<const Prepared> p = prepared(request, threads);
  std::vector<at::Tensor> results = empty_results(p->whole);
  for (const at::Tensor& t : results) to.push_back(image_of(t, t.mutable_data_ptr()));

  std::atomic<bool> has_nonfinite{false};
  const auto run_group = [&](int64_t i, uint8_t* arena, const tq_parallel* parallel) {
    const bool is_last = i + 1 == p->groups;
    const Plan& plan = is_last ? p->last : p->group;
    const int64_t first = i * p->together;
    const bool split = p->groups > 1;
    const int64_t count = is_last ? request.arguments[0].n - first : p->together;
    const Images x = split ? part_of(from, first, count) : from, y = split ? part_of(to, first, count) : to;
    check_status(program_.run(plan, x.data(), y.data(), arena, has_nonfinite, parallel));
  };
  const auto run_groups = [&](const tq_parallel* parallel) {
    std::unique_ptr<Arena> arena = arenas_.take(p->arena_bytes());
    for (int64_t i = 0; i < p->groups && !has_nonfinite; ++i) run_group(i, arena->data(), parallel);
    arenas_.give_back(std::move(arena));
  };
  if (p->groups == 0) return results;
  if (p->apart) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t /*first*/, int64_t /*last*/) {
      std::unique_ptr<Arena> arena = arenas_.take(p->arena_bytes());
      for (int64_t i = next++; i < p->groups && !has_nonfinite; i = next++) run_group(i, arena->data(), nullptr);
      arenas_.give_back(std::move(arena));
    });
  } else if (uses_team) {
    with_team(run_groups);
  } else {
    run_groups(threads > 1 ? &kTorchThreads : nullptr);
  }
  if (has_nonfinite) return std::nullopt;
  return results;
}

int64_t TensorProgram::arena_bytes(const std::vector<at::Tensor>& arguments) {
  Request request;
  for (size_t i = 0; i < arguments.size(); ++i) request.arguments.push_back(shape_of(arguments[i], i));
  return program_.plan(with_images(request, 1)).arena_bytes;
}

}  // namespace torchquant
