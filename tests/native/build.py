"""Builds and runs the torch-free tests of the kernels and of the core.

    python tests/native/build.py [--variants plain address thread fuzz] [--seconds 30] [--times 1]

    plain     as the package is compiled; test_kernels, test_core
    address   AddressSanitizer and UndefinedBehaviorSanitizer; test_kernels, test_core
    thread    ThreadSanitizer; test_threads, test_core with threads that run at once
    fuzz      coverage-guided (libFuzzer, guard pages) where a clang has it; otherwise the same
              target under "address" on random inputs. The output names the kind and the number of
              cases

The compiler is $CXX, or g++. The output names each sanitizer that it lacks. Objects are kept in
build/native, by the hash of the text that they are made from.

Nothing here has a path to torch's headers: a torch header in the core, in the kernels, in the
formats or in isa.h does not compile, and neither does an interface that is no C.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "native"
INTERFACES = sorted((ROOT / "csrc/core").glob("torchquant_*.h"))
CORE_FOLDERS = ("core", "formats", "kernels")
CORE = sorted(path for folder in CORE_FOLDERS for path in ROOT.glob(f"csrc/{folder}/*.cpp"))
CORE.append(ROOT / "csrc/isa.cpp")

# -ffp-contract=off as in setup.py: the reference is held to the same arithmetic.
COMMON = ["-std=c++17", "-fno-fast-math", "-ffp-contract=off", "-pthread"]
COMMON += ["-Wall", "-Wno-maybe-uninitialized"]  # which GCC 12 sees in its own vector headers
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
STOP = ["-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
FLAGS = {
    "plain": ["-O3", "-g0", "-Wno-uninitialized"],  # also seen in GCC 12's vector headers
    "address": ["-O1", "-fsanitize=address,undefined", *STOP],
    "thread": ["-O1", "-fsanitize=thread", *STOP],
    # clang only. Sanitizers too would cost it minutes for each vector file, and "address" has them.
    "libfuzzer": ["-O1", "-fsanitize=fuzzer", "-g1", "-Wno-unknown-warning-option"],
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # leaks need ptrace, which containers forbid
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
CLANGS = ("clang++", *(f"clang++-{version}" for version in range(22, 12, -1)))


class Skipped(Exception):
    """The compiler cannot do this; says what is missing."""


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise Skipped(f"no C++ compiler: {command[0]!r} is not on the PATH")
    return command


def compile_one(source: Path, cxx: list[str], flags: list[str]) -> Path:
    """The object of a source; kept by the hash of the preprocessed text and of the command."""
    command = [*cxx, *COMMON, *flags, *INCLUDES, "-c", str(source)]
    text = subprocess.run([*command, "-E", "-P"], check=True, capture_output=True).stdout
    digest = hashlib.sha256("\0".join(command).encode() + b"\0" + text).hexdigest()
    target = BUILD / f"{source.stem}-{digest[:16]}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.replace(target)
    return target


def build(program: str, sources: list[Path], cxx: list[str], flags: list[str]) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: compile_one(source, cxx, flags), sources))
    target = BUILD / program
    command = [*cxx, *COMMON, *flags, *map(str, objects), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def require(cxx: list[str], flags: list[str], main: str = "int main() { return 0; }") -> None:
    """Raise Skipped unless a program with these flags can be built and run."""
    BUILD.mkdir(parents=True, exist_ok=True)
    probe = BUILD / f"probe-{os.getpid()}"
    source = probe.with_suffix(".cpp")
    source.write_text(main)
    try:
        command = [*cxx, *COMMON, *flags, str(source), "-o", str(probe)]
        built = subprocess.run(command, capture_output=True, text=True)
        works = built.returncode == 0
        if works and "fuzzer" not in " ".join(flags):  # which would run for ever
            works = subprocess.run([probe], capture_output=True).returncode == 0
    finally:
        source.unlink()
        probe.unlink(missing_ok=True)
    if not works:
        raise Skipped(f"{cxx[0]} has no working {' '.join(f for f in flags if 'sanitize=' in f)}")


def run(program: Path, *arguments: str, timeout: float = 1500) -> str:
    """The program's output; raises with all of it where it fails."""
    result = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=BUILD,
        env={**ENVIRONMENT, **os.environ},
    )
    if result.returncode != 0:
        command = " ".join(map(str, (program, *arguments)))
        raise AssertionError(
            f"{command}: exit code {result.returncode}\n{result.stdout}\n{result.stderr[-6000:]}"
        )
    return result.stdout.strip() + result.stderr


def check_interface() -> None:
    """The core's interface is C: it compiles as C99, without a warning and without C++."""
    source = BUILD / f"interface-{os.getpid()}.c"
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = (f'#include "{header.relative_to(ROOT / "csrc")}"\n' for header in INTERFACES)
    source.write_text("".join(lines))
    try:
        flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        command = [*compiler(), "-x", "c", *flags, *INCLUDES, str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
    finally:
        source.unlink()
    if result.returncode != 0:
        raise AssertionError(f"the core's interface is not C:\n{result.stderr}")


# What each variant runs: a program, its arguments from --times on, and what its output counts.
PROGRAMS: dict[str, list[tuple[str, Callable[[int], list[str]], str]]] = {
    "plain": [
        ("test_kernels", lambda times: [str(times)], r"(\d+) linear cases"),
        ("test_core", lambda times: [str(times)], r"(\d+) core cases"),
    ],
    "thread": [
        ("test_threads", lambda times: [str(12 * times)], r"(\d+) calls from"),
        ("test_core", lambda times: [str(times), "0", "threads"], r"(\d+) core cases"),
    ],
}
PROGRAMS["address"] = PROGRAMS["plain"]


def run_test(variant: str, times: int) -> str:
    """The outputs of the variant's programs; raises where one fails or ran no case."""
    cxx, flags = compiler(), FLAGS[variant]
    require(cxx, flags)
    check_interface()
    outputs = []
    for name, arguments, counted in PROGRAMS[variant]:
        program = build(f"{name}-{variant}", [HERE / f"{name}.cpp", *CORE], cxx, flags)
        outputs.append(require_cases(run(program, *arguments(times)), counted))
    return "; ".join(outputs)


def require_cases(output: str, counted: str) -> str:
    """The output; raises unless it counts a case. ``counted``: a pattern with the number."""
    found = re.search(counted, output)
    if found is None or int(found.group(1)) == 0:
        raise AssertionError(f"no case ran: expected {counted!r}, above 0, in {output!r}")
    return output


def fuzzing_clang() -> list[str] | None:
    for name in CLANGS:
        if shutil.which(name) is None:
            continue
        target = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
        try:
            require([name], FLAGS["libfuzzer"], target)
        except Skipped:
            continue
        return [name]
    return None


def run_fuzzer(seconds: float, seed: int) -> str:
    """The fuzzer's last line, after what kind of fuzzer it was."""
    clang = fuzzing_clang()
    corpus = BUILD / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed}"]
    if clang is not None:
        sources = [HERE / "fuzz_kernels.cpp", *CORE]
        program = build("fuzz_kernels-libfuzzer", sources, clang, FLAGS["libfuzzer"])
        options += ["-max_len=96", "-timeout=60", "-rss_limit_mb=4096", str(corpus)]
        output = run(program, *options, timeout=seconds + 600)
        require_cases(output, r"Done (\d+) runs")
        done = re.findall(r"^Done .*|cov: \d+", output, re.MULTILINE)
        return f"{clang[0]}, guided by coverage: {done[-1]}, {done[-2]}"
    sanitized = "address"
    try:
        require(compiler(), FLAGS[sanitized])
    except Skipped:
        sanitized = "plain"
    sources = [HERE / "fuzz_kernels.cpp", HERE / "fuzz_driver.cpp", *CORE]
    program = build(f"fuzz_kernels-{sanitized}", sources, compiler(), FLAGS[sanitized])
    output = require_cases(run(program, *options, timeout=seconds + 600), r"Done (\d+) runs")
    return f"no clang with libFuzzer, {sanitized} build: {output}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = ("plain", "address", "thread", "fuzz")
    parser.add_argument("--variants", nargs="+", choices=choices, default=choices)
    parser.add_argument("--seconds", type=float, default=30, help="of fuzzing")
    parser.add_argument("--seed", type=int, default=1, help="of fuzzing")
    parser.add_argument("--times", type=int, default=1, help="repetitions of the tests")
    arguments = parser.parse_args()
    for variant in arguments.variants:
        start = time.monotonic()
        try:
            if variant == "fuzz":
                result = run_fuzzer(arguments.seconds, arguments.seed)
            else:
                result = run_test(variant, arguments.times)
        except Skipped as reason:
            result = f"SKIPPED: {reason}"
        print(f"native {variant}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AssertionError, subprocess.CalledProcessError) as error:
        sys.exit(f"FAILED: {error}")
