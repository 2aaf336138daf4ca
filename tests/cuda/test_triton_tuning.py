"""gemm's configurations, tried on random tensors of a call's shape: in Triton's interpreter."""

import warnings
from dataclasses import replace

import pytest
import torch
from support import assert_same_bits, floats, integers, positive
from support import triton as support_triton

from torchquant.triton.tuning import choose as tuning

gemm, gemm_configs, gemm_tuning, linear = (
    support_triton.module(name)
    for name in ("gemm.run", "gemm.configs", "gemm.tuning", "ops.linear")
)

M, N, K = 5, 37, 83


def packed(n=N, k=K):
    return torch.ops.torchquant_aten.pack_weight(integers(n, k).to(support_triton.DEVICE))


def arguments(**changes):
    """Of linear_dynamic, by name."""
    given = {
        "input": floats(M, K),
        "packed": packed(),
        "weight_scale": positive(N),
        "weight_zero_point": None,
        "bias": floats(N, seed=2),
        "out_features": N,
        **changes,
    }
    move = support_triton.to_device
    return {k: move(v)[0] if isinstance(v, torch.Tensor) else v for k, v in given.items()}


PROBLEMS = {
    "dynamic": lambda: linear.linear_dynamic(**arguments(activation="gelu")),
    "asymmetric": lambda: linear.linear_dynamic(
        **arguments(symmetric=False, weight_zero_point=integers(N).int(), bias=None)
    ),
    "bfloat16": lambda: linear.linear_dynamic(**arguments(output_dtype=torch.bfloat16)),
    "sums": lambda: linear.int8_mm(
        *support_triton.to_device(integers(M, K, dtype=torch.uint8)), packed(), N
    ),
    "to_int8": lambda: linear.linear_static(
        *support_triton.to_device(integers(M, K), positive(1), integers(1).int()),
        packed(),
        *support_triton.to_device(positive(N), None, integers(N, dtype=torch.int8).int()),
        N,
        "relu",
        torch.int8,
        *support_triton.to_device(positive(1)),
        3,
    ),
}


@pytest.fixture
def tuner():
    """Whose times put the last candidate first."""
    times = iter(range(1000, 0, -1))

    def timer(call):
        call()
        return next(times) * 1e-6

    return tuning.Tuner(None, timer)


@pytest.fixture
def problems(tuner):
    """Collects the problems that calls pose, and lets ``tuner`` choose."""
    posed = []

    def choose(problem):
        posed.append(problem)
        return gemm_tuning.choose(problem, tuner)

    gemm.set_chooser(choose)
    yield posed
    gemm.set_chooser(None)


@pytest.mark.parametrize("call", PROBLEMS.values(), ids=PROBLEMS)
def test_every_candidate_is_right_and_the_fastest_runs(call, tuner, problems, monkeypatch):
    ran = []
    run = gemm.run
    monkeypatch.setattr(
        gemm, "run", lambda problem, config: (ran.append(config), run(problem, config))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="triton")  # numpy's, of overflow
        warnings.filterwarnings("ignore", "(overflow|invalid value) encountered")
        call()
    (problem,) = problems
    wanted = gemm_configs.candidates(problem)[: gemm_tuning.MOST_CANDIDATES]
    assert ran[-1] == wanted[-1] == tuner.chosen[gemm_tuning.key_of(problem)]
    assert ran == [*(config for config in wanted for _ in range(2)), wanted[-1]]
    call()
    assert len(ran) == 2 * len(wanted) + 2, "measured once"


def test_the_trial_is_not_the_calls_data(problems):
    """Zeros, on which every product is right, and values that nobody may change."""
    call = arguments(input=torch.zeros(M, K))
    linear.linear_dynamic(**call)
    (problem,) = problems
    trial = gemm_tuning.trial_of(problem)
    assert not problem.x[:, :K].any()
    assert trial.x[:, :K].any(1).all()
    assert (trial.x.shape, trial.x.stride()) == (problem.x.shape, problem.x.stride())
    assert (trial.out.shape, trial.out.dtype) == (problem.out.shape, problem.out.dtype)
    expected = gemm.reference(trial)
    assert expected.isfinite().all()
    assert expected.abs().median() < 5, "where activations bend"
    assert gemm_tuning.key_of(trial) == gemm_tuning.key_of(problem)


def test_a_candidate_that_does_not_write_its_output(problems, monkeypatch):
    run, lazy = gemm.run, []

    def run_all_but_one(problem, config):
        lazy[:] = lazy or [config]
        if config != lazy[0]:
            run(problem, config)

    monkeypatch.setattr(gemm, "run", run_all_but_one)
    with pytest.warns(RuntimeWarning, match="does not use a configuration that computes wrong"):
        PROBLEMS["dynamic"]()


def test_no_right_candidate_leaves_the_product_to_aten(problems, monkeypatch):
    expected = PROBLEMS["dynamic"]()
    monkeypatch.setattr(gemm, "run", lambda problem, config: None)
    tuner = tuning.Tuner(None, lambda call: 1.0)
    gemm.set_chooser(lambda problem: gemm_tuning.choose(problem, tuner))
    with pytest.warns(RuntimeWarning, match="computes wrong numbers"):
        assert_same_bits(PROBLEMS["dynamic"](), expected)
    assert list(tuner.chosen.values()) == [None]
    assert_same_bits(PROBLEMS["dynamic"](), expected)


def test_keys(problems):
    """What changes the choice changes the key, and its text in the file; rows share powers of 2."""
    PROBLEMS["dynamic"]()
    (problem,) = problems
    key = gemm_tuning.key_of(problem)
    assert str(key) == (
        f"gemm 8x{N}x128 int8 float32 1 None 1 None float32 False gelu True {problem.stores_by_tma}"
    )
    other = {
        "rows": replace(problem, out=problem.out.new_empty(9, N)),
        "same rows": replace(problem, out=problem.out.new_empty(8, N)),
        "type": replace(problem, out=problem.out.bfloat16()),
        "bias": replace(problem, bias=None),
        "activation": replace(problem, activation="relu"),
        "zero point": replace(problem, zero_point=problem.row_sums),
        "input": replace(problem, x=problem.x.view(torch.uint8)),
        "alignment": replace(problem, x=problem.x[:, 1:]),
    }
    texts = {name: str(gemm_tuning.key_of(changed)) for name, changed in other.items()}
    same = [name for name, text in texts.items() if text == str(key)]
    assert same == ["same rows", "zero point"], "the zero point is None in both"
    assert len(set(texts.values())) == len(texts) - 1


def test_configurations_survive_the_file(tmp_path, problems):
    PROBLEMS["dynamic"]()
    options = gemm_configs.candidates(problems[0])
    assert len({str(tuning.as_json(config)) for config in options}) == len(options)


def test_install(monkeypatch):
    monkeypatch.setattr(gemm, "_choose", gemm_configs.default_config)
    gemm_tuning.install()
    assert gemm._choose is gemm_tuning.choose
