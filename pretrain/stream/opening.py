"""The data sets that a config names, opened and checked: the training stream, and the held-out windows."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pretrain.config.schema import DataConfig, TrainConfig
from pretrain.config.steps import phases
from pretrain.shards import manifest as manifests
from pretrain.shards.manifest import Manifest
from pretrain.shards.remote import CacheSettings
from pretrain.stream.mixture import Phase
from pretrain.stream.source import StreamOptions
from pretrain.stream.stream import Stream
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer


def cache_settings(data: DataConfig) -> CacheSettings | None:
    """Where copies of remote shards go, and how many of them."""
    folder = cache_folder(data)
    return None if folder is None else CacheSettings(folder, int(data.cache_gb * 1e9))


def cache_folder(data: DataConfig) -> Path | None:
    """`data.cache`; None where it is in the home of a user who has none: few runs need it."""
    path = os.path.expanduser(data.cache)
    return None if path.startswith("~") else Path(path)


def open_sources(data: DataConfig, trusting: bool = False) -> list[Manifest]:
    """The training data sets, each other than the others and all of one tokenizer. `trusting`: see `manifest.load`."""
    if not data.sources:
        raise ValueError("data.train has no value: give a folder of shards (tools/write_shards.py)")
    sources = [manifests.open_split(location, "train", cache_settings(data), trusting) for location in data.sources]
    seen: dict[str, str] = {}
    for manifest in sources:
        if manifest.fingerprint in seen:
            twice = f"{seen[manifest.fingerprint]} and {manifest.location}"
            raise ValueError(f"data.train has one data set twice, {twice}: name it once, with a greater weight")
        seen[manifest.fingerprint] = manifest.location
        manifest.check_tokenizer(sources[0].location, sources[0].tokenizer_sha256)
    return sources


def open_tokenizer(data: DataConfig, sources: list[Manifest]) -> Tokenizer:
    """The tokenizer that wrote the sources."""
    tokenizer = load_tokenizer(data.tokenizer or sources[0].tokenizer_path)
    for manifest in sources:
        manifest.check_tokenizer(tokenizer.path, tokenizer.sha256)
    return tokenizer


def planned_phases(train: TrainConfig, weights: list[float] | None, sources: Iterable[Manifest]) -> list[Phase]:
    """The phases of the config, weights included: without any, a source weighs as much as it has tokens."""
    by_size = [float(manifest.tokens) for manifest in sources]
    return [
        Phase(phase.from_step, phase.seq_len, phase.global_batch_size, tuple(phase.weights or by_size))
        for phase in phases(train, weights)
    ]


def open_training(
    data: DataConfig, train: TrainConfig, seed: int, sources: list[Manifest], rank: int, world_size: int
) -> Stream:
    """The training stream of one rank."""
    options = StreamOptions(
        packing=data.packing, documents=data.document_mask, quarantine=data.quarantine,
        prefetch_batches=data.prefetch_batches, cache_folder=cache_folder(data),
    )  # fmt: skip
    return Stream(sources, planned_phases(train, data.weights, sources), seed, rank, world_size, options)


def open_held_out(
    location: str, data: DataConfig, seq_len: int, tokenizer: Tokenizer, split: str = "val", trusting: bool = False
) -> Stream:
    """The windows of a data set in their natural order."""
    manifest = manifests.open_split(location, split, cache_settings(data), trusting)
    manifest.check_tokenizer(tokenizer.path, tokenizer.sha256)
    return Stream.in_order(manifest, seq_len, replace(StreamOptions(), documents=data.document_mask))
