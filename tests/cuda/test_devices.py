"""Modules and verbs between devices, on a machine without a GPU: a pretended one, with values.

What only a GPU can show is in test_cuda_modules.py.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import assert_same_bits, floats
from support.layers import CONFIGS, assert_same_state, layer_of
from support.pretend import CUDA, Pretended, pretended_cuda, values
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import torchquant.convert.activations as fuse_activations
import torchquant.nn.linear as linear_module
import torchquant.nn.projections as projections
from torchquant import (
    Int8StaticActivationInt8WeightConfig,
    LSQQuantizer,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    ObservedQuantizer,
    PACTQuantizer,
    QATConfig,
    TrainingConfig,
    convert_,
    load,
    ops,
    prepare_qat_,
    quantize_,
    save,
    verify,
)
from torchquant.graph.trace import forward_traces
from torchquant.nn import LayerNorm, QATLinear, QuantizedLinear, RMSNorm
from torchquant.ops._arguments import packed_shape

HOST = torch.device("cpu")
verify_module = sys.modules[
    "torchquant.analysis.verify"
]  # the name in the package is the function's


def static_layer() -> QuantizedLinear:
    config = Int8StaticActivationInt8WeightConfig()
    zero_point = torch.tensor([3], dtype=torch.int32)
    return QuantizedLinear.from_float(
        nn.Linear(100, 37), config, input_scale=torch.tensor([0.02]), input_zero_point=zero_point
    )


LAYERS: dict[str, Callable[[], QuantizedLinear]] = {
    **{name: lambda c=config: layer_of(c, "gelu") for name, config in CONFIGS.items()},  # type: ignore[misc]
    "no_bias": lambda: layer_of(out_features=37, in_features=100, bias=False),
    "tiny": lambda: layer_of(out_features=1, in_features=1),
    "static": static_layer,
}


def on_cuda(x: Tensor) -> Tensor:
    return Pretended(x.clone())


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (17, 65), (100, 3), (1000, 64), (3, 4096)])
def test_shapes_of_both_layouts(n: int, k: int) -> None:
    weight = torch.zeros(n, k, dtype=torch.int8)
    assert packed_shape(n, k, HOST) == tuple(ops.pack_weight(weight).shape)
    there = torch.ops.torchquant_aten.pack_weight(weight)
    assert packed_shape(n, k, CUDA) == tuple(there.shape)
    with FakeTensorMode():
        fake = torch.empty(n, k, dtype=torch.int8, device=CUDA)
        assert ops.pack_weight(fake).shape == there.shape
        assert ops.quantize_pack(fake.float())[0].shape == there.shape
    assert there.numel() <= ops.pack_weight(weight).numel() + 2 * packed_shape(n, k, CUDA)[1]


def test_a_packed_weight_between_devices() -> None:
    weight = torch.randint(-128, 128, (20, 30), dtype=torch.int8)
    packed = ops.PackedWeight.pack(weight)
    assert packed.to("cpu") is packed
    with pretended_cuda() as cuda:
        there = packed.to(cuda)
        assert there.packed.device == CUDA
        assert tuple(there.packed.shape) == packed_shape(20, 30, CUDA)
        back = there.to("cpu")
    assert torch.equal(back.unpack(), weight)
    assert torch.equal(back.packed, packed.packed)


# ---------------------------------------------------------------- QuantizedLinear


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_goes_to_the_gpu_and_back(make: Callable[[], QuantizedLinear]) -> None:
    layer = make()
    before, twin = layer.packed.clone(), copy.deepcopy(layer)
    x = floats(5, layer.in_features)
    with torch.no_grad(), pretended_cuda() as cuda:
        assert layer.to(cuda) is layer
        assert {t.device for t in (*layer.parameters(), *layer.buffers())} == {CUDA}
        assert tuple(layer.packed.shape) == packed_shape(
            layer.out_features, layer.in_features, CUDA
        )
        output = layer(on_cuda(x))
        assert output.device == CUDA
        copied = copy.deepcopy(layer)
        assert copied.packed.device == CUDA
        assert_same_bits(values(copied.packed), values(layer.packed))
        state = {key: values(tensor) for key, tensor in layer.state_dict().items()}
        layer.to("cpu")
    assert_same_bits(values(output), twin(x).detach())
    assert_same_bits(layer.packed, before)
    assert_same_state(layer, twin)
    assert all(torch.equal(state[key], tensor) for key, tensor in twin.state_dict().items())
    assert_same_bits(layer(x).detach(), twin(x).detach())


def test_dtypes_on_the_way() -> None:
    layer = layer_of()
    with pretended_cuda() as cuda:
        layer.to(cuda, torch.bfloat16)
        assert layer.packed.dtype == torch.int8
        assert layer.weight_scale.dtype == torch.float32
        assert layer.bias is not None
        assert (layer.bias.dtype, layer.bias.device) == (torch.float32, CUDA)


def test_a_layer_without_values_becomes_one_of_the_gpu() -> None:
    source = layer_of()
    state = source.state_dict()
    with pretended_cuda() as cuda:
        layer = layer_of(seed=5).to("meta").to_empty(device=cuda)
        assert tuple(layer.packed.shape) == packed_shape(32, 64, CUDA)
        assert not values(layer.qweight).any()
        layer.load_state_dict(state)
        assert layer.packed.device == CUDA
        assert torch.equal(values(layer.qweight), source.qweight)
        made = QuantizedLinear(64, 32, device=cuda)
        assert tuple(made.packed.shape) == packed_shape(32, 64, CUDA)
        made.load_state_dict({key: Pretended(value) for key, value in state.items()}, assign=True)
        assert torch.equal(values(made.qweight), source.qweight)
        made.to("meta")
        assert tuple(made.packed.shape) == packed_shape(32, 64, torch.device("meta"))


def test_a_move_that_fails_leaves_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, twin = layer_of(), layer_of()

    def full(weight: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(ops, "pack_weight", full)
    with pretended_cuda() as cuda, pytest.raises(torch.OutOfMemoryError):
        layer.to(cuda)
    monkeypatch.undo()
    assert torch.equal(layer.packed, twin.packed)


def test_input_on_another_device() -> None:
    layer = layer_of()
    with pretended_cuda() as cuda, torch.no_grad():
        with pytest.raises(ValueError, match="layer's device cpu, got one on cuda:0; move one"):
            layer(on_cuda(floats(2, 64)))
        layer.to(cuda)
        with pytest.raises(ValueError, match="layer's device cuda:0, got one on cpu; move one"):
            layer(nn.Parameter(floats(2, 64)))


@pytest.mark.parametrize("layer", [layer_of, static_layer], ids=["dynamic", "static"])
def test_autocast_of_the_gpu(layer: Callable[[], QuantizedLinear]) -> None:
    module = layer()
    x = floats(3, module.in_features)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") does nothing without a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        assert module(x).dtype == torch.float32, "the CPU's autocast is off"
        with torch.no_grad(), pretended_cuda() as cuda:
            assert module.to(cuda)(on_cuda(x)).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_quantized_where_the_float_layer_is(static: bool) -> None:
    linear = nn.Linear(100, 37)
    config = Int8StaticActivationInt8WeightConfig() if static else CONFIGS["asymmetric"]
    scale = torch.tensor([0.03]) if static else None
    here = QuantizedLinear.from_float(linear, config, input_scale=scale)
    x = floats(4, 100)
    with torch.no_grad(), pretended_cuda() as cuda:
        linear.to(cuda)
        assert linear_module.value_refusal(linear) is None
        layer = QuantizedLinear._from_tensors(
            linear.weight, linear.bias, config, "none", None, scale, None
        )
        assert {t.device for t in (*layer.parameters(), *layer.buffers())} == {CUDA}
        output = layer(on_cuda(x))
        layer.to("cpu")
    assert_same_bits(values(output), here(x).detach())
    assert_same_state(layer, here)


# ---------------------------------------------------------------- layers computed together


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 128), nn.Linear(64, 64, False), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def test_groups_form_again_on_the_gpu() -> None:
    model = Attention().eval()
    quantize_(model)
    group, twin = model.q._group, copy.deepcopy(model)
    assert group is not None
    x = floats(3, 64)
    with torch.no_grad(), pretended_cuda() as cuda:
        model.to(cuda)
        assert group.active
        assert model.k._group is group
        assert group.packed.device == CUDA
        rows = [packed_shape(layer.out_features, 64, CUDA)[0] for layer in model.children()]
        assert group.packed.shape[0] == sum(rows)
        first = values(model.k.packed).data_ptr() - values(group.packed).data_ptr()
        assert first == 64 * rows[0], "the members' weights are parts of the group's, no copies"
        arguments = (group.weight_scale, group.weight_zero_point, group.bias)
        packed = ops.linear_dynamic_split(
            on_cuda(x), group.packed, *arguments, out_features=[128, 64, 64], symmetric=False
        )
        apart = model(on_cuda(x))
        copied = copy.deepcopy(model)
        assert copied.q._group is not group
        assert copied.q._group.active
        model.to("cpu")
    expected = twin(x)
    assert_same_bits(torch.cat([values(part) for part in packed], -1), expected)
    assert_same_bits(values(apart), expected)
    assert group.active
    assert_same_bits(model(x).detach(), expected.detach())
    assert model.q._group is group


def test_a_member_that_stays_behind() -> None:
    model = Attention().eval()
    quantize_(model)
    group, twin = model.q._group, copy.deepcopy(model)
    assert group is not None
    with pretended_cuda() as cuda:
        model.k.to(cuda)
        assert not group.active
        assert projections.ProjectionGroup.obstacle([model.q, model.k]) == (
            "they are on different devices"
        )
        model.k.to("cpu")
    assert group.active
    with torch.no_grad():
        assert_same_bits(model(floats(3, 64)), twin(floats(3, 64)))


def test_an_output_is_for_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention().eval()
    quantize_(model)
    twin, x = copy.deepcopy(model), floats(3, 64)
    calls: list[Any] = []
    split, streams = projections._split, iter(["a", "a", "b", "b"])

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return split(*arguments)

    monkeypatch.setattr(projections, "_split", counted)
    monkeypatch.setattr(projections, "_stream_of", lambda input: next(streams))
    with torch.no_grad():
        output = model(x)  # q computes all on a; k takes its on a; v is called on b
        monkeypatch.undo()
        assert_same_bits(output, twin(x))
    assert len(calls) == 1
    assert model.v._group is not None


def test_streams_are_asked_for_on_gpus_only() -> None:
    assert projections._stream_of(torch.zeros(1)) is None


def test_autocast_for_gpus_between_layers_is_a_change_of_mode() -> None:
    class Net(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            torch.set_autocast_enabled("cuda", True)
            k = self.k(x)
            torch.set_autocast_enabled("cuda", False)
            return q + k

    trace = forward_traces(Net())[0]
    assert trace.failure is None
    assert len(set(trace.modes.values())) == 2
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(("kind", "fits"), [(nn.GELU, True), (nn.SiLU, False)])
def test_a_fused_activation_is_tried_on_the_layers_device(
    kind: type[nn.Module], fits: bool
) -> None:
    layer = layer_of(bias=False)  # gradients are on there, and a pretended GPU has none
    with pretended_cuda() as cuda:
        pair = fuse_activations._Pair(layer.to(cuda), torch.float32)
        assert fuse_activations._agree(pair, kind(), "gelu") is fits
        assert layer.activation == "none"


# ---------------------------------------------------------------- training


QAT_CONFIGS = {
    "dynamic": QATConfig(),
    "static": QATConfig(activations="static"),
    "learned": QATConfig(
        weight_bits=4,
        activation_bits=4,
        activations="static",
        learned_weights=True,
        learned_activations=True,
        learned_offset=True,
    ),
}


@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_a_prepared_layer_on_the_gpu(config: TrainingConfig) -> None:
    torch.manual_seed(0)
    layer = QATLinear(64, 32, config=config, activation="relu")
    layer(floats(8, 64))  # ranges and first steps
    layer.eval()
    x = floats(5, 64, seed=3)
    with torch.no_grad():
        expected, deployed = layer(x), layer.to_quantized()
    twin = copy.deepcopy(layer)
    with torch.no_grad(), pretended_cuda() as cuda:
        layer.to(cuda)
        output = layer(on_cuda(x))
        converted = layer.to_quantized()
        assert converted.packed.device == CUDA
        again = converted(on_cuda(x))
        converted.to("cpu")
        layer.to("cpu")
    assert_same_bits(values(output), expected)
    assert_same_bits(values(again), expected)
    assert_same_state(converted, deployed)
    assert_same_state(layer, twin)


@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_ranges_and_steps_move_alike(config: TrainingConfig) -> None:
    """In training mode, without gradients: what observers and quantizers keep is the CPU's."""
    torch.manual_seed(0)
    here = QATLinear(64, 32, config=config)
    with torch.no_grad():
        here(floats(8, 64))
        with pretended_cuda() as cuda:
            there = copy.deepcopy(here).to(cuda)
            for seed in range(3):
                batch = floats(8, 64, seed=seed)
                output = there(on_cuda(batch))
                assert_same_bits(values(output), here(batch))
            there.to("cpu")
    assert_same_state(there, here)


def test_first_steps_and_offsets_are_the_cpus() -> None:
    x = floats(64, 64)
    with torch.no_grad():
        for make in (
            lambda: LSQQuantizer(bits=4, symmetric=False),
            lambda: LSQQuantizer(bits=4, symmetric=False, per_channel=True, num_channels=64),
        ):
            here = make()
            here(x)
            with pretended_cuda() as cuda:
                there = make().to(cuda)
                there(on_cuda(x))
                there.to("cpu")
            assert_same_state(there, here)


def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CPU tensors take the ways of a GPU's; to look at a value raises."""
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda tensor: False))
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))


def test_looking_at_a_fake_value_raises() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.zeros(1) > 0)


@pytest.mark.parametrize(
    "make",
    [
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        ObservedQuantizer,
        PACTQuantizer,
        LSQQuantizer,
        lambda: LSQQuantizer(symmetric=False),
        lambda: LSQQuantizer(per_channel=True, num_channels=8),
    ],
    ids=["minmax", "moving", "fake", "pact", "lsq", "lsq_plus", "lsq_channels"],
)
def test_quantizers_do_not_wait_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module]
) -> None:
    no_host(monkeypatch)
    with FakeTensorMode():
        module = make()
        _started(module)
        for _ in range(2):
            x = torch.empty(8, 64, requires_grad=True)
            module(x).sum().backward()


@pytest.mark.parametrize("config", QAT_CONFIGS.values(), ids=QAT_CONFIGS)
def test_a_training_step_does_not_wait_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, config: TrainingConfig
) -> None:
    no_host(monkeypatch)
    with FakeTensorMode():
        layer = QATLinear.__new__(QATLinear)  # from_float wants plain parameters
        nn.Module.__init__(layer)
        layer._init(nn.Linear(64, 32), config, "relu")
        _started(layer)
        x = torch.empty(8, 64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None


def _started(module: nn.Module) -> None:
    """As after the first batch, at which a quantizer may look, once."""
    for part in module.modules():
        if isinstance(part, LSQQuantizer):
            part._initialized = True
        if isinstance(part, ObservedQuantizer):
            part._has_scale = True


# ---------------------------------------------------------------- norms


class LlamaRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)


def test_norms_on_the_gpu() -> None:
    float_norms = [LlamaRMSNorm(64), nn.RMSNorm(64, eps=1e-5), nn.LayerNorm(64)]
    here = [RMSNorm.from_float(norm) for norm in float_norms[:2]]
    here.append(LayerNorm.from_float(float_norms[2]))  # type: ignore[arg-type]
    x = floats(4, 64)
    with torch.no_grad():
        expected = [norm(x) for norm in here]
    with torch.no_grad(), pretended_cuda() as cuda:
        norm = LlamaRMSNorm(64).to(cuda)
        norm.weight = float_norms[0].to(cuda).weight
        rms: Any = RMSNorm(64)
        rms.weight, rms.eps = norm.weight, norm.variance_epsilon
        from torchquant.nn.norm import _rounds_before_weight

        assert _rounds_before_weight(norm, rms)
        outputs = [values(norm.to(cuda)(on_cuda(x))) for norm in here]
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(output, wanted)


# ---------------------------------------------------------------- files and verify


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.relu, self.down = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(self.relu(self.up(x)))
        return y if scale is None else y * scale


def test_a_file_is_loaded_onto_the_gpu(tmp_path: Path) -> None:
    model = Net().eval()
    quantize_(model)
    save(model, tmp_path / "file")
    x = floats(3, 64)
    with torch.no_grad(), pretended_cuda() as cuda:
        with torch.device("meta"):
            empty = Net().eval()
        loaded = load(tmp_path / "file", empty, device=cuda)
        assert {t.device for t in (*loaded.parameters(), *loaded.buffers())} == {CUDA}
        output = loaded(on_cuda(x))
        save(loaded, tmp_path / "again")
        assert not any(module._state_dict_hooks for module in loaded.modules())
        load(tmp_path / "file", loaded)  # the CPU, as ever
    assert {t.device for t in (*loaded.parameters(), *loaded.buffers())} == {HOST}
    assert_same_bits(values(output), model(x).detach())
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(
    ("device", "text"),
    [("meta", "device must hold values, got 'meta'"), ("gpu", "one of torch's devices, got 'gpu'")],
)
def test_devices_that_no_file_is_loaded_onto(tmp_path: Path, device: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(tmp_path / "no file", Net(), device=device)


@pytest.mark.parametrize("kind", ["converted", "prepared", "quantized"])
@pytest.mark.parametrize("to_cuda", ["first", "second", "both"])
def test_verify_between_devices(monkeypatch: pytest.MonkeyPatch, kind: str, to_cuda: str) -> None:
    monkeypatch.setattr(verify_module, "_cuda_generators", lambda devices: [])
    torch.manual_seed(0)
    first: nn.Module = Net()
    if kind == "quantized":
        quantize_(first.eval())
    else:
        prepare_qat_(first, QATConfig(activations="static"))
        first(floats(8, 64))
    second = copy.deepcopy(first)
    if kind == "converted":
        convert_(second)
    batches = [floats(3, 64), (floats(2, 64),), {"x": floats(4, 64), "scale": torch.ones(1)}]
    with pretended_cuda() as cuda:
        for model, name in ((first, "first"), (second, "second")):
            if to_cuda in (name, "both"):
                model.to(cuda)
        if to_cuda == "both" and kind != "converted":
            with pytest.raises(ValueError, match="verify: q"):
                verify(first, second, batches)
            return
        report = verify(first, second, batches)
    assert report.exact
    assert [layer.values for layer in report.layers] == [9 * 128, 9 * 64]
    places = {"first": ("cuda:0", "cpu"), "second": ("cpu", "cuda:0"), "both": ("cuda:0", "cuda:0")}
    assert report.devices == places[to_cuda]
    line = f"Devices: {report.devices[0]} (trained) and {report.devices[1]} (converted)"
    assert (line in str(report)) == (to_cuda != "both")


def test_verify_finds_a_difference_between_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_cuda_generators", lambda devices: [])
    first = Net().eval()
    quantize_(first)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.down.bias[3] += 1
    with pretended_cuda() as cuda:
        pairs = [(first, copy.deepcopy(second).to(cuda)), (copy.deepcopy(first).to(cuda), second)]
        for models in pairs:
            report = verify(*models, [floats(3, 64)])
            assert (report.layers[0].bits, report.layers[1].differing) == (0, 3)
            assert report.first_difference is not None
            assert report.first_difference.index == (0, 3)


def test_a_prepared_model_in_its_first_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_cuda_generators", lambda devices: [])
    first = Net()
    prepare_qat_(first)
    second = copy.deepcopy(first)
    second.up.enable_quantization(False)
    with pretended_cuda() as cuda, pytest.raises(ValueError, match=r"first stage \(up\)"):
        verify(first, second.to(cuda), [floats(3, 64)])


class Sample(NamedTuple):
    x: Tensor
    rows: list[Tensor]
    name: str


def test_batches_of_all_kinds_are_moved() -> None:
    x = floats(2, 3)
    batch = {"sample": Sample(x, [x, x], "text"), "rest": (x, 3)}
    assert verify_module._moved(batch, {HOST}) is batch, "nothing to move"
    assert verify_module._moved(batch, {HOST, CUDA}) is batch, "the model has several devices"
    with pretended_cuda():
        moved = verify_module._moved(batch, {CUDA})
    assert type(moved["sample"]) is Sample
    assert moved["sample"].name == "text"
    assert moved["rest"][1] == 3
    tensors = [moved["sample"].x, *moved["sample"].rows, moved["rest"][0]]
    assert all(tensor.device == CUDA and torch.equal(values(tensor), x) for tensor in tensors)


def test_generators_of_both_models() -> None:
    devices = [torch.device(name) for name in ("cuda:1", "cpu", "cuda:0", "meta")]
    assert verify_module._cuda_generators(devices) == [0, 1]
