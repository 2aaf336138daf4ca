// A program (core/program.h) on tensors: it holds the weights, remembers plans and memory, and divides the images of a
// call among threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "core/program.h"

namespace torchquant {

class TensorProgram {
 public:
  // `held`: the tensors whose memory the steps point to.
  TensorProgram(program::Program program, std::vector<at::Tensor> held);
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
  class Arena;

 private:
  std::shared_ptr<const Prepared> prepared(const program::Request& request, int64_t threads);
  std::unique_ptr<Arena> take_arena(int64_t bytes);
  void give_back(std::unique_ptr<Arena> arena);
  void check_held() const;

  struct Held {
    at::Tensor tensor;
    const void* data;  // of its storage
    size_t bytes;
  };

  const program::Program program_;
  std::vector<Held> held_;
  // Under the lock of programs (fork.h):
  std::vector<std::shared_ptr<const Prepared>> prepared_;  // the latest last
  std::vector<std::unique_ptr<Arena>> arenas_;             // not in use
};

}  // namespace torchquant
