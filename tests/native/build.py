"""Builds and runs the torch-free tests of the kernels, under the sanitizers and the fuzzer.

    python tests/native/build.py [--variants plain address thread fuzz] [--seconds 30] [--times 1]

    plain     as the package is compiled; test_kernels
    address   AddressSanitizer and UndefinedBehaviorSanitizer; test_kernels
    thread    ThreadSanitizer; test_threads
    fuzz      coverage-guided (libFuzzer, guard pages) where a clang has it, else the same target
              under "address" on random inputs; the output says which, and how many cases ran

The compiler is $CXX, or g++. The output names each sanitizer that it lacks. Objects are kept in
build/native, by the hash of the text that they are made from.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "native"
KERNELS = sorted(
    [*ROOT.glob("csrc/kernels/*.cpp"), *ROOT.glob("csrc/formats/*.cpp"), ROOT / "csrc/isa.cpp"]
)

# -ffp-contract=off as in setup.py: the reference is held to the same arithmetic.
COMMON = ["-std=c++17", "-fno-fast-math", "-ffp-contract=off", "-pthread"]
COMMON += ["-Wall", "-Wno-maybe-uninitialized"]  # which GCC 12 sees in its own vector headers
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
STOP = ["-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
FLAGS = {
    "plain": ["-O3", "-g0"],
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


def run_test(variant: str, times: int) -> str:
    cxx, flags = compiler(), FLAGS[variant]
    require(cxx, flags)
    name = "test_threads" if variant == "thread" else "test_kernels"
    program = build(f"{name}-{variant}", [HERE / f"{name}.cpp", *KERNELS], cxx, flags)
    return run(program, str(12 * times if variant == "thread" else times))


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
        sources = [HERE / "fuzz_kernels.cpp", *KERNELS]
        program = build("fuzz_kernels-libfuzzer", sources, clang, FLAGS["libfuzzer"])
        options += ["-max_len=96", "-timeout=60", "-rss_limit_mb=4096", str(corpus)]
        output = run(program, *options, timeout=seconds + 600)
        done = re.findall(r"^Done .*|cov: \d+", output, re.MULTILINE)
        return f"{clang[0]}, guided by coverage: {done[-1]}, {done[-2]}"
    sanitized = "address"
    try:
        require(compiler(), FLAGS[sanitized])
    except Skipped:
        sanitized = "plain"
    sources = [HERE / "fuzz_kernels.cpp", HERE / "fuzz_driver.cpp", *KERNELS]
    program = build(f"fuzz_kernels-{sanitized}", sources, compiler(), FLAGS[sanitized])
    output = run(program, *options, timeout=seconds + 600)
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
