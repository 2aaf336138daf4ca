"""The demo's result as tables for a terminal of 80 columns or more."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from torchquant.demo import DemoResult
from torchquant.demo.exactness import CHECKS, Check
from torchquant.report import human_bytes


def render(result: DemoResult) -> RenderableType:
    """All tables and the conclusion."""
    return Group(
        Text("A small transformer that reads handwritten digits, converted to int8", style="bold"),
        result.report,
        Text(),
        comparison_table(result),
        Text(),
        exactness_table(result),
        Text(),
        training_table(result),
        Text(),
        networks_table(result),
        Text(),
        conclusion(result),
    )


def titled_table(title: str, caption: str) -> Table:
    """An empty table in the style of the demo."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def comparison_table(result: DemoResult) -> Table:
    """The table of accuracy, size and latency, float and int8."""
    count = result.test_images
    table = titled_table(
        f"Float and int8 on {count} test images of handwritten digits",
        f"{result.isa}, {plural(result.threads, 'thread')}; "
        "latency: median of runs that take turns",
    )
    table.add_column("")
    table.add_column("float32", justify="right")
    table.add_column("int8", justify="right")
    table.add_column("")
    table.add_row(
        "Accuracy",
        f"{result.float_correct / count:.2%}",
        f"{result.int8_correct / count:.2%}",
        f"same answer for {result.same_answers} of {count}",
    )
    table.add_row(
        "Size of the state dict",
        human_bytes(result.float_bytes),
        human_bytes(result.int8_bytes),
        f"{result.float_bytes / result.int8_bytes:.1f} times smaller",
    )
    for latency in result.latencies:
        table.add_row(
            f"Latency, {plural(latency.batch, 'image')}",
            f"{latency.float_ms:.2f} ms",
            f"{latency.int8_ms:.2f} ms",
            speed(latency.float_ms / latency.int8_ms),
        )
    return table


def exactness_table(result: DemoResult) -> Table:
    """One row per instruction set, one column per check; cells have the number of values."""
    table = titled_table(
        "Exactness: values compared, bit by bit",
        f"Logits: all {result.test_images} images through the model. Other columns: inputs "
        "recorded at each int8 layer.",
    )
    headers = {
        "logits": "logits\n= scalar",
        "layers": "layers\n= scalar",
        "threads": f"1 thread\n= {result.compared_threads} threads",
        "rows": "row alone\n= in batch",
        "specification": "kernel =\nplain torch",
    }
    cells = {(check.name, check.isa): outcome(check) for check in result.checks}
    table.add_column("Instruction\nset")
    for header in headers.values():
        table.add_column(header, justify="right")
    shown = (check.isa for check in result.checks if check.name in headers)
    for isa in dict.fromkeys(shown):
        table.add_row(isa, *(cells.get((name, isa), Text("-")) for name in headers))
    return table


def training_table(result: DemoResult) -> Table:
    """The gain of fine-tuning at few bits, and whether the converted model has the same bits."""
    training, count = result.training, result.test_images
    isas = sum(check.name == "training" for check in result.checks)
    table = titled_table(f"Weights of {training.weight_bits} bits, rounded and trained", "")
    table.add_column("")
    for heading in ("float32", "rounded", "trained"):
        table.add_column(heading, justify="right")
    table.add_column("")
    correct = (result.float_correct, training.rounded_correct, training.trained_correct)
    table.add_row(
        "Accuracy",
        *(f"{number / count:.2%}" for number in correct),
        f"{training.steps} steps in {training.seconds:.1f} s",
    )
    verified = f"{training.differing_bits:,} differing bits in {training.values:,} values"
    table.add_row("Converted", "", "", "", f"{verified},\n{plural(isas, 'instruction set')}")
    return table


def networks_table(result: DemoResult) -> Table:
    """The convolutional networks: float, calibrated, and trained with integers."""
    networks = result.networks
    count = networks[0].test_images
    seconds = max(network.seconds for network in networks)
    images, steps = networks[0].calibration_images, networks[0].steps
    table = titled_table(
        f"Convolutional networks, int8 from layer to layer, on {count} test images",
        f"Calibrated with {images} images; trained for {plural(steps, 'step')} "
        f"({seconds:.1f} s). Size and latency: float32 -> int8.",
    )
    table.add_column("")
    for network in networks:
        table.add_column(network.name, justify="right")
    for label, name in (
        ("Accuracy, float32", "float_correct"),
        ("Accuracy, int8 calibrated", "static_correct"),
        ("Accuracy, int8 trained", "trained_correct"),
    ):
        table.add_row(label, *(f"{getattr(network, name) / count:.2%}" for network in networks))
    sizes = ((human_bytes(one.float_bytes), human_bytes(one.int8_bytes)) for one in networks)
    table.add_row("Size of the state dict", *(" -> ".join(pair) for pair in sizes))
    for place, latency in enumerate(networks[0].latencies):
        times = [network.latencies[place] for network in networks]
        label = f"Latency, {plural(latency.batch, 'image')}"
        table.add_row(label, *(f"{one.float_ms:.2f} -> {one.int8_ms:.2f} ms" for one in times))
    return table


def outcome(check: Check) -> Text:
    """A cell of the exactness table."""
    if check.passed:
        return Text(f"{check.values:,}", style="green")
    if check.values:
        return Text(f"{check.differing:,} of\n{check.values:,}\nDIFFER", style="bold red")
    return Text("NOTHING\nCOMPARED", style="bold red")


def conclusion(result: DemoResult) -> Text:
    """The conclusions, one sentence each."""
    file = next(check for check in result.checks if check.name == "file")
    lines = []
    if file.passed:
        lines.append(f"Saved to a file and loaded again: all {file.values:,} logits the same.")
    if result.failures:
        lines.append(f"NOT EXACT ({result.seconds:.0f} s).")
    else:
        values = sum(check.values for check in result.checks)
        lines.append(f"Exact: {values:,} values compared, none differs ({result.seconds:.0f} s).")
    return Text("\n".join(lines), style="bold red" if result.failures else "bold green")


def describe_failures(result: DemoResult) -> str:
    """The failed checks, one per line, for standard error."""
    return "\n".join(f"  {check.isa}: {describe(check)}" for check in result.failures)


def describe(check: Check) -> str:
    """A failed check as text."""
    if not check.values:
        return f"nothing was compared: {CHECKS[check.name]}"
    return f"{check.differing:,} of {check.values:,} values differ: {CHECKS[check.name]}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``1 thread``, ``2 threads``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def speed(ratio: float) -> str:
    """How many times faster or slower, as text."""
    return f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
