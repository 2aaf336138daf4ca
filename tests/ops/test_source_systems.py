"""Numbers of the source systems, from the kernels."""

import json

import pytest
import torch
from support import (
    REFERENCE,
    assert_same_bits,
)

from torchquant import PackedWeight, functional, ops, quantized_linear
from torchquant.scheme import PerAxis


def test_source_system_5_comes_out_of_the_kernel(isa):
    """Its quantized fully-connected layer, exactly, from torchquant.quantized_linear."""
    reference = json.loads((REFERENCE / "linear_quantization.json").read_text())["quantized_fc"]
    bits = reference["bits"]
    x, weight = torch.tensor(reference["input"]), torch.tensor(reference["weight"])
    weight_scale = torch.tensor(reference["weight_scale"])
    qx = ops.quantize(x, reference["input_scale"], reference["input_zero_point"], qmin=-2, qmax=1)
    qweight = ops.quantize(weight, weight_scale, qmin=-2, qmax=1, granularity=PerAxis(0))
    qbias = torch.tensor(reference["quantized_bias"], dtype=torch.int32)
    options = {
        "input_scale": reference["input_scale"],
        "weight_scale": weight_scale,
        "output_scale": reference["output_scale"],
        "output_zero_point": reference["output_zero_point"],
        "output_bits": bits,
    }
    zero_point = reference["input_zero_point"]
    for packed in (qweight, PackedWeight.pack(qweight)):
        y = quantized_linear(qx, packed, qbias, **options, input_zero_point=zero_point)
        assert y.dtype == torch.int8
        assert y.tolist() == reference["expected_output"]
    # Its own form: the zero point folded into the bias beforehand.
    shifted = torch.tensor(reference["shifted_quantized_bias"], dtype=torch.int32)
    assert functional.shift_bias(qbias, qweight, zero_point).tolist() == shifted.tolist()
    y = quantized_linear(qx, qweight, shifted, **options)
    assert y.tolist() == reference["expected_output"]


def test_source_system_5_quantizes_on_the_kernel(isa):
    reference = json.loads((REFERENCE / "linear_quantization.json").read_text())["linear_quantize"]
    x = torch.tensor(reference["input"])
    q = ops.quantize(x, reference["scale"], reference["zero_point"], qmin=-2, qmax=1)
    assert q.tolist() == reference["expected"]


def test_source_system_1_round_trip_on_the_kernel(isa):
    """It adds the zero point before rounding; on its reference numbers that makes no difference."""
    reference = json.loads((REFERENCE / "affine_round_trip.json").read_text())
    x = torch.tensor(reference["x"])
    q = ops.quantize(x, reference["scale"], reference["zero_point"])
    assert q.tolist() == reference["quantized"]
    back = ops.dequantize(q, reference["scale"], reference["zero_point"])
    torch.testing.assert_close(back, torch.tensor(reference["dequantized"]))


@pytest.mark.parametrize("case", ["signed_midpoint", "unsigned_minimum"])
def test_source_system_3_real_zero_points_on_the_kernel(isa, case):
    reference = json.loads((REFERENCE / "real_zero_point.json").read_text())
    numbers, x = reference[case], torch.tensor(reference["x"])
    dtype = torch.int8 if case == "signed_midpoint" else torch.uint8
    zero_point = torch.tensor([numbers["zero_point"]])
    limits = {"qmin": numbers["qmin"], "qmax": numbers["qmax"], "dtype": dtype}
    q = ops.quantize(x, numbers["scale"], zero_point, **limits)
    assert_same_bits(q, functional.quantize(x, numbers["scale"], zero_point, **limits))
    assert (q.int() - torch.tensor(numbers["quantized"]).int()).abs().max() <= 1
    back = ops.dequantize(q, numbers["scale"], zero_point)
    torch.testing.assert_close(back, x, **reference["tolerance"])
