"""Scripts of threads and forks, each run in a process of its own under a time limit.

A failure of such a script could be a hang or a crash. Each script starts with SETUP: a few layers,
each with the output that it must always give.
"""

import os
import sys
import textwrap

import pytest

from support.scripts import run_python

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses libgomp")

SETUP = """
    import os, sys, threading
    import torch
    from torchquant import cpu, ops

    generator = torch.Generator().manual_seed(0)

    def make(rows, outputs, inputs):
        x = torch.randn(rows, inputs, generator=generator)
        w = torch.randint(-128, 128, (outputs, inputs), generator=generator).to(torch.int8)
        return x, ops.pack_weight(w), torch.full((outputs,), 0.01)

    made = [make(300, 200, 300), make(1, 3000, 256), make(40, 512, 384), make(2, 20, 30)]

    def layer(i):
        x, packed, scale = made[i]
        return ops.linear_dynamic(x, packed, scale, out_features=len(scale), activation="gelu")

    def wrong():
        return sum(not torch.equal(layer(i), expected[i]) for i in range(len(made)))

    torch.set_num_threads(1)
    expected = [layer(i) for i in range(len(made))]
    torch.set_num_threads(2)
    assert wrong() == 0  # threads are running from here on

    def in_child(work):
        child = os.fork()
        if child == 0:
            try:
                os._exit(work())
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(100)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run_script(code: str, timeout: float = 120, **environment: str) -> str:
    script = textwrap.dedent(SETUP) + textwrap.dedent(code)
    fresh = any(name.startswith("OMP_") for name in environment)
    environment = {**os.environ, **environment}
    result = run_python(script, environment=environment, timeout=timeout, fresh=fresh)
    assert result.returncode == 0, f"{result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()
