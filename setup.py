"""The package `pretrain`. conf/ and tools/ lie beside it in a checkout and travel inside it in a wheel."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "pretrain" / "__init__.py").read_text(), re.MULTILINE)[1]
README = HERE / "README.md"
PACKAGES = sorted(".".join(init.relative_to(HERE).parts[:-1]) for init in (HERE / "pretrain").rglob("__init__.py"))

setup(
    name="pretrain",
    version=VERSION,
    description="Raw text to a trained language model: Hydra configs, DeepSpeed ZeRO, exact WebDataset streams",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*PACKAGES, "pretrain.conf", "pretrain.tools"],
    package_dir={"pretrain": "pretrain", "pretrain.conf": "conf", "pretrain.tools": "tools"},
    package_data={"pretrain.conf": ["*.yaml", "*/*.yaml"]},
    include_package_data=False,
    zip_safe=False,
    # Ranges; constraints.txt has the exact versions that set-up installs. The first three floors are security fixes.
    install_requires=[
        "hydra-core>=1.3.8,<1.4",
        "torch>=2.10",
        "sentencepiece>=0.2.3",
        "deepspeed>=0.19,<0.20",
        "webdataset",
        "wandb",
        "numpy",
        "safetensors",
        "tqdm",
        "zstandard",
        "fsspec",
        "jinja2>=3.1.6",
        "matplotlib",
        "pyyaml",
    ],
    extras_require={
        "http": ["aiohttp"],  # shards on http(s)://
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        "hf": ["transformers>=5.20,<6", "tokenizers"],  # Hugging Face models and tokenizers, in and out
        # write_shards.py: Parquet, near-duplicates, telephone numbers, Slurm arrays
        "prepare": ["pyarrow", "datasketch>=2", "phonenumbers", "submitit"],
        # figures of translations and summaries, tools/search.py
        "tasks": ["sacrebleu>=2.4", "rouge-score", "faiss-cpu"],
        "eval": ["lm-eval>=0.4.13,<0.5", "accelerate"],  # tools/evaluate.py --tasks
        "dev": ["pytest", "pytest-xdist", "scikit-learn", "ruff", "moto[s3]", "flask", "flask-cors"],
    },
)
