"""What peft cannot do with quantized layers is refused in one line that says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.adapters import (
    add,
    batch,
    float_net,
    ia3,
    integers,
    lora,
    peft,
    prepared,
    quantized,
    readable_weight,
    static,
    train,
)
from torch import nn

import torchquant
from torchquant import Fusion, QATConfig
from torchquant.nn import QATLinear, QuantizedLinear

__all__ = ["readable_weight"]  # a fixture

pytestmark = pytest.mark.usefixtures("readable_weight")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "mica"])
def test_initialisations_that_change_the_weight(init: str) -> None:
    model = quantized()
    bits = integers(model)
    with pytest.raises(ValueError) as raised:
        add(model, lora(init_lora_weights=init))
    assert str(raised.value) == (
        "LoraConfig: init_lora_weights must be True, False, 'gaussian', 'orthogonal' or 'eva' for "
        f"quantized layers, got {init!r}, which changes the weight of the layer; add the adapters "
        "to the float model and call quantize_ afterwards"
    )
    assert all(torch.equal(value, bits[key]) for key, value in integers(model).items())


def test_a_second_adapter_whose_initialisation_changes_the_weight() -> None:
    adapted = add(float_net(), lora())
    torchquant.quantize_(adapted, filter_fn=lambda module, name: "lora_" not in name)
    with pytest.raises(ValueError, match=r"init_lora_weights must be True, .*got 'pissa'"):
        adapted.add_adapter("second", lora(init_lora_weights="pissa"))


def test_kasa() -> None:
    config = lora(kasa_config=peft.tuners.lora.KasaConfig())
    with pytest.raises(ValueError, match=r"LoraConfig: kasa_config must be None .*quantize_ after"):
        add(quantized(), config)


def test_prepared_layers_accept_what_changes_the_float_weight() -> None:
    model = prepared()
    weight = model.up.weight.clone()
    adapted = add(model, lora(init_lora_weights="pissa"))
    assert not torch.equal(adapted.base_model.model.up.base_layer.weight, weight)
    assert len(train(adapted, 2)) == 2


def test_target_parameters() -> None:
    config = lora(target_modules=["q_proj"], target_parameters=["up.weight"])
    with pytest.raises(RuntimeWarning, match="no parameter was matched"):  # by peft
        add(quantized(), config)
    adapted = add(prepared(), config)
    assert type(adapted.base_model.model.up).__name__ == "ParamWrapper"
    assert len(train(adapted, 2)) == 2


def test_a_layer_that_computes_an_activation() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0] = QuantizedLinear.from_float(model[0], activation="gelu")
    for config, where in (
        (lora(target_modules=["0"]), "'0', which computes"),
        (ia3(target_modules=["0"], feedforward_modules=[]), "one that computes"),
    ):
        with pytest.raises(ValueError) as raised:
            add(model, config)
        assert str(raised.value).partition(": ")[2] == (
            f"target_modules must name layers that compute no activation, got {where} 'gelu' "
            "itself; call quantize_ with fusion=torchquant.Fusion(activations=False), or add the "
            "adapters before quantize_"
        )
    model[0] = QATLinear.from_float(nn.Linear(64, 64), QATConfig(), activation="relu")
    with pytest.raises(ValueError, match=r"'relu' itself; add the adapters before prepare_qat_"):
        add(model, lora(target_modules=["0"]))


def test_adapters_first_leave_the_activation_to_its_module() -> None:
    """The second remedy: nothing is computed by a layer whose output an adapter changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    adapted = add(model, lora(target_modules=["0"], init_lora_weights=False))
    wanted = adapted(batch())
    torchquant.quantize_(adapted, filter_fn=lambda module, name: "lora_" not in name)
    got = adapted(batch())
    assert torch.nn.functional.cosine_similarity(got, wanted).min() > 0.999


OTHERS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, target_modules=["up"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["up"]),
    "lokr": lambda: peft.LoKrConfig(target_modules=["up"]),
    "oft": lambda: peft.OFTConfig(target_modules=["up"]),
    "boft": lambda: peft.BOFTConfig(target_modules=["up"], boft_block_size=4),
    "vera": lambda: peft.VeraConfig(target_modules=["up"]),
    "hra": lambda: peft.HRAConfig(target_modules=["up"]),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("make", [quantized, static, prepared])
def test_other_tuners_refuse_the_layers(make: Callable[[], nn.Module], config: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"not supported|No layers types compatible"):
        add(make(), config())


@pytest.mark.parametrize("name", ["loha", "lokr", "hra", "adalora"])
def test_other_tuners_refuse_to_merge_into_integers(name: str) -> None:
    """They would add the adapter to a copy of the weight, and the model would lose it."""
    adapted = peft.get_peft_model(float_net(), OTHERS[name]())
    torchquant.quantize_(adapted, filter_fn=lambda module, name: name.endswith("base_layer"))
    bits = integers(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match=r"^merge: adapters on quantized layers must be LoRA"):
            merge()
    assert all(torch.equal(value, bits[key]) for key, value in integers(adapted).items())
    torchquant.to_float_(adapted)
    assert isinstance(adapted.merge_and_unload().up, nn.Linear)


def test_modules_to_save_that_compute_an_activation() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1] = QuantizedLinear.from_float(model[1], activation="gelu")
    with pytest.raises(ValueError, match=r"^modules_to_save: .*'gelu' itself"):
        add(model, lora(target_modules=["0"], modules_to_save=["1"]))


def test_fused_activations_can_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    torchquant.quantize_(model, fusion=Fusion(activations=False))
    assert len(train(add(model, lora(target_modules=["0"])), 2)) == 2


def test_the_class_that_a_user_registered_is_used() -> None:
    class Own(peft.tuners.lora.layer.Linear):  # type: ignore[misc, name-defined]
        pass

    config = lora()
    config._register_custom_module({QuantizedLinear: Own})
    adapted = add(quantized(), config)
    assert type(adapted.base_model.model.up) is Own
