"""Skipped tests: their count by reason, and the failure in CI where a package is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.skips import FORCED, kind_of

TESTS = Path(__file__).resolve().parents[1]
REASON = r"(?:pytest\.skip\(|reason=)\s*\"([^\"{]+)\"[,)]"
# The plugin without the rest of its package, whose imports take seconds.
CONFTEST = """
import os, sys
sys.path.insert(0, {support!r})
from skips import SkipCounter
def pytest_configure(config):
    config.pluginmanager.register(SkipCounter(strict=os.environ.get("CI") == "true"))
"""


def run_pytest(folder: Path, body: str, ci: bool) -> tuple[int, str]:
    """Exit status and output of pytest over one test file."""
    (folder / "conftest.py").write_text(CONFTEST.format(support=str(TESTS / "support")))
    (folder / "test_it.py").write_text(f"import pytest\ndef test_passes(): pass\n{body}\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    result = subprocess.run(
        [*command, "--rootdir", str(folder), "-c", os.devnull],
        env={**environment, **({"CI": "true"} if ci else {})},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("def test(): pytest.importorskip('no_such_package')", "missing package"),
        ("pytest.importorskip('no_such_package')", "missing package"),
        ("def test(): pytest.skip('needs the package timm: minilm.py')", "missing package"),
        ("@pytest.mark.skip(reason='too difficult')\ndef test(): pass", "unknown reason"),
    ],
    ids=["in a test", "of a whole file", "of a script", "another reason"],
)
def test_a_skip_that_no_machine_forces_fails_ci(tmp_path: Path, body: str, kind: str) -> None:
    status, output = run_pytest(tmp_path, body, ci=True)
    assert status == 1, output
    assert re.search(rf"^    1  {kind}: ", output, re.MULTILINE)
    assert "CI fails: the packages that tests need must be installed" in output


def test_a_skip_that_the_machine_forces_passes_ci(tmp_path: Path) -> None:
    body = "def test(): pytest.skip('needs an NVIDIA GPU')\nests = [test]\n"
    status, output = run_pytest(tmp_path, body, ci=True)
    assert status == 0, output
    assert "    1  hardware: needs an NVIDIA GPU" in output
    assert "CI fails" not in output


def test_outside_of_ci_a_missing_package_is_counted_only(tmp_path: Path) -> None:
    body = "def test(): pytest.importorskip('no_such_package')"
    status, output = run_pytest(tmp_path, body, ci=False)
    assert status == 0, output
    assert "    1  missing package: could not import 'no_such_package'" in output


def test_reasons_that_are_allowed_name_no_package() -> None:
    assert kind_of("triton is not installed") == "missing package"
    assert kind_of("needs the package onnx, onnxruntime") == "missing package"
    assert kind_of("torch 2.16.0 has no torch.quint8 any more") == "torch"
    assert not any("install" in reason for reasons in FORCED.values() for reason in reasons)


def test_every_reason_in_the_tests_is_classified() -> None:
    """A literal reason that the list lacks would fail CI on another machine only."""
    found = [
        reason
        for path in TESTS.rglob("test_*.py")
        if path != Path(__file__)
        for reason in re.findall(
            r"(?:pytest\.skip\(|reason=)\s*\"([^\"{]+)\"[,)]", path.read_text()
        )
    ]
    assert len(found) > 20
    assert not [reason for reason in found if kind_of(reason) == "unknown reason"]
