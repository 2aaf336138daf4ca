"""The engines that run the language model: torch, its quantizers, torchquant, llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.engines import FUSED, TORCH_ENGINES, Engine, Switches, torchquant


@dataclass(frozen=True)
class LanguageEngine(Engine):
    """A way of running the language model.

    Args:
        rotated: start from the model without outlier channels.
        step: how to decode: "eager", "compiled" (`torch.compile`; the prompt runs in eager mode) or
            "fused" (`torchquant.fuse_decoder_`, prompt and steps).
        gguf: llama.cpp's name of the file's type; None if the engine is none of llama.cpp.
    """

    rotated: bool = False
    step: str = "eager"
    gguf: str | None = None


PLAIN = "torchquant-plain"
SWITCHES = {
    PLAIN: ("int8 of the model as it is, quantize_(model) and nothing else", FUSED),
    "torchquant-unfused": ("int8 of the rotated model, every layer by itself", Switches()),
    "torchquant-activations": ("unfused, but SiLU in the layer before", Switches(activations=True)),
    "torchquant-gated": ("unfused, but silu(gate) * up in one pass", Switches(gated=True)),
    "torchquant-projections": (
        "unfused, but query, key and value in one, gate and up in one",
        Switches(projections=True),
    ),
    "torchquant-norms": ("unfused, but the norms by torchquant", Switches(norms=True)),
    "torchquant-attention": (
        "unfused, but attention by torchquant, in bfloat16",
        Switches(attention=True),
    ),
    "torchquant": ("int8 of the rotated model, quantize_(model) and nothing else", FUSED),
    "torchquant-all": (
        "int8 of the rotated model, fused, with gating, norms and attention as above",
        replace(FUSED, norms=True, gated=True, attention=True),
    ),
    "torchquant-bf16": (
        "int8 of the rotated model, quantize_(model).to(bfloat16)",
        replace(FUSED, bfloat16=True),
    ),
    "torchquant-bf16-all": (
        "the same, and gating and norms as above",
        replace(FUSED, norms=True, gated=True, bfloat16=True),
    ),
}


def intx(bits: int, group_size: int, symmetric: bool = True) -> Callable[[], object]:
    """int8 activations per token, weights of few bits in groups."""

    def make() -> object:
        import torchquant

        return torchquant.Int8DynamicActivationIntxWeightConfig(
            bits=bits, group_size=group_size, symmetric=symmetric
        )

    return make


def weight_only(bits: int, group_size: int, symmetric: bool = True) -> Callable[[], object]:
    """Float activations, weights of few bits in groups."""

    def make() -> object:
        import torchquant

        return torchquant.IntxWeightOnlyConfig(
            bits=bits, group_size=group_size, symmetric=symmetric
        )

    return make


def other_step(name: str, engine: Engine, step: str) -> dict[str, Engine]:
    """The same engine with another step."""
    rotated = isinstance(engine, LanguageEngine) and engine.rotated
    text = f"{engine.description}, {step} step"
    made = LanguageEngine(text, engine.convert, engine.requires, rotated, step=step)
    return {f"{name}-{step}": made}


def low_bits() -> dict[str, Engine]:
    """torchquant's engines with weights of 4, 3 and 2 bits, of the model as it is.

    The file's weights have 4 bits in groups of 32, with a minimum for each group, so groups of 32
    with zero points lose least. Rotated weights are no longer of 4 bits, and lose more.
    """
    engines: dict[str, Engine] = {}
    for bits, group, symmetric in (
        (4, 32, False),
        (4, 64, False),
        (4, 128, False),
        (3, 32, False),
        (2, 32, False),
    ):
        zero = "" if symmetric else ", with zero points"
        engines[f"torchquant-w{bits}a8-g{group}"] = LanguageEngine(
            f"torchquant {bits}-bit weights in groups of {group}{zero}, int8 activations",
            torchquant(config=intx(bits, group, symmetric)),
        )
        if bits == 4:
            engines[f"torchquant-w{bits}a8-g{group}-all"] = LanguageEngine(
                f"torchquant {bits}-bit weights in groups of {group}{zero}, int8 "
                "activations, gating and norms in one operator each",
                torchquant(
                    replace(FUSED, norms=True, gated=True), config=intx(bits, group, symmetric)
                ),
            )
        engines[f"torchquant-w{bits}-g{group}"] = LanguageEngine(
            f"torchquant {bits}-bit weights in groups of {group}{zero}, float activations",
            torchquant(config=weight_only(bits, group, symmetric)),
        )
    return engines


LLAMA_CPP = {
    f"llama.cpp-{name.lower().replace('_', '-')}": LanguageEngine(
        f"llama.cpp, {text}", requires=("llama_cpp",), gguf=name
    )
    for name, text in {
        "Q4_1": "the package's own file: 4 bits and a minimum in groups of 32",
        "Q4_0": "the same weights in Q4_0, 4 bits in groups of 32",
        "Q8_0": "the same weights in Q8_0, 8 bits in groups of 32",
    }.items()
}
ENGINES = (
    TORCH_ENGINES
    | {
        name: LanguageEngine(f"torchquant {text}", torchquant(switches), rotated=name != PLAIN)
        for name, (text, switches) in SWITCHES.items()
    }
    | low_bits()
    | LLAMA_CPP
)
for _name in ("bf16", "torchquant", "torchquant-w4a8-g32", "torchquant-w4-g32"):
    for _step in ("compiled",) if _name == "bf16" else ("compiled", "fused"):
        ENGINES |= other_step(_name, ENGINES[_name], _step)
TORCH_AO = ("ao-onednn", "ao-fbgemm")
DEFAULT_ENGINES = (
    *("fp32", "bf16", *TORCH_AO, "torchao"),
    *(PLAIN, "torchquant", "torchquant-bf16-all"),
    *(f"torchquant-w4a8-g{group}" for group in (32, 64, 128)),
    *("torchquant-w4a8-g32-all", "torchquant-w4a8-g32-compiled", "torchquant-w4a8-g32-fused"),
    *(f"torchquant-w4-g{group}" for group in (32, 64, 128)),
    *("torchquant-w3a8-g32", "torchquant-w2a8-g32"),
    *LLAMA_CPP,
)
SMOKE_ENGINES = ("torchquant-bf16-all", "torchquant-w4a8-g32-fused")
