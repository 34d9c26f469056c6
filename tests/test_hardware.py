"""Precision and peak: what `auto` means here, and a measured peak of a plausible size."""

import os
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


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200 NVL"), ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200"), ("NVIDIA B200", "B200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"), ("NVIDIA L40", "L40"), ("NVIDIA L40S", "L40S"), ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Tesla T4", None),
        ("NVIDIA RTX A1000", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H100X", None),
    ],
)  # fmt: skip
def test_a_card_is_known_by_whole_words_and_its_form(name, known):
    assert hardware.known_gpu(name) == known


class Card:
    """What torch says of a GPU; there is none here."""

    def __init__(self, monkeypatch, name: str, has_bf16: bool):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        emulates = True  # as torch says of any card, unless asked to leave that out
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or (
            emulates and including_emulation))  # fmt: skip


def test_emulated_bf16_is_none(monkeypatch):
    gpu = torch.device("cuda", 0)
    Card(monkeypatch, "Tesla V100-SXM2-16GB", has_bf16=False)
    assert hardware.resolve_precision("auto", gpu) == hardware.resolve_precision("fp32", gpu) == "fp32"
    with pytest.raises(ValueError, match="bf16: Tesla V100-SXM2-16GB has it in software only, .*: take fp16 or fp32"):
        hardware.resolve_precision("bf16", gpu)
    Card(monkeypatch, "NVIDIA H200", has_bf16=True)
    assert hardware.resolve_precision("auto", gpu) == hardware.resolve_precision("bf16", gpu) == "bf16"
    assert hardware.peak_flops(gpu, "bf16") == (989e12, "NVIDIA H200: data sheet of H200, dense bf16")


def test_fp16_is_for_hardware_that_has_it(monkeypatch):
    Card(monkeypatch, "Tesla V100-SXM2-16GB", has_bf16=False)
    assert hardware.resolve_precision("fp16", torch.device("cuda", 0)) == "fp16"
    for has_it in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda has_it=has_it: has_it)
        if has_it:
            assert hardware.resolve_precision("fp16", torch.device("cpu")) == "fp16"
    with pytest.raises(
        ValueError, match="train.precision=fp16: this processor has it in software only: take bf16 or fp"
    ):
        hardware.resolve_precision("fp16", torch.device("cpu"))


def test_an_unknown_card_is_measured_and_said_so(monkeypatch):
    Card(monkeypatch, "NVIDIA RTX 9999", has_bf16=True)
    monkeypatch.setattr(hardware, "_measured_matmul", lambda device, precision: 7e12)  # needs the card
    found = hardware.peak_flops(torch.device("cuda", 0), "bf16")
    assert found == (7e12, "NVIDIA RTX 9999 is not in the table of peaks: measured bf16 matrix product")


def test_determinism_is_torch_s_to_be_asked_for(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        hardware.set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        hardware.set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_peak_comes_from_its_data_sheet():
    peak, source = hardware.peak_flops(torch.device("cuda", 0), "bf16")
    assert "data sheet" in source or "measured" in source
    assert peak > 1e13
