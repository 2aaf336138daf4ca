"""The choice of kernel configurations: verified, measured once, kept in a file. No GPU needed."""

import json
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.scripts import run_python

import torchquant
from torchquant import cuda
from torchquant.triton.tuning import choose as tuning
from torchquant.triton.tuning.file import FORMAT, TuningFile, cache_folder

ENVIRONMENT = {"device": "NVIDIA Made-up 1", "capability": "9.0", "triton": "3", "sources": "0"}
RIGHT = torch.arange(6, dtype=torch.float32)


@dataclass(frozen=True)
class Config:
    name: str
    block: int = 64


FAST, SLOW, WRONG, BROKEN = Config("fast"), Config("slow"), Config("wrong"), Config("broken")
DEFAULT = Config("default")
SECONDS = {"fast": 1e-3, "slow": 2e-3, "wrong": 1e-6, "default": 5e-3}


class Trial:
    """An operation with known times and faults; counts what is asked of it."""

    def __init__(self, *options, oom_in=None, error=None):
        self.options = list(options)
        self.oom_in, self.error = oom_in, error
        self.ran, self.timed, self.references = [], [], 0

    def reference(self):
        self.references += 1
        if self.oom_in == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return RIGHT

    def run(self, config):
        self.ran.append(config)
        if self.oom_in == "run":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        if self.error is not None:
            raise self.error
        if config == BROKEN:
            raise RuntimeError("out of resource: shared memory, Required: 300000")
        return RIGHT.nextafter(RIGHT + 1) if config == WRONG else RIGHT.clone()

    def timer(self, call):
        call()
        self.timed.append(self.ran[-1])
        return SECONDS[self.ran[-1].name]

    def tuner(self, folder=None):
        return tuning.Tuner(folder and TuningFile(folder, ENVIRONMENT), self.timer)

    def choose(self, tuner, problem="linear 8x16x32"):
        return tuner.choose(
            problem,
            candidates=lambda: self.options,
            default=lambda: DEFAULT,
            run=self.run,
            reference=self.reference,
        )


def contents(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


# ---------------------------------------------------------------- the choice


def test_the_fastest_wins_and_is_measured_once():
    trial = Trial(SLOW, FAST, SLOW)
    tuner = trial.tuner()
    assert trial.choose(tuner) == FAST
    assert trial.timed == [SLOW, FAST], "each candidate once, however often it is listed"
    assert trial.choose(tuner) == FAST
    assert trial.references == 1
    assert trial.choose(tuner, "another problem") == FAST
    assert trial.references == 2


def test_a_wrong_candidate_is_excluded_and_named():
    trial = Trial(SLOW, WRONG)
    with pytest.warns(RuntimeWarning, match=r"wrong numbers .*name='wrong'.*6 of 6 elements diff"):
        assert trial.choose(trial.tuner()) == SLOW
    assert WRONG not in trial.timed


def test_none_where_no_candidate_is_right():
    trial = Trial(WRONG)
    tuner = trial.tuner()
    with pytest.warns(RuntimeWarning, match="wrong numbers"):
        assert trial.choose(tuner) is None
    assert trial.choose(tuner) is None, "and it is not measured again"
    assert trial.references == 1


def test_a_candidate_that_does_not_compile_is_left_out_silently():
    trial = Trial(BROKEN, SLOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trial.choose(trial.tuner()) == SLOW


def test_the_error_passes_where_nothing_runs():
    trial = Trial(BROKEN)
    with pytest.raises(RuntimeError, match="out of resource"):
        trial.choose(trial.tuner())


@pytest.mark.parametrize("where", ["reference", "run"])
def test_out_of_memory_gives_the_default_and_one_message(where, tmp_path):
    trial = Trial(FAST, oom_in=where)
    tuner = trial.tuner(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"out of GPU memory .* takes the default") as caught:
        assert trial.choose(tuner) == DEFAULT
        assert trial.choose(tuner) == DEFAULT
        assert trial.choose(tuner, "another problem") == DEFAULT
    assert len(caught) == 1
    assert not list(tmp_path.glob("*.json")), "the next process, with more memory, measures"


def test_errors_of_the_device_pass():
    trial = Trial(FAST, SLOW, error=torch.AcceleratorError("CUDA error: illegal address"))
    with pytest.raises(torch.AcceleratorError):
        trial.choose(trial.tuner())
    assert len(trial.ran) == 1


def test_outputs_are_prepared_before_each_comparison():
    """A candidate that writes nothing must not win by what another one left behind."""
    out = torch.zeros(6)

    def run(config):
        if config == SLOW:
            out.copy_(RIGHT)
        return out

    tuner = tuning.Tuner(None, lambda call: 1e-3)
    with pytest.warns(RuntimeWarning, match="name='fast'"):
        chosen = tuner.choose(
            "x",
            candidates=lambda: [SLOW, FAST],
            default=lambda: DEFAULT,
            run=run,
            reference=lambda: RIGHT,
            prepare=lambda: out.fill_(torch.nan),
        )
    assert chosen == SLOW


def test_nothing_is_measured_while_paused():
    trial = Trial(FAST)
    tuner = trial.tuner()
    with tuning.paused():
        assert trial.choose(tuner) == DEFAULT
    assert trial.ran == []
    assert trial.choose(tuner) == FAST, "the default is not remembered"


def test_nothing_is_measured_while_launches_are_recorded(monkeypatch):
    trial = Trial(FAST)
    tuner = trial.tuner()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert trial.choose(tuner) == DEFAULT
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert trial.choose(tuner) == DEFAULT
    assert trial.ran == []
    assert trial.choose(tuner) == FAST


def test_what_is_known_holds_while_launches_are_recorded(monkeypatch):
    trial = Trial(FAST)
    tuner = trial.tuner()
    trial.choose(tuner)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert trial.choose(tuner) == FAST


def test_environment_variable_turns_it_off(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.AUTOTUNE_VARIABLE, "0")
    trial = Trial(FAST)
    tuner = trial.tuner(tmp_path)
    assert trial.choose(tuner) == DEFAULT
    assert trial.ran == []
    assert not list(tmp_path.iterdir())


def test_the_variable_is_one():
    assert tuning.AUTOTUNE_VARIABLE == cuda.AUTOTUNE_VARIABLE


def test_threads_measure_a_problem_once():
    trial = Trial(SLOW, FAST)
    tuner = trial.tuner()
    barrier, chosen = threading.Barrier(8), []

    def work():
        barrier.wait()
        chosen.append(trial.choose(tuner))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert chosen == [FAST] * 8
    assert trial.references == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_during_a_measurement_leaves_the_child_a_free_lock():
    tuner = Trial().tuner()
    with tuner._lock:
        child = os.fork()
        if child == 0:  # another thread's lock, as far as the child can know
            acquired = []
            thread = threading.Thread(
                target=lambda: acquired.append(tuner._lock.acquire(timeout=5))
            )
            thread.start()
            thread.join()
            os._exit(0 if acquired == [True] else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize(
    ("got", "want", "text"),
    [
        pytest.param(RIGHT, RIGHT.clone(), None, id="equal"),
        pytest.param(torch.tensor([0.0]), torch.tensor([-0.0]), "1 of 1 elements", id="zeros"),
        pytest.param(torch.tensor([torch.nan]), torch.tensor([-torch.nan]), None, id="nan"),
        pytest.param(RIGHT.bfloat16(), RIGHT, "torch.bfloat16 instead", id="dtype"),
        pytest.param(RIGHT[:5], RIGHT, "[5] instead of [6]", id="shape"),
        pytest.param((RIGHT, RIGHT), (RIGHT, RIGHT + 1), "6 of 6 elements", id="second result"),
        pytest.param((RIGHT,), (RIGHT, RIGHT), "1 results instead of 2", id="number of results"),
        pytest.param(None, RIGHT, "NoneType instead of a tensor", id="no tensor"),
    ],
)
def test_difference(got, want, text):
    found = tuning.difference(got, want)
    assert found is None if text is None else text in found


def test_rounded_rows():
    assert [tuning.rounded_rows(m) for m in (1, 2, 3, 4, 5, 8191, 8192, 8193)] == [
        *(1, 2, 4, 4, 8, 8192, 8192, 16384)
    ]


# ---------------------------------------------------------------- the file


def test_a_later_process_reads_the_choice(tmp_path):
    trial = Trial(SLOW, FAST)
    trial.choose(trial.tuner(tmp_path))
    data = contents(tmp_path)
    assert data["format"] == FORMAT
    assert data["environment"] == ENVIRONMENT
    assert data["choices"]["linear 8x16x32"]["config"] == {"name": "fast", "block": 64}

    later = Trial(SLOW, FAST)
    assert later.choose(later.tuner(tmp_path)) == FAST
    assert later.ran == []


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(tmp_path):
    first = Trial(FAST)
    first.choose(first.tuner(tmp_path))
    second = Trial(SLOW)
    assert second.choose(second.tuner(tmp_path)) == SLOW
    assert second.timed == [SLOW]


@pytest.mark.parametrize("field", sorted(ENVIRONMENT))
def test_another_environment_has_another_file(field, tmp_path):
    paths = {TuningFile(tmp_path, {**ENVIRONMENT, field: value}).path for value in ("1", "2")}
    assert len(paths) == 2


BAD_FILES = {
    "empty": b"",
    "cut short": b'{"format": "torchquant tuning 1", "choi',
    "binary": bytes(range(256)),
    "another type": b"[1, 2]",
    "a number": b"7",
    "foreign": b'{"version": 3, "choices": {}}',
    "another machine's": json.dumps(
        {"format": FORMAT, "environment": {}, "choices": {"linear 8x16x32": {}}}
    ).encode(),
    "choices of another type": json.dumps(
        {"format": FORMAT, "environment": ENVIRONMENT, "choices": [1]}
    ).encode(),
    "a choice of another type": json.dumps(
        {"format": FORMAT, "environment": ENVIRONMENT, "choices": {"linear 8x16x32": 5}}
    ).encode(),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_ignored_with_one_message_and_replaced(content, tmp_path):
    trial = Trial(SLOW, FAST)
    tuner = trial.tuner(tmp_path)
    tuner.file.path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="torchquant ignores .* will replace it") as caught:
        assert trial.choose(tuner) == FAST
    assert len(caught) == 1
    assert contents(tmp_path)["choices"].keys() == {"linear 8x16x32"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Trial(SLOW, FAST).choose(Trial().tuner(tmp_path)) == FAST


def test_a_choice_without_config_is_measured_again(tmp_path):
    trial = Trial(FAST)
    tuner = trial.tuner(tmp_path)
    for choice in ({}, {"config": None}, {"config": [1]}, {"config": {"name": 3}}):
        data = {"format": FORMAT, "environment": ENVIRONMENT, "choices": {"p": choice}}
        tuner.file.path.write_text(json.dumps(data))
        tuner.chosen.clear()
        assert trial.choose(tuner, "p") == FAST
    assert trial.references == 4


def test_a_folder_that_cannot_be_written_costs_a_message_only(tmp_path):
    (tmp_path / "file").touch()
    trial = Trial(FAST)
    tuner = trial.tuner(tmp_path / "file" / "folder")
    with pytest.warns(RuntimeWarning, match="cannot (write to|be read)"):
        assert trial.choose(tuner) == FAST
    assert trial.choose(tuner) == FAST


def test_no_half_written_file_is_left_behind(tmp_path, monkeypatch):
    def replace(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", replace)
    trial = Trial(FAST)
    with pytest.warns(RuntimeWarning, match="disk full"):
        assert trial.choose(trial.tuner(tmp_path)) == FAST
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


WRITER = """
import json, sys
from pathlib import Path
from torchquant.triton.tuning import file as tuning_file
tuning_file._LOCK_SECONDS = 300.0  # a busy machine: the other one may be long
folder, environment, first = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
file = tuning_file.TuningFile(folder, environment)
for i in range(first, first + 50):
    file.write(f"problem {i}", {"config": {"name": "fast", "block": i}})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_processes_that_write_at_once_lose_nothing(tmp_path):
    arguments = WRITER, str(tmp_path), json.dumps(ENVIRONMENT)
    folder = str(Path(torchquant.__file__).parents[1])  # as this process found it
    environment = {**os.environ, "PYTHONPATH": folder}
    reads = 0
    file = TuningFile(tmp_path, ENVIRONMENT)
    with ThreadPoolExecutor(2) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")  # a reader never sees half a file
        writers = [
            pool.submit(run_python, *arguments, str(50 * i), environment=environment)
            for i in range(2)
        ]
        while not all(writer.done() for writer in writers):
            file.read()
            reads += 1
    for writer in writers:
        assert writer.result().returncode == 0, writer.result().stderr
    assert reads > 0
    assert len(file.read()) == 100


def test_a_lock_that_is_never_given_back_is_passed_by(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr("torchquant.triton.tuning.file._LOCK_SECONDS", 0.05)
    file = TuningFile(tmp_path, ENVIRONMENT)
    with open(file.path.with_suffix(".lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        file.write("problem", {"config": {}})
    assert file.read() == {"problem": {"config": {}}}


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHQUANT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "torchquant"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "torchquant"
    monkeypatch.setenv("TORCHQUANT_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_no_home_means_no_file(monkeypatch):
    monkeypatch.delenv("TORCHQUANT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert cache_folder() is None


def test_tuning_needs_no_triton():
    code = "import sys, torchquant.triton.tuning; print('triton' in sys.modules)"
    done = run_python(code)
    assert done.stdout.strip() == "False", done.stderr
