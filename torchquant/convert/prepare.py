"""prepare_: attach observers to the layers that static activations need ranges for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from torchquant.configs import (
    Int8StaticActivationInt8WeightConfig,
    QuantizationConfig,
    Static,
    check_config,
)
from torchquant.convert.account import account_of
from torchquant.convert.attention import Separated, separated
from torchquant.convert.batches import call, structure
from torchquant.convert.calibration_hooks import hook_of, observe_input
from torchquant.convert.fold import fold_batch_norms, folded_rows, is_outdated
from torchquant.convert.notes import asked_problems, plan_notes, sentences
from torchquant.convert.plan import Step, check_model, check_strict, plan_layers
from torchquant.convert.regions import (
    cover,
    find,
    join_small_ones,
    kept,
    learn,
    region_reports,
    remember,
)
from torchquant.convert.selection import FilterFn, Selection, selection
from torchquant.graph.modules import tensor_bytes
from torchquant.nn.base import QuantizedModule
from torchquant.nn.folded_norm import BATCH_NORMS
from torchquant.report import QuantizationReport
from torchquant.report.progress import track
from torchquant.training.configuration import TrainingConfig

_WHO = "prepare_"


def prepare_(
    model: nn.Module,
    config: QuantizationConfig | Mapping[str, QuantizationConfig | None] | None = None,
    example_inputs: Any = None,
    *,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    progress: bool | None = None,
) -> QuantizationReport:
    """Prepare a model for calibration: the first of three calls that make static int8 layers.

    ``prepare_(model, config)``, ``calibrate(model, loader)`` and ``convert_(model)`` replace the
    layers of a model by layers whose activations have one scale each, without training. A prepared
    layer stays the same float object; an observer in a forward pre-hook sees its inputs during
    :func:`torchquant.calibrate`. The layers are the ones that :func:`torchquant.quantize_`
    replaces.

    Batch norms become part of the convolutions and linear layers before them, where the code of the
    model shows that nothing else reads what the layer returns: on all branches, in all methods, for
    all arguments. The report's ``foldings`` say where, and why others stay. An identity keeps the
    place of a folded batch norm. Folding is not taken back by any verb. A batch norm after a linear
    layer is folded if its input is known to have two dimensions; ``example_inputs`` show that.

    Between layers, values stay int8 in the converted model (residual additions, activations,
    pooling, concatenation), wherever the forward that connects them can be followed without
    running it on data. The report's ``regions`` say where that is, and where it is not and why;
    with ``example_inputs`` also how much of the arithmetic will run on integers. The model keeps
    its class, its submodules and its code.

    A prepared model can be copied with ``copy.deepcopy``, pickled, and stored with ``torch.save``,
    observers included. Its state dict has no observers, and no folded batch norms.

    Layers that are already prepared stay unchanged, so several calls with different filters prepare
    layers with different configurations. :func:`torchquant.to_float_` takes the preparation back,
    except that folded batch norms stay folded.

    Args:
        model: any module that contains layers. A bare layer cannot be replaced in place.
        config: the configuration of the converted layers, with static activations; None is
            :func:`torchquant.Int8StaticActivationInt8WeightConfig`. Its ``observer`` says how
            ranges are chosen. A dictionary gives layers different configurations, by name or
            pattern, as in :func:`quantize_`.
        example_inputs: a batch as :func:`torchquant.calibrate` takes it, or None. The model is run
            with it once, to check that it works, which layers it reaches, and how many dimensions
            the inputs of batch norms have.
        filter_fn: selects the layers to prepare, including small ones: a function of
            ``(module, name)``, a name pattern or a list of patterns, as in :func:`quantize_`. None
            selects all layers except those that are too small to benefit. A small linear layer
            benefits where other layers are called in the same region (see ``regions`` below).
        strict: if True, raise before anything is changed if something that was asked for cannot be
            done, as in :func:`quantize_`. False reports it.
        progress: whether to show a progress bar; None shows it in a terminal and in a notebook,
            after two seconds.

    Returns:
        A report; ``print`` it for a table.

    Raises:
        TypeError: model is not a module or is scripted, config is not a configuration, or filter_fn
            is neither callable nor patterns.
        ValueError: model is a bare layer; config has activations that need no calibration; the
            model cannot be called with example_inputs; a pattern is empty; or, with ``strict``,
            something that was asked for cannot be done.

    Example:
        >>> import torchquant
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> report = prepare_(model, torchquant.Int8StaticActivationInt8WeightConfig())
        >>> [(layer.name, layer.action) for layer in report.layers]
        [('0', 'prepared'), ('2', 'prepared')]
        >>> print(torchquant.calibrate(model, [torch.randn(8, 64)]).summary())
        2 layers observed over 1 batch, 8 samples
        >>> print(torchquant.convert_(model).summary().partition(";")[0])
        2 converted (100 % of parameters), 0 skipped
    """
    check_model(
        _WHO,
        model,
        trained="which is prepared for training; use its to_quantized()",
        quantized="which is quantized already; use it as it is",
        floating="which cannot be replaced in place; use nn.Sequential(layer) as the model",
    )
    chosen = selection(_WHO, filter_fn, config, _check_config)
    with separated(model, lambda: _plan(model, chosen)) as attention:
        return _prepare(model, chosen, attention, example_inputs, strict, progress)


def _prepare(
    model: nn.Module,
    chosen: Selection[QuantizationConfig],
    attention: Separated,
    example_inputs: Any,
    strict: bool,
    progress: bool | None,
) -> QuantizationReport:
    plan = attention.plan
    account = account_of(model, [step.module for step in plan])
    problems = asked_problems(model, plan, account, chosen)
    if strict:
        check_strict(_WHO, plan, account.others, problems)
    steps = [step for step in plan if step.skip is None]
    missed, ranks = ([], {}) if example_inputs is None else _tried(model, steps, example_inputs)
    found = find(model, _wanted(steps))
    join_small_ones(plan, found)
    steps = [step for step in plan if step.skip is None]
    size = tensor_bytes(model)
    attention.commit()
    with kept(model):
        foldings = fold_batch_norms(model, found.regions, _wanted(steps), ranks)
    if any(is_outdated(region) for region in found.regions):
        found = find(model, _wanted(steps))
    for step in track(steps, _WHO, progress):
        observe_input(step.module, step.name, step.config)
    regions = cover(model, found)
    if example_inputs is not None:
        with learn(regions):
            _run(model, example_inputs)
    rows = [step.skipped() if step.skip else step.marked("prepared") for step in plan]
    layers, others = account.filled(rows)
    general = (*sentences(problems), *plan_notes(model, plan, account, "prepare"))
    notes = (*general, *_notes(missed), *attention.notes())
    return QuantizationReport(
        layers,
        size,
        tensor_bytes(model),
        notes,
        tuple(foldings),
        "prepared",
        folded_rows(others, foldings),
        region_reports(model, remember(found)),
    )


def _wanted(steps: Iterable[Step]) -> Callable[[nn.Module], bool]:
    """Is a module one of the layers that are or will be prepared?"""
    chosen = {id(step.module) for step in steps}
    return lambda module: id(module) in chosen or hook_of(module) is not None


def _check_config(config: QuantizationConfig | None) -> QuantizationConfig:
    if config is None:
        return Int8StaticActivationInt8WeightConfig()
    if isinstance(config, TrainingConfig):
        raise TypeError(
            f"{_WHO}: config must be the configuration of a quantized layer, got {config!r}, which "
            "is for training; use prepare_qat_(model, config), train, and convert_(model)"
        )
    config = check_config(_WHO, config)
    if not isinstance(config.activations, Static):
        raise ValueError(
            f"{_WHO}: config must have static activations, got {config!r}, which need no "
            "calibration; use quantize_(model, config)"
        )
    return config


def _plan(model: nn.Module, chosen: Selection[QuantizationConfig]) -> list[Step]:
    def done(step: Step) -> str | None:
        hook = hook_of(step.module)
        if hook is None:
            quantized = isinstance(step.module, QuantizedModule)
            return "already quantized" if quantized else "prepared for training"
        config = chosen.config_of(step.names)[1]
        other = "" if config is None or hook.config == config else ", with another configuration"
        return f"already prepared{other}"

    def refusal(step: Step) -> str | None:
        if refused := step.kind.refusal(step.module):
            return refused
        refused = step.kind.config_refusal(step.config, step.module)
        return refused or step.kind.value_refusal(step.module)

    return plan_layers(model, chosen, done, refusal)


def _tried(
    model: nn.Module, steps: Iterable[Step], example: Any
) -> tuple[list[str], dict[int, set[int]]]:
    """What a run of the model with an example shows.

    Returns:
        The names of the layers that the run does not reach, and the dimensions of the inputs of
        batch norms, by the norm's id.
    """
    called: set[int] = set()
    ranks: dict[int, set[int]] = {}
    steps = list(steps)

    def see(norm: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            ranks.setdefault(id(norm), set()).add(args[0].dim())

    handles = [
        step.module.register_forward_pre_hook(lambda module, args: called.add(id(module)))
        for step in steps
    ]
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    handles += [norm.register_forward_pre_hook(see) for norm in norms]
    try:
        _run(model, example)
    except Exception as error:
        raise ValueError(
            f"{_WHO}: example_inputs must be a batch with which the model can be called, got "
            f"{structure(example)}, and the model raised {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return [step.name for step in steps if id(step.module) not in called], ranks


def _run(model: nn.Module, example: Any) -> None:
    """Run the model in evaluation mode, without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            call(_WHO, model, example)
    finally:
        for module, training in modes:
            module.training = training


def _notes(missed: list[str]) -> Iterator[str]:
    if missed:
        yield (
            f"Not reached by example_inputs: {', '.join(missed)}. Layers that no batch of the "
            "calibration reaches stay in float."
        )


__all__ = ["prepare_"]
