"""Embedding models as sentence-transformers has them: a model without a head, a pooling, a normalisation, in a row.

It finds them in files beside the model's: modules.json lists them, each has a folder of its own.
"""

from typing import Any

from pretrain.config.schema import ModelConfig

MODULES, POOLING = "modules.json", "1_Pooling/config.json"
MODES = {"first": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
OTHER_MODES = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
NEW_NAMES = {"cls": "first", "mean": "mean", "lasttoken": "last"}
KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def sentence_files(config: ModelConfig, length: int) -> dict[str, Any]:
    """File name -> content, for a model of head=embedding that reads texts up to `length` tokens."""
    modules = [{"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for number, (path, kind) in enumerate(KINDS.items())]  # fmt: skip
    modes = {f"pooling_mode_{mode}": mode == MODES[config.pooling] for mode in (*MODES.values(), *OTHER_MODES)}
    return {
        MODULES: modules,
        POOLING: {"word_embedding_dimension": config.width, **modes, "include_prompt": True},
        "sentence_bert_config.json": {"max_seq_length": length, "do_lower_case": False},
    }


def pooling_of(modules: Any, pooling: dict[str, Any]) -> str | None:
    """Our `pooling` of a folder's modules.json and 1_Pooling/config.json; None for what is no such row."""
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds != list(KINDS.values()):
        return None
    if isinstance(pooling.get("pooling_mode"), str):  # since version 6
        return NEW_NAMES.get(pooling["pooling_mode"])
    modes = [key.removeprefix("pooling_mode_") for key, value in pooling.items() if key in _SWITCHES and value]
    return next((ours for ours, mode in MODES.items() if modes == [mode]), None)


_SWITCHES = {f"pooling_mode_{mode}" for mode in (*MODES.values(), *OTHER_MODES)}
