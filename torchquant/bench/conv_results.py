"""Results of the benchmarks of convolutions and of whole networks, and their summaries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torchquant.bench.conv_shapes import FAMILIES, ConvShape
from torchquant.bench.networks import NetworkCase
from torchquant.bench.peers import OURS
from torchquant.bench.results import AnyRun, CaseResult, Extra
from torchquant.bench.timing import geometric_mean

# Other libraries by the names of their peers: the fastest of them counts.
LIBRARIES = {
    "oneDNN": ("onednn", "ao-onednn"),
    "FBGEMM": ("ao-fbgemm",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "fp32": ("fp32",),
    "bf16": ("bf16",),
}
BELOW = 0.9
MOST_NAMED = 8  # shapes in a line of text

ConvResult = CaseResult[ConvShape]
NetworkResult = CaseResult[NetworkCase]


def library_ratio(result: CaseResult[Any], names: Sequence[str]) -> float | None:
    """The time of the fastest of these peers over ours; None if one of both did not run."""
    ours = result.seconds(OURS)
    times = [seconds for name in names if (seconds := result.seconds(name))]
    return min(times) / ours if ours and times else None


def ratios(results: Iterable[ConvResult], names: Sequence[str]) -> dict[str, Any] | None:
    """Geometric mean over the shapes, by family too; the lowest, and which are below `BELOW`."""
    found = {r.shape: ratio for r in results if (ratio := library_ratio(r, names))}
    if not found:
        return None
    lowest = min(found, key=lambda shape: found[shape])
    families = {
        family: [ratio for shape, ratio in found.items() if shape.family == family]
        for family in FAMILIES
    }
    return {
        "shapes": len(found),
        "geometric_mean": round(geometric_mean(found.values()), 3),
        "by_family": {
            family: round(geometric_mean(values), 3)
            for family, values in families.items()
            if values
        },
        "lowest": round(found[lowest], 3),
        "lowest_shape": str(lowest),
        f"below_{BELOW}": [str(shape) for shape, ratio in found.items() if ratio < BELOW],
    }


class ConvRun(AnyRun[ConvShape]):
    """A run over convolutions. The shapes of the curves are apart from those that are compared."""

    curves: Mapping[str, list[ConvResult]] = MappingProxyType({})

    @property
    def what(self) -> str:
        """What was measured."""
        return "int8 convolution"

    @property
    def first_column(self) -> str:
        """The heading over the cases."""
        return "shape"

    @property
    def note(self) -> str:
        """What a call is, and what its times are measured in."""
        return (
            "Microseconds per call: convolution, bias, relu; 8-bit integers in and out, channels "
            "last (fp32, bf16: floats in and out). Shapes: N x C x H x W - outputs, k and kernel, "
            "s and stride, g and groups."
        )

    @property
    def limit_words(self) -> str:
        """What `Case.limit_bytes` counts."""
        return "weights, input and result"

    def take_curves(self, curves: dict[str, list[ConvShape]]) -> None:
        """Move the last results to the curves, in whose order they were measured."""
        taken: dict[str, list[ConvResult]] = {}
        count = sum(len(shapes) for shapes in curves.values())
        rest = self.results[len(self.results) - count :]
        self.results = self.results[: len(self.results) - count]
        for name, shapes in curves.items():
            taken[name], rest = rest[: len(shapes)], rest[len(shapes) :]
        self.curves = taken

    def peak_shares(self) -> dict[str, dict[str, float]]:
        """By family: geometric mean, least and most of the fractions of the measured peak."""
        found: dict[str, dict[str, float]] = {}
        for family in FAMILIES:
            shares = [
                gops / self.peak_gops
                for r in self.results
                if r.shape.family == family and (gops := r.gops()) and self.peak_gops
            ]
            if shares:
                found[family] = {
                    "geometric_mean": round(geometric_mean(shares), 3),
                    "least": round(min(shares), 3),
                    "most": round(max(shares), 3),
                }
        return found

    def summary(self) -> dict[str, Any]:
        """Ratios to every library, and fractions of the machine's peak."""
        found = {name: ratios(self.results, peers) for name, peers in LIBRARIES.items()}
        return {
            "kind": "summary",
            "suite": self.suite,
            "threads": self.threads,
            "isa": self.isa,
            "shapes": len(self.results),
            "time_over_ours": {name: ratio for name, ratio in found.items() if ratio},
            "of_peak": self.peak_shares(),
        }

    def lines(self) -> list[str]:
        """The summary as text."""
        summary = self.summary()
        if not summary["time_over_ours"]:
            return [
                f"{len(self.results)} shapes; no ratio, because {OURS} or every peer is missing"
            ]
        lines = []
        for name, found in summary["time_over_ours"].items():
            families = ", ".join(f"{f} {ratio:.2f}x" for f, ratio in found["by_family"].items())
            below = found[f"below_{BELOW}"]
            shown = ", ".join(below[:MOST_NAMED]) + (", ..." if len(below) > MOST_NAMED else "")
            lines.append(
                f"{name}'s time over ours, geometric mean over {found['shapes']} shapes: "
                f"{found['geometric_mean']:.2f}x ({families}); lowest {found['lowest']:.2f}x at "
                f"{found['lowest_shape']}; under {BELOW}x on {len(below)}"
                f"{': ' if below else ''}{shown}"
            )
        for family, share in summary["of_peak"].items():
            lines.append(
                f"{family}, fraction of the measured {self.isa} peak: geometric mean "
                f"{share['geometric_mean']:.0%}, {share['least']:.0%} to {share['most']:.0%}"
            )
        return lines

    def extras(self) -> list[Extra]:
        """A table per curve."""
        return [self._curve(name, results) for name, results in self._measured_curves()]

    def extra_records(self) -> list[dict[str, Any]]:
        """A record per curve."""
        return [
            {
                "kind": "curve",
                "over": name,
                "points": [
                    {**r.record(), "out_pixels": r.shape.out_pixels, "ns_per_pixel": _per_pixel(r)}
                    for r in results
                ],
                "spread": {peer: _spread(results, peer) for peer in self._ran(results)},
            }
            for name, results in self._measured_curves()
        ]

    def _measured_curves(self) -> list[tuple[str, list[ConvResult]]]:
        return [(name, results) for name, results in self.curves.items() if results]

    def _ran(self, results: list[ConvResult]) -> list[str]:
        return [name for name in self.columns() if any(name in r.blocks for r in results)]

    def _curve(self, name: str, results: list[ConvResult]) -> Extra:
        peers, shape = self._ran(results), results[0].shape
        layer = f"{shape.channels} to {shape.outputs} channels, {shape.kernel} x {shape.kernel}"
        lines = [[name, *(f"{peer} us" for peer in peers), *(f"{peer} ns/pixel" for peer in peers)]]
        for result in results:
            first = result.shape.batch if name == "images" else result.shape.height
            each = _per_pixel(result)
            lines.append(
                [
                    str(first) if name == "images" else f"{first} x {first}",
                    *(self.time(result.seconds(peer)) for peer in peers),
                    *(f"{each[peer]:.1f}" if peer in each else "-" for peer in peers),
                ]
            )
        spreads = [_spread(results, peer) for peer in peers]
        texts = [f"{spread:.2f}x" if spread else "-" for spread in spreads]
        lines.append(["most / least", *("" for _ in peers), *texts])
        return Extra(
            f"Time over {name}: {layer}. Time per pixel of the result is constant where "
            "the time grows linearly.",
            lines,
        )


def _per_pixel(result: ConvResult) -> dict[str, float]:
    pixels = result.shape.out_pixels
    return {
        name: round(1e9 * seconds / pixels, 3)
        for name in result.blocks
        if (seconds := result.seconds(name))
    }


def _spread(results: list[ConvResult], peer: str) -> float | None:
    """The most time per pixel over the least."""
    each = [found[peer] for r in results if peer in (found := _per_pixel(r))]
    return round(max(each) / min(each), 3) if each else None


class CnnRun(AnyRun[NetworkCase]):
    """A run over whole networks."""

    @property
    def what(self) -> str:
        """What was measured."""
        return "whole networks, static int8"

    @property
    def first_column(self) -> str:
        """The heading over the cases."""
        return "network"

    @property
    def note(self) -> str:
        """What a call is, and what its times are measured in."""
        return "Milliseconds per batch of images of 224 x 224, fp32 in and out (bf16: bf16)."

    def time(self, seconds: float | None) -> str:
        """A time as text, in milliseconds."""
        if seconds is None:
            return "-"
        value = seconds * 1e3
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"

    def summary(self) -> dict[str, Any]:
        """Ratios to the best peer, and fractions of the machine's peak."""
        return {
            "kind": "summary",
            "suite": self.suite,
            "threads": self.threads,
            "isa": self.isa,
            "networks": [
                {
                    "case": str(r.shape),
                    "ms": round(1e3 * (r.seconds(OURS) or 0.0), 3) or None,
                    "best_peer": r.best_peer(),
                    "ratio": _rounded(r.ratio()),
                    "of_peak": _rounded(_over(r.gops(), self.peak_gops)),
                    "megabytes": r.megabytes.get(OURS),
                }
                for r in self.results
            ],
        }

    def lines(self) -> list[str]:
        """The summary as text."""
        lines = []
        for r in self.results:
            best, ratio, share = r.best_peer(), r.ratio(), _over(r.gops(), self.peak_gops)
            if ratio is None or best is None:
                lines.append(f"{r.shape}: no ratio, because {OURS} or every peer is missing")
                continue
            of_peak = "" if share is None else f", {share:.0%} of the measured peak"
            lines.append(f"{r.shape}: {ratio:.2f}x {best}{of_peak}")
        return lines

    def extras(self) -> list[Extra]:
        """Memory, where the system reports it."""
        peers = [name for name in self.columns() if any(name in r.megabytes for r in self.results)]
        if not peers:
            return []
        lines = [["network", *peers]]
        for r in self.results:
            cells = [r.megabytes.get(name) for name in peers]
            lines.append([str(r.shape), *("-" if c is None else f"{c:.0f}" for c in cells)])
        return [
            Extra(
                "Megabytes: the most that the process held while it ran, above what it held when "
                "the library had been imported.",
                lines,
            )
        ]


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
