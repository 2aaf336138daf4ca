"""The same bits in forked processes and in workers of a data loader, and nothing hangs."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.scripts import run_python
from support.thread_scripts import needs_fork, needs_linux, run_script

FORKS = {
    "one_thread": """
        def work():
            torch.set_num_threads(1)
            return wrong()
        assert in_child(work) == 0
    """,
    "two_threads": """
        def work():
            torch.set_num_threads(2)
            return wrong()
        assert in_child(work) == 0
    """,
    "as_it_was": """
        assert in_child(wrong) == 0
        assert in_child(wrong) == 0
    """,
    "torch_s_own_operators": """
        x = torch.randn(500, 500)
        product, total = x @ x, torch.nn.functional.gelu(x).sum()
        def work():
            same = torch.equal(x @ x, product)
            return int(not same or not torch.allclose(torch.nn.functional.gelu(x).sum(), total))
        assert in_child(work) == 0
    """,
    "a_child_of_a_child": """
        assert in_child(lambda: wrong() + in_child(lambda: wrong() + in_child(wrong))) == 0
    """,
    "threads_in_the_child": """
        def work():
            failures = []
            pool = [threading.Thread(target=lambda: failures.append(wrong())) for _ in range(4)]
            for thread in pool: thread.start()
            for thread in pool: thread.join()
            return sum(failures) + len(pool) - len(failures)
        assert in_child(work) == 0
    """,
    "from_another_thread": """
        codes = []
        thread = threading.Thread(target=lambda: codes.append((wrong(), in_child(wrong))))
        thread.start()
        thread.join()
        assert codes == [(0, 0)]
    """,
    "many": """
        for _ in range(20):
            assert in_child(wrong) == 0
            assert wrong() == 0
    """,
    "before_any_call_of_a_thread": """
        codes = []
        thread = threading.Thread(target=lambda: codes.append(in_child(wrong)))
        thread.start()
        thread.join()
        assert codes == [0]
    """,
    "scalar": """
        with cpu.use_isa("scalar"):
            assert in_child(lambda: wrong() + (cpu.active_isa() != "scalar")) == 0
    """,
    "multiprocessing": """
        import multiprocessing
        def work(i):
            torch.set_num_threads(1 + i % 3)
            return wrong()
        with multiprocessing.get_context("fork").Pool(3) as pool:
            assert sum(pool.map(work, range(12))) == 0
    """,
}


@needs_fork
@needs_linux
@pytest.mark.parametrize("code", FORKS.values(), ids=FORKS)
def test_fork(code: str) -> None:
    """A child may use as many threads as it likes, although its parent did (csrc/cpu/fork.cpp)."""
    after = """
        assert wrong() == 0
        assert torch.get_num_threads() == 2
        print("same")
    """
    assert run_script(textwrap.dedent(code) + textwrap.dedent(after)) == "same"


@needs_linux
def test_threads_come_back_after_a_fork() -> None:
    """The parent is as parallel as before."""
    code = """
        def running():
            return set(os.listdir("/proc/self/task"))

        for _ in range(3):
            before = running()
            assert in_child(lambda: 0) == 0
            assert wrong() == 0
            assert running() - before  # new ones; the old ones may take a moment to end
        print("parallel")
    """
    assert run_script(code) == "parallel"


DATASET = """
import torch
from torchquant import ops

generator = torch.Generator().manual_seed(0)
ROWS = torch.randn(24, 300, generator=generator)
PACKED = ops.pack_weight(torch.randint(-128, 128, (2000, 300), generator=generator).to(torch.int8))
SCALE = torch.full((2000,), 0.01)

def outputs(x):
    return ops.linear_dynamic(x, PACKED, SCALE, out_features=2000, activation="silu")

class Rows(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        if self.count:
            torch.set_num_threads(self.count)
        return outputs(ROWS[i])
"""


@needs_fork
@pytest.mark.parametrize(
    ("method", "count"),
    [("fork", 0), ("fork", 2), ("spawn", 0), ("forkserver", 2)],
    ids=["fork", "fork_two_threads", "spawn", "forkserver_two_threads"],
)
def test_workers_of_a_data_loader(method: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "dataset.py").write_text(DATASET)
    main = textwrap.dedent(f"""
            import torch
            from dataset import ROWS, Rows, outputs

            if __name__ == "__main__":
                torch.set_num_threads(2)
                expected = outputs(ROWS)
                loader = torch.utils.data.DataLoader(
                    Rows({count}),
                    batch_size=4,
                    num_workers=2,
                    multiprocessing_context={method!r},
                    persistent_workers=True,
                    timeout=60,
                )
                for _ in range(2):
                    assert torch.equal(torch.cat(list(loader)), expected)
                    assert torch.equal(outputs(ROWS), expected)
                print("same")
        """)
    if method == "fork":
        result = run_python(main, folder=tmp_path)
    else:  # these methods start with the file of the module __main__
        (tmp_path / "main.py").write_text(main)
        result = subprocess.run(
            [sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=120
        )
    assert result.stdout.strip() == "same", result.stderr
