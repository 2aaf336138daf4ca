// A program (core/program.h) on tensors: it holds the weights, remembers plans and memory, and divides the images of a
// call among threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "core/program.h"
#include "cpu/arenas.h"
#include "cpu/held.h"

namespace torchquant {

class TensorProgram {
 public:
  // `held`: the tensors whose memory the steps point to.
  TensorProgram(program::Program program, const std::vector<at::Tensor>& held);
  ~TensorProgram();

  // The results, or nothing where an argument holds NaN or infinities. Arguments are float32 on the CPU. Threads may
  // call it at the same time. Throws std::invalid_argument where the arguments do not fit, or a held tensor has other
  // memory than when the program was made.
  std::optional<std::vector<at::Tensor>> run(const std::vector<at::Tensor>& arguments);

  // For comparisons: whether loops inside a program run on a team (cpu/team.h) or each in a region of its own.
  std::atomic<bool> uses_team{true};
  // How many images go through the program together; 0: what is probably fastest.
  std::atomic<int64_t> images_together{0};

  // Bytes of the arena for one image of these shapes.
  int64_t arena_bytes(const std::vector<at::Tensor>& arguments);

  struct Prepared;  // the plans of one kind of call

 private:
  std::shared_ptr<const Prepared> prepared(const program::Request& request, int64_t threads);
  void check_held() const;

  const program::Program program_;
  const HeldTensors held_;
  std::vector<std::shared_ptr<const Prepared>> prepared_;  // the latest last; under the lock of programs (fork.h)
  Arenas arenas_;
};

}  // namespace torchquant
