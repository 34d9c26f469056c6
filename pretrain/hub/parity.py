"""Proof that a Hugging Face folder and weights of ours are one model, and its tokenizer ours: nothing is believed.

`transformers` loads the folder in a process of its own (`reference`) and computes; we compute the same from our own
weights, which are read module by module, so that memory is bounded by the largest of them. Compared are the ids and
the decoding of tricky texts, logits (or hidden states, or embeddings) on real text and on random ids, with and without
padding, and what continues prompts. The first difference is a `ValueError` that says where they part.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pretrain.checkpoint.tensors import TensorFolder
from pretrain.cli import child
from pretrain.config.schema import ModelConfig
from pretrain.hub.families import auto_class, label_names
from pretrain.model.heads import EmbeddingModel, build_model
from pretrain.stream.order import hash_key
from pretrain.tokenizer.tokenizer import TRICKY_TEXTS, Tokenizer

TOLERANCE = 1e-4  # of fp32 logits and hidden states, absolute
LENGTH, NEW_TOKENS = 160, 24
LONGEST = 640  # rows reach beyond a sliding window that fits in them
RANDOM_ROWS = 2
MASK_EVERY = 7
ENGLISH = """It was the hour before the market opened, and the square still belonged to the pigeons. An old woman in a
green coat set down her basket, counted the coins in her glove twice, and looked up at the clock as if it owed her an
answer. “Four minutes,” she said to nobody. Behind her the baker's boy was dragging shutters across the stones; the
noise went round the houses and came back from the river. By the time the first carts arrived, heavy with cabbages,
leeks and late plums, she had sold her only cheese, for which she had walked eleven miles, to a man who did not ask
the price."""
CODE = """import heapq


def shortest_paths(graph, start):
    '''Distances from `start` to every node that can be reached (Dijkstra, 1959).'''
    distances = {start: 0.0}
    queue = [(0.0, start)]
    while queue:
        distance, node = heapq.heappop(queue)
        if distance > distances[node]:
            continue  # an older, longer way
        for neighbour, length in graph[node].items():
            if distance + length < distances.get(neighbour, float("inf")):
                distances[neighbour] = distance + length
                heapq.heappush(queue, (distances[neighbour], neighbour))
    return distances


print(shortest_paths({"a": {"b": 7, "c": 3}, "b": {}, "c": {"b": 1.5}}, "a"))
"""
CHINESE = """清晨的集市还没有开门，广场上只有几只鸽子。一位穿绿色外衣的老人放下篮子，把手套里的硬币数了两遍，
然后抬头看了看钟楼。“还有四分钟。”她自言自语地说。面包店的学徒正在石板路上拖动木板，声音绕过房屋，又从河边传了回来。
等到第一批大车载着白菜、韭葱和晚熟的李子到来时，她已经卖掉了唯一的一块奶酪。
为了它，她走了十一里路，而买下它的人连价钱都没有问。"""
PASSAGES = {"the English passage": ENGLISH, "the code passage": CODE, "the Chinese passage": CHINESE}
POOLERS = ("bert", "roberta")  # their AutoModel would make up a pooler that the file lacks
COMPARED = {"pooled": "hidden states", "none": "hidden states", "embedding": "embeddings"}  # of others logits
PROMPTS = ("The history of the city begins", "def main():\n    ", "今天天气")


@dataclass(frozen=True)
class Row:
    """Ids that both sides compute with; `what` they are, for messages."""

    what: str
    ids: list[int]


@torch.no_grad()
def prove(
    folder: Path, config: ModelConfig, read: Callable[[str], torch.Tensor], tokenizer: Tokenizer, scratch: Path,
    allowed_unused: Collection[str] = (), length: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Compare a folder with the model `config`, `read(name)` its weights. Returns what was compared, and the
    differences. `scratch` is made, and removed; `allowed_unused`: tensors of the folder that no model needs; `length`:
    where texts are to be cut.
    """
    scratch.mkdir()
    try:
        hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        batches = make_batches(config, tokenizer, hf)
        prompts = make_prompts(config, tokenizer)
        request = {
            "auto_class": auto_class(config), "dtype": dtype_of(folder), "texts": TRICKY_TEXTS,
            "long_text": " ".join(PASSAGES.values()) * length, "batches": [inputs_of(*batch) for batch in batches],
            "prompts": prompts, "new_tokens": min(NEW_TOKENS, config.max_positions - max(map(len, prompts), default=0)),
            "arguments": {"add_pooling_layer": False}
            if config.head in ("none", "embedding") and hf["model_type"] in POOLERS else {},
            "is_embedding": config.head == "embedding",
        }  # fmt: skip
        answer = ask(folder, request, scratch)
        check_loading(answer, allowed_unused)
        check_texts(answer, tokenizer)
        if length:
            check_cut(answer["cut"], request["long_text"], tokenizer, config, length)
        if config.labels and answer["labels"] != label_names(hf):
            raise ValueError(f"the names of labels part: transformers has {answer['labels'][:9]} and this program "
                             f"{label_names(hf)[:9]}")  # fmt: skip
        model = streamed(config, read)
        worst = [check_batch(model, batch, tokenizer, scratch, number) for number, batch in enumerate(batches)]
        check_continuations(model, answer, prompts, tokenizer)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    lengths = [len(row.ids) for rows, *_ in batches for row in rows]
    whole_rows = config.head in ("sequence", "embedding")
    return {
        "max_difference": max(worst),
        "compared": COMPARED.get(config.head, "logits"),
        "positions": len(lengths) if whole_rows else sum(lengths),
        "unit": "rows" if whole_rows else "positions",
        "continued_tokens": sum(map(len, answer["continuations"])),
        "texts": len(TRICKY_TEXTS),
        "transformers": answer["transformers"],
        "class": answer["class"],
    }


def dtype_of(folder: Path) -> str:
    """As which the files can be mapped as they are; float32 when they are of several kinds."""
    tensors = TensorFolder(folder)
    kinds = {tensors.dtype(name) for name in tensors.names}
    return {"BF16": "bfloat16", "F16": "float16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def make_batches(
    config: ModelConfig, tokenizer: Tokenizer, hf: dict[str, Any]
) -> list[tuple[list[Row], bool, bool, int]]:
    """(rows, whether they are padded, whether their second halves are another segment, padding): real text, random
    ids.
    """
    length = LENGTH
    if LENGTH < config.sliding_window + 32 <= LONGEST:
        length = config.sliding_window + 32
    length = min(length, config.max_positions)
    passages = {what: [*tokenizer.prefix, *tokenizer.encode(text)] for what, text in PASSAGES.items()}
    texts = [Row(what, (ids * (length // len(ids) + 1))[:length]) for what, ids in passages.items()]
    if not config.causal and tokenizer.mask is not None:
        texts = [Row(row.what + ", masked", masked(row.ids, tokenizer.mask)) for row in texts]
    # theirs find padding by its id, a RoBERTa to count positions, a causal model a text's end: inside there is none
    pad, finds_end = hf.get("pad_token_id"), config.head == "sequence" and config.pooling == "last"
    forbidden = hf.get("pad_token_id", 1) if hf.get("model_type") == "roberta" else pad if finds_end else None
    whole = [*texts, *(Row(f"random ids, row {row}", random_ids(config, length, row, forbidden))
                       for row in range(RANDOM_ROWS))]  # fmt: skip
    lengths = [max(1, length * (4 - number) // 4) for number in range(len(texts))]
    if finds_end and pad is None:  # they take one row at a time
        return [([row], False, False, 0) for row in whole]
    cut = [Row(row.what + ", padded", row.ids[:shorter]) for row, shorter in zip(texts, lengths, strict=True)]
    return [(whole, False, False, 0), (cut, True, config.segments > 1, pad or 0)]


def masked(ids: list[int], mask: int) -> list[int]:
    return [mask if place % MASK_EVERY == MASK_EVERY - 1 else id_ for place, id_ in enumerate(ids)]


def random_ids(config: ModelConfig, length: int, row: int, forbidden: int | None) -> list[int]:
    """Ids spread over the whole vocabulary, the first and the last among them."""
    ids = [hash_key(row, place) % config.vocab_size for place in range(length)]
    ids[: 2 * (length > 2)] = [config.vocab_size - 1, 0][: 2 * (length > 2)]
    return [(id_ + 1) % config.vocab_size if id_ == forbidden else id_ for id_ in ids]


def make_prompts(config: ModelConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of the prompts, with room for what continues them; none where the model does not continue."""
    if config.head != "lm" or not config.causal or config.max_positions < 2:
        return []
    room = max(1, config.max_positions // 2)
    return [[*tokenizer.prefix, *tokenizer.encode(text)][:room] for text in PROMPTS]


def inputs_of(rows: list[Row], padded: bool, segmented: bool, pad: int = 0) -> dict[str, list[list[int]]]:
    """What transformers is given for a batch."""
    length = max(len(row.ids) for row in rows)
    inputs = {"input_ids": [row.ids + [pad] * (length - len(row.ids)) for row in rows]}
    if padded:
        inputs["attention_mask"] = [[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows]
    if segmented:
        inputs["token_type_ids"] = [[int(place > len(row.ids) // 2) for place in range(length)] for row in rows]
    return inputs


def ask(folder: Path, request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What transformers makes of the folder, in a process that ends with this one's interruption."""
    request = {"folder": str(folder.resolve()), "output": str(scratch.resolve()), **request}
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    package = str(Path(__file__).resolve().parent.parent.parent)
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    command = [sys.executable, "-m", "pretrain.hub.reference", str((scratch / "request.json").resolve())]
    with child(
        command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        said, _ = process.communicate()
    if process.returncode:
        raise ValueError(f"transformers cannot use {folder}: {' | '.join(said.strip().splitlines()[-3:])}")
    return json.loads((scratch / "answer.json").read_text(encoding="utf-8"))


def check_loading(answer: dict[str, Any], allowed_unused: Collection[str]) -> None:
    loading = dict(answer["loading"])
    loading["unexpected_keys"] = [name for name in loading["unexpected_keys"] if name not in allowed_unused]
    for kind, names in loading.items():
        if names:
            found = f"{kind}: {', '.join(names[:5])}"
            raise ValueError(f"transformers' {answer['class']} does not load the weights as they are: {found}")


def check_texts(answer: dict[str, Any], tokenizer: Tokenizer) -> None:
    for text, theirs in zip(TRICKY_TEXTS, answer["texts"], strict=True):
        ours = tokenizer.encode(text)
        if ours != theirs["ids"]:
            raise ValueError(f"the tokenizers part on {shortened(text)}: {difference(theirs['ids'], ours)}")
        around = [*tokenizer.prefix, *ours]
        called = theirs["as_called"]
        if called is not None and called not in (around, [*around, *tokenizer.suffix]):
            raise ValueError(f"the tokenizers part on {shortened(text)}, special tokens included: "
                             f"{difference(called, [*around, *tokenizer.suffix])}")  # fmt: skip
        if tokenizer.decode(ours) != theirs["decoded"]:
            raise ValueError(f"the tokenizers decode {shortened(text)} to different texts: transformers to "
                             f"{theirs['decoded']!r}, this program to {tokenizer.decode(ours)!r}")  # fmt: skip


def check_cut(theirs: list[int], text: str, tokenizer: Tokenizer, config: ModelConfig, length: int) -> None:
    """A pipeline cuts a long text where this program does, with the special tokens around it."""
    around = tokenizer.prefix, [] if config.causal else tokenizer.suffix
    inside = tokenizer.encode(text)[: length - sum(map(len, around))]
    ours = [*around[0], *inside, *around[1]]
    if theirs != ours:
        raise ValueError(f"a text of more than {length} tokens is cut to {len(theirs)} by transformers and to "
                         f"{len(ours)} by this program: {difference(theirs, ours)}")  # fmt: skip


def shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def difference(theirs: list[int], ours: list[int]) -> str:
    """Where two lists of ids part."""
    pairs = enumerate(zip(theirs, ours, strict=False))
    place = next((place for place, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    return (f"from id number {place} on, transformers has {theirs[place : place + 8]} and this program "
            f"{ours[place : place + 8]}")  # fmt: skip


def streamed(config: ModelConfig, read: Callable[[str], torch.Tensor]) -> nn.Module:
    """The model without weights: each module reads its own before it computes, and drops them after."""
    with torch.device("meta"):
        model = build_model(config).eval().requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        own = {kind: parameter for kind, parameter in module._parameters.items() if parameter is not None}

        def fill(module: nn.Module, _, own=own) -> None:
            for kind, parameter in own.items():
                module._parameters[kind] = nn.Parameter(read(names[id(parameter)]), requires_grad=False)

        def drop(module: nn.Module, *_, own=own) -> None:
            module._parameters.update(own)

        if own:
            module.register_forward_pre_hook(fill)
            module.register_forward_hook(drop)
    return model


def run(model: nn.Module, rows: list[Row], padded: bool, segmented: bool, pad: int = 0) -> dict[str, torch.Tensor]:
    """Our outputs of a batch, under transformers' names."""
    inputs = {name: torch.tensor(values) for name, values in inputs_of(rows, padded, segmented, pad).items()}
    documents = inputs["attention_mask"] - 1 if padded else None  # 0: the only document; -1: padding
    found = model(inputs["input_ids"], documents=documents, segments=inputs.get("token_type_ids"))
    if isinstance(found, tuple):
        return {"last_hidden_state": found[0], "pooler_output": found[1]}
    if isinstance(model, EmbeddingModel):
        return {"sentence_embedding": found}
    return {"logits" if hasattr(model, "head") else "last_hidden_state": found}


def check_batch(
    model: nn.Module, batch: tuple[list[Row], bool, bool, int], tokenizer: Tokenizer, scratch: Path, number: int
) -> float:
    """Compare our outputs of a batch with theirs, a row at a time; the largest difference."""
    worst, rows = 0.0, batch[0]
    for name, ours in run(model, *batch).items():
        path = scratch / f"{number}.{name}.npy"
        if not path.is_file():
            raise ValueError(f"transformers' model gives no {name}")
        theirs = np.load(path, mmap_mode="r", allow_pickle=False)
        if theirs.shape != tuple(ours.shape):
            raise ValueError(f"{name} of transformers' model has the shape {theirs.shape}, here {tuple(ours.shape)}")
        for index, row in enumerate(rows):
            cut = slice(len(row.ids)) if ours.dim() == 3 else slice(None)
            expected, found = torch.from_numpy(theirs[index][cut].copy()), ours[index][cut]
            gap = (expected - found).abs()
            if not (gap <= TOLERANCE).all():  # also when it is not a number
                raise ValueError(where_they_part(name, row, expected, found, tokenizer))
            worst = max(worst, gap.max().item())
    return worst


def where_they_part(name: str, row: Row, expected: torch.Tensor, found: torch.Tensor, tokenizer: Tokenizer) -> str:
    gap = (expected - found).abs().nan_to_num(nan=float("inf"))
    first = tuple((gap > TOLERANCE).nonzero()[0].tolist())
    place = ""
    if gap.dim() == 2:
        token = tokenizer.decode([id_ for id_ in row.ids[first[0] : first[0] + 1] if id_ < tokenizer.vocab_size])
        place = f" at position {first[0]} (id {row.ids[first[0]]}, {token!r})"
    return (
        f"{name} part on {row.what}{place}: number {first[-1]} is {expected[first].item():.6g} in transformers and "
        f"{found[first].item():.6g} here; the largest difference of this row is {gap.max().item():.3g}, allowed are "
        f"{TOLERANCE:g}"
    )


def check_continuations(
    model: nn.Module, answer: dict[str, Any], prompts: list[list[int]], tokenizer: Tokenizer
) -> None:
    """Each token that transformers' greedy generation chose is the likeliest here too, or as good as the likeliest."""
    if not prompts:
        return
    made = answer["continuations"]
    rows = [Row(text, prompt + more) for text, prompt, more in zip(PROMPTS, prompts, made, strict=True)]
    logits = run(model, rows, True, False)["logits"]
    for row, prompt, more, their_text, ours in zip(rows, prompts, made, answer["continued_texts"], logits, strict=True):
        for step, chosen in enumerate(more):
            scores = ours[len(prompt) + step - 1]
            if scores.max() - scores[chosen] > TOLERANCE:
                raise ValueError(f"the continuations of {row.what!r} part at token {step + 1}: transformers goes on "
                                 f"with id {chosen}, this model with id {int(scores.argmax())}")  # fmt: skip
        special = tokenizer.special_ids.values()
        our_text = tokenizer.decode([id_ for id_ in more if id_ < tokenizer.vocab_size and id_ not in special])
        broken = "\ufffd" in their_text and "\ufffd" in our_text  # bytes that are no text: each library's own way
        if our_text != their_text and not broken:
            raise ValueError(f"the continuation of {row.what!r} is decoded to different texts: transformers has "
                             f"{their_text!r}, this program {our_text!r}")  # fmt: skip
