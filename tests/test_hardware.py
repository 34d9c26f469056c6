"""Precision and peak: what `auto` means here, and a measured peak of a plausible size."""

from pathlib import Path

import pytest
import torch

from pretrain import hardware

CPU = torch.device("cpu")


def test_auto_is_bf16_exactly_where_the_processor_multiplies_it():
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    expected = "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"
    assert hardware.resolve_precision("auto", CPU) == expected
    assert [hardware.resolve_precision(name, CPU) for name in ("bf16", "fp32")] == ["bf16", "fp32"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_measured_peak_names_its_source(precision):
    peak, source = hardware.peak_flops(CPU, precision)
    assert source == f"measured {precision} matrix product"
    assert 1e8 < peak < 1e14, "FLOP/s, not GFLOP/s"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_peak_comes_from_its_data_sheet():
    peak, source = hardware.peak_flops(torch.device("cuda", 0), "bf16")
    assert "data sheet" in source or "measured" in source
    assert peak > 1e13
