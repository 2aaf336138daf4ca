"""The ``torchquant`` command: options, errors, exit codes, what goes to which stream."""

import json
import os
import shutil
import sys

import pytest
import torch
from support.scripts import run_python
from typer.testing import CliRunner

import torchquant
from torchquant import cpu, cuda
from torchquant.cli import info
from torchquant.cli import main as cli
from torchquant.cuda.host import triton_version


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "100"})


def run(*arguments, **environment):
    """In a process of its own: through the module's app, as the console script does."""
    code = "from torchquant.cli.main import app; app(prog_name='torchquant')"
    return run_python(code, *arguments, environment={**os.environ, **environment})


def flat(text):
    """Output without the line breaks and borders of boxes."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def result(small_demo):
    """A real result, but of a few images."""
    return small_demo[0]


def test_version():
    outcome = invoke("--version")
    assert outcome.exit_code == 0
    assert outcome.stdout == f"torchquant {torchquant.__version__}\n"


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0)])
def test_help_lists_the_commands(arguments, code):
    outcome = invoke(*arguments)
    assert outcome.exit_code == code
    assert "info" in outcome.output
    assert "demo" in outcome.output


@pytest.mark.parametrize("command", ["info", "demo"])
def test_help_of_a_command(command):
    outcome = invoke(command, "--help")
    assert outcome.exit_code == 0
    assert "--json" in outcome.stdout


def test_console_script_is_installed():
    script = shutil.which("torchquant", path=os.path.dirname(sys.executable))
    assert script, "torchquant is not next to the interpreter; pip install -e ."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["quantise"], "No such command 'quantise'", id="command"),
        pytest.param(["info", "--isa", "avx2"], "No such option: --isa", id="option"),
        pytest.param(["demo", "--threads", "0"], "Invalid value for '--threads'", id="no threads"),
        pytest.param(["demo", "--threads", "two"], "Invalid value for '--threads'", id="no number"),
        pytest.param(["demo", "--isa", "sse9"], "got 'sse9' (unknown)", id="unknown isa"),
    ],
)
def test_wrong_usage(arguments, message):
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert message in flat(outcome.stderr)


def test_unknown_isa_lists_the_valid_ones():
    assert ", ".join(cpu.available_isas()) in flat(invoke("demo", "--isa", "sse9").stderr)


def test_unsupported_isa_is_told_from_an_unknown_one(monkeypatch):
    monkeypatch.setattr(cpu, "available_isas", lambda: ("scalar",))
    monkeypatch.setattr(cpu, "built_isas", lambda: ("avx2", "scalar"))
    error = flat(invoke("demo", "--isa", "avx2").stderr)
    assert "the name must be one of scalar, got 'avx2' (this CPU does not support it)" in error


# info


def test_info_as_json():
    outcome = invoke("info", "--json")
    assert outcome.exit_code == 0
    data = json.loads(outcome.stdout)
    assert data["torchquant"] == torchquant.__version__
    assert data["torch"] == torch.__version__
    assert data["threads"] == torch.get_num_threads()
    assert data["cpus"] >= 1
    assert data["cpu"] == cpu.cpu_name()
    assert data["isas_built"] == list(cpu.built_isas())
    assert data["isas_supported"] == list(cpu.available_isas())
    assert data["isa_active"] == cpu.active_isa()
    assert data["environment"].keys() >= {"TORCHQUANT_ISA", "OMP_NUM_THREADS"}


def test_info_as_tables(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    text = invoke("info").stdout
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["OMP_NUM_THREADS"] == ["7"]
    assert rows["MKL_NUM_THREADS"] == ["not", "set"]
    assert rows["torch"] == [torch.__version__]
    for isa in cpu.built_isas():
        supported = "yes" if isa in cpu.available_isas() else "no"
        assert rows[isa] == [supported] + ["yes"] * (isa == cpu.active_isa())


def test_info_in_a_process_of_its_own():
    done = run("info", "--json", TORCHQUANT_ISA="scalar")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["isa_active"] == data["environment"]["TORCHQUANT_ISA"] == "scalar"
    if sys.platform == "linux":
        assert len(data["openmp"]) == 1, "torchquant and torch share one OpenMP runtime"


def test_wrong_environment_variable_is_named():
    done = run("info", TORCHQUANT_ISA="sse9")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "TORCHQUANT_ISA must be one of" in done.stderr
    assert "scalar, got 'sse9' (unknown)" in done.stderr


GPUS = (
    cuda.GPU(0, "NVIDIA H200", "9.0", 150_000_000_000, "triton", None, {"minmax": "ValueError: x"}),
    cuda.GPU(1, "Tesla V100", "7.0", 16 << 30, "aten", "Triton's kernels need more", {}),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_without_a_gpu(monkeypatch):
    for name in info.CUDA_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    text = invoke("info").stdout
    (line,) = [line for line in text.splitlines() if "GPU" in line]
    assert line.startswith("GPU: none (torch ")
    assert "CUDA_" not in text
    data = json.loads(invoke("info", "--json").stdout)
    assert data["gpus"] == []
    assert data["cuda_version"] == torch.version.cuda
    assert data["triton_version"] == triton_version()
    assert not data["environment"].keys() & set(info.CUDA_ENVIRONMENT)


def test_info_shows_variables_for_the_gpu_if_set(monkeypatch):
    monkeypatch.setenv("TORCHQUANT_CACHE_DIR", "elsewhere")
    environment = json.loads(invoke("info", "--json").stdout)["environment"]
    assert environment["TORCHQUANT_CACHE_DIR"] == "elsewhere"


def test_info_with_gpus(monkeypatch):
    monkeypatch.setattr(cuda, "gpus", lambda *, probe: GPUS if probe else ())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("TORCHQUANT_CUDA_PATH", "auto")
    text = flat(invoke("info").stdout)
    assert "GPUs (CUDA 13.0, triton" in text
    assert "cuda:0 NVIDIA H200 9.0 139.7 GiB triton" in text
    assert "cuda:1 Tesla V100 7.0 16.0 GiB aten" in text
    assert "cuda:1 runs with ATen's kernels: Triton's kernels need more" in text
    assert "cuda:0 runs minmax with ATen's kernels: ValueError: x" in text
    assert "TORCHQUANT_CUDA_PATH auto" in text
    data = json.loads(invoke("info", "--json").stdout)
    assert data["gpus"][0]["name"] == "NVIDIA H200"
    assert [gpu["path"] for gpu in data["gpus"]] == ["triton", "aten"]
    assert data["environment"].keys() >= set(info.CUDA_ENVIRONMENT)


def test_openmp_in_words():
    assert info.describe_openmp([]) == "unknown"
    assert info.describe_openmp(["libgomp.so.1"]) == "libgomp.so.1"
    several = info.describe_openmp(["libgomp.so.1", "libiomp5.so"])
    assert several.startswith("libgomp.so.1, libiomp5.so (several in one process")


# demo


@pytest.fixture
def demo_calls(monkeypatch, result):
    """Replaces the demo's work by its result; returns the arguments it was called with."""
    calls = []

    def run_demo(**arguments):
        calls.append(arguments)
        arguments["on_step"]("step", 0.5)
        return result

    monkeypatch.setattr(cli, "run_demo", run_demo)
    return calls


def test_demo_prints_tables(demo_calls):
    outcome = invoke("demo")
    assert outcome.exit_code == 0
    assert "Exactness" in outcome.stdout
    assert "none differs" in outcome.stdout
    assert outcome.stderr == "", "no progress bar where there is no terminal"


def test_demo_prints_json(demo_calls, result):
    outcome = invoke("demo", "--json")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout) == json.loads(json.dumps(result.to_dict()))


def test_demo_passes_its_options_on(demo_calls):
    assert invoke("demo", "--isa", "scalar", "--threads", "3", "--no-progress").exit_code == 0
    assert (demo_calls[0]["isa"], demo_calls[0]["threads"]) == ("scalar", 3)
    assert invoke("demo").exit_code == 0
    assert (demo_calls[1]["isa"], demo_calls[1]["threads"]) == (None, None)


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_demo_fails_where_a_check_fails(demo_calls, result, monkeypatch, option):
    monkeypatch.setattr(result.checks[0], "differing", 5)
    outcome = invoke("demo", *option)
    assert outcome.exit_code == 1
    failed = result.checks[0]
    assert "int8 results are not exact on this machine" in flat(outcome.stderr)
    assert f"{failed.isa}: 5 of {failed.values:,} values differ" in flat(outcome.stderr)
    if option:
        assert json.loads(outcome.stdout)["exact"] is False
    else:
        assert "NOT EXACT" in outcome.stdout
