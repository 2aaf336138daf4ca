"""Checkpoints made by hand from the descriptions of their layouts, with numpy and Python.

Nothing here uses torchquant: words are put together integer by integer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Handmade:
    """Integers without a sign ``[N, K]``, zero points and scales ``[N, G]``, a group per input."""

    q: NDArray[np.int64]
    zero: NDArray[np.int64]
    scale: NDArray[np.float32]
    group: NDArray[np.int64]
    bits: int

    @property
    def values(self) -> Tensor:
        """``fl(float(q - z) * s)`` in float32."""
        centred = (self.q - self.zero[:, self.group]).astype(np.float32)
        return torch.from_numpy(centred * self.scale[:, self.group].astype(np.float32))


def handmade(
    bits: int = 4,
    outputs: int = 32,
    inputs: int = 64,
    size: int = 32,
    *,
    symmetric: bool = False,
    lowest_zero: int = 0,
    dtype: Any = np.float16,
    seed: int = 0,
) -> Handmade:
    random = np.random.default_rng(seed)
    groups = -(-inputs // size)
    zero = random.integers(lowest_zero, 2**bits, (outputs, groups))
    if symmetric:
        zero = np.full((outputs, groups), 2 ** (bits - 1))
    scale = random.uniform(0.01, 0.1, (outputs, groups)).astype(dtype)
    q = random.integers(0, 2**bits, (outputs, inputs))
    return Handmade(q, zero, scale, np.arange(inputs) // size, bits)


def words(integers: Sequence[int], bits: int) -> NDArray[np.int32]:
    """Integers without a sign one after the other in 32-bit words, the lowest bits first."""
    string = sum(int(value) << (bits * place) for place, value in enumerate(integers))
    count = -(-len(integers) * bits // 32)
    found = [(string >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
    return np.array(found, np.uint32).view(np.int32)


def packed_rows(matrix: NDArray[Any], bits: int) -> NDArray[np.int32]:
    return np.stack([words(row, bits) for row in matrix])


def gptq(made: Handmade, *, version: int = 1, borrow: bool = False) -> dict[str, NDArray[Any]]:
    """The tensors of a layer; with ``borrow`` 1 is subtracted from a whole word of zero points."""
    zeros = made.zero.T
    if version == 1 and not borrow:
        zeros = (zeros - 1) % 2**made.bits
    qzeros = packed_rows(zeros, made.bits)
    if version == 1 and borrow:
        ones = sum(1 << place for place in range(0, 32, made.bits))
        qzeros = ((qzeros.view(np.uint32).astype(np.int64) - ones) % 2**32).astype(np.uint32)
        qzeros = qzeros.view(np.int32)
    return {
        "qweight": packed_rows(made.q, made.bits).T.copy(),
        "qzeros": qzeros,
        "scales": made.scale.T.copy(),
        "g_idx": made.group.astype(np.int32),
    }


def awq(made: Handmade) -> dict[str, NDArray[Any]]:
    def ordered(matrix: NDArray[Any]) -> NDArray[Any]:
        return matrix.reshape(len(matrix), -1, 8)[..., AWQ_ORDER].reshape(len(matrix), -1)

    return {
        "qweight": packed_rows(ordered(made.q.T), 4),
        "qzeros": packed_rows(ordered(made.zero.T), 4),
        "scales": made.scale.T.copy(),
    }


def compressed(
    made: Handmade, *, packed: bool = True, zeros: bool = True
) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {"weight_scale": made.scale}
    half = 2 ** (made.bits - 1)
    if packed:
        tensors["weight_packed"] = packed_rows(made.q, made.bits)
        tensors["weight_shape"] = np.array(made.q.shape)
        if zeros:
            tensors["weight_zero_point"] = packed_rows(made.zero.T, made.bits).T.copy()
    else:
        tensors["weight"] = (made.q - half).astype(np.int8)
        if zeros:
            tensors["weight_zero_point"] = (made.zero - half).astype(np.int8)
    return tensors


def with_gaps(matrix: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Rows of integers in words that hold ``32 // bits`` of them each."""
    each = 32 // bits
    return np.stack(
        [
            np.concatenate([words(row[i : i + each], bits) for i in range(0, len(row), each)])
            for row in matrix
        ]
    )


def scheme(
    bits: int = 4,
    size: int | None = 32,
    symmetric: bool = False,
    inputs: Mapping[str, Any] | None = None,
    form: str = "pack-quantized",
    targets: Sequence[str] = ("Linear",),
) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one scheme."""
    strategy = "channel" if size is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    group = {"targets": [*targets], "weights": {**weights, "group_size": size}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {**group, "input_activations": inputs}},
        "ignore": ["lm_head"],
    }


def write(
    folder: Path,
    layers: Mapping[str, Mapping[str, NDArray[Any]]],
    config: Mapping[str, Any] | None,
    floats: Mapping[str, NDArray[Any]] | None = None,
    name: str = "model.safetensors",
) -> Path:
    """A folder with one file and config.json."""
    folder.mkdir(exist_ok=True, parents=True)
    tensors = {f"{layer}.{part}": t for layer, parts in layers.items() for part, t in parts.items()}
    tensors = {key: np.ascontiguousarray(t) for key, t in {**tensors, **(floats or {})}.items()}
    safetensors.numpy.save_file(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
    return folder


class Small(nn.Module):
    """Two layers and a norm."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32, bias=bias)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.first(x)))
        return y


def small(bias: bool = True, device: str = "cpu") -> Small:
    torch.manual_seed(5)
    with torch.device(device):
        return Small(bias).eval()


def floats_of(model: nn.Module, *without: str) -> dict[str, NDArray[Any]]:
    """The state of a model without some keys, as numpy arrays."""
    state = model.state_dict()
    return {key: value.numpy() for key, value in state.items() if key not in without}
