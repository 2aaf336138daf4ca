"""A trace changes nothing, neither in the model nor for other threads."""

import threading

import torch
from support import floats
from support.fusions import Block, assert_fused
from torch import Tensor

from torchquant.graph.trace import forward_traces


def test_a_trace_changes_nothing() -> None:
    class Stateful(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.seen: list[Tensor] = []
            self.last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            self.seen.append(x)
            x = x + torch.rand(())
            self.extra = self.up
            return super().forward(x)

    model = Stateful()
    before = {**model.__dict__}
    modules = {**model._modules}
    state = torch.get_rng_state()
    traces = forward_traces(model)
    assert all(trace.failure is None for trace in traces)
    assert model.__dict__ == before
    assert model._modules == modules
    assert (model.seen, model.last) == ([], None)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_buffer_is_not_changed_in_place() -> None:
    class Counter(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return super().forward(x)

    model = Counter()
    assert_fused(model, floats(3, 64))
    assert model.count == 1


def test_other_threads_may_run_models_meanwhile() -> None:
    other, x, errors = Block().eval(), floats(3, 64), []
    expected, stop = other(x), threading.Event()

    def serve() -> None:
        try:
            while not stop.is_set():
                assert torch.equal(other(x), expected)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(20):
        forward_traces(Block())
    stop.set()
    thread.join()
    assert not errors
