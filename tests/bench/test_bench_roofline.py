"""The machine's limits: what the loops in C++ return, and what is made of it."""

from __future__ import annotations

import pytest

from torchquant import cpu
from torchquant._extension import load
from torchquant.bench.roofline import Limit, Roofline, measure_roofline, measured_mebibytes

_C = load()


def test_peaks_are_those_of_this_cpus_instruction_sets() -> None:
    vector = [name for name in cpu.available_isas() if name != "scalar"]
    names = _C.peak_names()
    assert [name for name in names if name in vector] == vector
    assert ("fp32_fma_256" in names) == ("avx2" in vector)


def test_a_wider_instruction_is_faster_and_the_sign_costs() -> None:
    names = _C.peak_names()
    if "avx2" not in names:
        pytest.skip("no AVX2")
    gops = {name: _C.measure_peak(name, 1, 0.05) for name in names}
    assert all(5 < value < 1e5 for value in gops.values())
    assert gops["avx2"] < gops["avx2_saturating"]
    if "avx512_vnni" in gops:
        assert gops["avx512_vnni"] > gops["avx2_saturating"]
    if "amx_int8" in gops:
        assert gops["amx_int8"] > gops["avx512_vnni"]


@pytest.mark.parametrize("name", ["scalar", "sse9", ""])
def test_a_peak_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no peak of this name on this machine: {name}"):
        _C.measure_peak(name, 1, 0.01)


@pytest.mark.parametrize("size", [1, 511, 513, 100_003, 5 << 20], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bandwidth_of_any_size_on_any_number_of_threads(size: int, threads: int) -> None:
    expected = cpu.available_isas() != ("scalar",)
    assert (_C.measure_bandwidth(size, threads, 0.002) > 0.1) == expected


def test_the_naive_loop_computes_and_the_compiler_does_not_slow_it() -> None:
    as_written = min(_C.naive_product_seconds(4, 256, 256, False) for _ in range(5))
    vectorised = min(_C.naive_product_seconds(4, 256, 256, True) for _ in range(5))
    assert 0 < vectorised < 1.5 * as_written


def test_the_limit_is_the_longer_of_arithmetic_and_memory() -> None:
    roofline = Roofline(1, {"avx2": 100.0}, {1.0: 50.0, 16.0: 10.0})
    assert roofline.limit(10**9, 1 << 20, "avx2") == Limit(pytest.approx(0.01), "arithmetic")
    weights = 16 << 20
    assert roofline.limit(1, weights, "avx2") == Limit(pytest.approx(weights / 10e9), "bandwidth")
    assert roofline.limit(1, 1, "scalar") is None
    assert Roofline(1, {"avx2": 100.0}, {}).limit(1, 1, "avx2") is None


def test_bandwidth_is_that_of_the_nearest_size() -> None:
    roofline = Roofline(1, {}, {1.0: 50.0, 16.0: 10.0})
    assert [roofline.bandwidth(mib << 20) for mib in (1, 3, 5, 40)] == [50.0, 50.0, 10.0, 10.0]


def test_of_two_measurements_the_larger_figures_count() -> None:
    roofline = Roofline(1, {"avx2": 100.0}, {1.0: 50.0, 16.0: 10.0})
    again = Roofline(1, {"avx2": 90.0}, {1.0: 60.0, 16.0: 10.0})
    assert roofline.best_of(again) == Roofline(1, {"avx2": 100.0}, {1.0: 60.0, 16.0: 10.0})
    assert roofline.best_of(None) == roofline


def test_vpdpbusd_is_the_widest_there_is() -> None:
    assert Roofline(1, {"avx_vnni": 2.0, "avx512_vnni": 4.0}, {}).vpdpbusd() == 4.0
    assert Roofline(1, {"avx_vnni": 2.0, "avx2": 1.0}, {}).vpdpbusd() == 2.0
    assert Roofline(1, {"avx2": 1.0}, {}).vpdpbusd() is None


def test_small_layers_of_nearly_one_size_share_a_buffer_and_large_ones_do_not() -> None:
    sizes = measured_mebibytes([768 * 768, 800 * 768, 11008 * 4096, 11009 * 4096, 3])
    assert sizes == [0.0039, 0.5, 43.0, 43.0039]


def test_measuring_gives_a_figure_for_every_name_and_size() -> None:
    roofline = measure_roofline(1, [1 << 16], 0.002)
    assert list(roofline.gops) == _C.peak_names()
    if roofline.read:
        assert list(roofline.to_dict()["read"]) == ["0.0625"]
