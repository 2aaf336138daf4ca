// Kernels called from many threads at once: each with its own rows and panel on one shared weight, while another thread
// switches the active instruction set. For ThreadSanitizer; the results are checked too.
#include <array>
#include <atomic>
#include <thread>

#include "span_case.h"

int main(int argc, char** argv) {
  using namespace native;
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 12;
  constexpr int kThreads = 4;
  Random random(7);
  int64_t calls = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    std::array<uint8_t, 96> bytes;
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(random.next());
    Draw draw(bytes.data(), bytes.size());
    Memory memory;
    const Shape shape{1 + random.below(40), 1 + random.below(100), 1 + random.below(200)};
    Case shared = draw_case(draw, memory, &shape);
    Expected expected = expected_of(shared);
    Scratch first;
    if (!shared.raw) apply_activation(shared, first, expected);
    std::atomic<bool> stop{false};
    std::thread switching([&] {
      while (!stop)
        for (torchquant::Isa isa : torchquant::usable_isas()) torchquant::set_active_isa(isa);
    });
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t)
      threads.emplace_back([&, t] {
        Scratch scratch;
        for (int repeat = 0; repeat < 6; ++repeat) {
          Case c = shared;
          const KernelTable& table = torchquant::kernels();  // whichever is active now, until the call's end
          Panel panel;
          run(table, c.l, scratch, c.place, static_cast<uint64_t>(t * 100 + repeat), panel);
          check_rows(c, table, panel, expected);
          check_output(c, table, expected);
        }
      });
    // One output and one panel for all: two threads make the rows, then all multiply their own tiles.
    Scratch common;
    Case c = shared;
    const KernelTable& table =
        table_of(torchquant::usable_isas()[static_cast<size_t>(round) % torchquant::usable_isas().size()]);
    Panel panel;
    run(table, c.l, common, c.place, 0, panel);  // allocates
    const int64_t tiles = torchquant::num_tiles(c.l.n), unit = tile_unit(table), half = std::min(c.l.m, c.l.m / 2);
    std::thread rows([&] { make_rows(table, c.l, panel, 0, half); });
    make_rows(table, c.l, panel, half, c.l.m);
    rows.join();
    std::vector<std::thread> columns;
    for (int64_t tile = 0; tile < tiles; tile += unit)
      columns.emplace_back([&, tile] { multiply(table, c.l, panel, tile, std::min(tiles, tile + unit)); });
    for (std::thread& thread : columns) thread.join();
    check_output(c, table, expected);
    for (std::thread& thread : threads) thread.join();
    stop = true;
    switching.join();
    calls += 6 * kThreads + 1;
  }
  std::printf("%ld calls from %d threads\n", long(calls), kThreads);
  return 0;
}
