"""Fused models in several threads, and in children of a fork."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import torchquant

transformers = pytest.importorskip("transformers")

from support.decoders import IDS, logits, model  # noqa: E402
from support.thread_scripts import needs_fork  # noqa: E402

from torchquant.integrations.transformers import decoder_check, decoder_forward  # noqa: E402
from torchquant.integrations.transformers.decoder_forward import FusedForward  # noqa: E402


def test_threads_are_in_a_step_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    expected = logits(net)
    both, run = threading.Barrier(2), FusedForward.run

    def together(*given: Any) -> Any:
        both.wait(20)
        return run(*given)

    monkeypatch.setattr(FusedForward, "run", together)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(x, expected) for x in pool.map(lambda _: logits(net), range(2)))


@needs_fork
@pytest.mark.parametrize("place", ["run", "check"])
def test_a_fork_while_another_thread_steps_or_compares(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model()
    torchquant.fuse_decoder_(net)
    inside, release, main = threading.Event(), threading.Event(), threading.current_thread()

    def blocking(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            if threading.current_thread() is not main:
                inside.set()
                assert release.wait(60)
            return function(*given)

        return call

    if place == "run":
        monkeypatch.setattr(FusedForward, "run", blocking(FusedForward.run))
    else:
        monkeypatch.setattr(decoder_forward, "check", blocking(decoder_forward.check))
        with torch.no_grad():
            net.model.layers[0].input_layernorm.weight.mul_(2)  # it is compared again

    def child() -> None:
        assert logits(net).isfinite().all()

    process = torch.multiprocessing.get_context("fork").Process(target=child)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(logits, net)
        try:
            assert inside.wait(30)
            process.start()
            process.join(30)
            assert process.exitcode == 0  # None: it waits
        finally:
            process.kill()
            release.set()
        assert other.result().isfinite().all()


def test_a_comparison_does_not_record_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    own_forward = decoder_check.own_forward

    @torch.no_grad()
    def elsewhere() -> None:
        own_forward(net.model)(input_ids=IDS)

    def with_another(decoder: Any) -> Any:
        def call(**given: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(elsewhere).result()
            return own_forward(decoder)(**given)

        return call

    monkeypatch.setattr(decoder_check, "own_forward", with_another)
    assert repr(torchquant.fuse_decoder_(net)) == "<DecoderReport: 2 of 2 blocks fused>"
