"""Text from a model, token by token, with a key/value cache: one prompt as it comes, or many at once.

Prompts of different lengths stand in a batch with their ends under each other, padding before them; a row leaves the
batch when it ends. What is drawn for a row depends on the seed, the number of the row and of the step, so that neither
the batches nor their order leave a trace.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pretrain.stream.order import hash_key, hash_keys, splitmix64_at
from pretrain.tokenizer.tokenizer import Tokenizer

_DRAWS = 0x67656E65  # keeps these random numbers apart from those of other uses
_CONTEXT = 32  # ids of a prompt that are decoded with what follows it
_PARTIAL = "\ufffd"  # what a decoder makes of bytes that are no whole character


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen: the likeliest at `temperature` 0, else drawn from softmax(logits / temperature).

    Drawn from the `top_k` likeliest ids (0: all), and of those from the smallest set of probability `top_p` (nucleus
    sampling, Holtzman et al., 2020).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("temperature must be at least 0, top-p in (0, 1], and top-k at least 0")

    def choose(self, logits_BV: torch.Tensor, rows: Sequence[int], step: int) -> torch.Tensor:
        """The id at this step of each of the rows with these numbers, int64[B]."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        chances = self._chances(logits_BV.float() / self.temperature).double().cumsum(-1)
        keys = hash_keys(hash_key(self.seed, _DRAWS), np.array(rows))
        draws = splitmix64_at(keys, np.full(len(rows), step, dtype=np.uint64)) >> np.uint64(32)
        draws = torch.from_numpy(draws.astype(np.float64) / 2**32).to(chances.device)
        return torch.searchsorted(chances, draws[:, None] * chances[:, -1:], right=True).squeeze(-1)

    def _chances(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Probabilities up to a factor; 0 of the ids that are not drawn from."""
        if self.top_p == 1 and not self.top_k:
            return logits_BV.softmax(-1)
        logits_BV, ids = logits_BV.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            logits_BV[:, self.top_k :] = float("-inf")
        chances = logits_BV.softmax(-1)
        before = chances.cumsum(-1) - chances
        kept = chances.masked_fill(before >= self.top_p, 0.0)  # the likeliest always stays: nothing is before it
        return torch.zeros_like(kept).scatter(-1, ids, kept)


GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8, top_p=0.95)


class Writer:
    """The text of ids that come one by one, as far as it is certain: whole characters, no part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str] = ()):
        """`prompt`: the ids before; `stops`: strings at which the text ends, before them."""
        self.tokenizer, self.stops, self.is_over = tokenizer, stops, False
        self.ids = prompt[-_CONTEXT:]  # with it, for some decoders drop the space of a first word
        self.said = len(tokenizer.decode(self.ids))

    def add(self, id_: int) -> str:
        """What is certain now and was not before; `is_over` is True after a stop string."""
        self.ids.append(id_)
        return self._new(is_last=False)

    def rest(self) -> str:
        """What was held back, when no ids come any more."""
        return self._new(is_last=True)

    def _new(self, is_last: bool) -> str:
        text = self.tokenizer.decode(self.ids)
        stops = [at for stop in self.stops if (at := text.find(stop, self.said)) >= 0]
        self.is_over = bool(stops)
        if stops:
            end = min(stops)
        elif is_last:
            end = len(text)
        elif text.endswith(_PARTIAL):  # the bytes of a character may still be coming
            end = self.said
        else:
            end = len(text) - self._begun(text[self.said :])
        new, self.said = text[self.said : end], end
        return new

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(text))
        ends = (size for size in range(longest, 0, -1) if any(s.startswith(text[-size:]) for s in self.stops))
        return next(ends, 0)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that a model continues a text from; for no text, what a text begins after."""
    return [*tokenizer.prefix, *tokenizer.encode(text)] or tokenizer.suffix[-1:]


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text."""
    return (tokenizer.suffix[-1] if tokenizer.eos is None else tokenizer.eos,)


def check(model: nn.Module, prompts: Sequence[list[int]], max_tokens: int) -> None:
    """`ValueError` for what cannot be continued."""
    config = _trunk(model).config
    if not config.causal:
        raise ValueError("this model is bidirectional (model.causal=false): it fills in, it does not continue")
    if config.head != "lm":
        raise ValueError(f"this model has no language model's output (model.head={config.head}): give one that has")
    if max_tokens < 1:
        raise ValueError(f"max-tokens is {max_tokens}: it must be at least 1")
    for number, prompt in enumerate(prompts, 1):
        assert prompt, "a prompt has at least the id that a text begins after"
        if len(prompt) >= config.max_positions:
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise ValueError(f"{which} has {len(prompt)} tokens, the model {config.max_positions} positions: shorten "
                             "the prompt")  # fmt: skip


def continue_text(
    model: nn.Module, tokenizer: Tokenizer, prompt: str | list[int], max_tokens: int, sampling: Sampling = SAMPLED, *,
    stop_ids: Sequence[int] | None = None, stops: Sequence[str] = (), row: int = 0,
) -> Iterator[str]:  # fmt: skip
    """Pieces of text that continue `prompt`, a text or ids; joined, they decode exactly as the ids do.

    It ends before `stop_ids` (left out: what ends a text), the strings `stops`, after `max_tokens`, or at the model's
    last position. `row`: the number that the randomness goes by.
    """
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
    check(model, [ids], max_tokens)
    return _pieces(
        Writer(tokenizer, ids, stops), _steps(model, [ids], max_tokens, sampling, [row], set(), bool),
        end_ids(tokenizer) if stop_ids is None else stop_ids,
    )  # fmt: skip


def _pieces(writer: Writer, steps: Iterator[list[tuple[int, int]]], stop_ids: Sequence[int]) -> Iterator[str]:
    for [(_, id_)] in steps:
        if id_ in stop_ids:
            break
        if piece := writer.add(id_):
            yield piece
        if writer.is_over:
            return
    if piece := writer.rest():
        yield piece


def generate_batch(
    model: nn.Module, prompts: Sequence[list[int]], max_tokens: int, sampling: Sampling = GREEDY, *,
    stop_ids: Sequence[int] = (), is_over: Callable[[int, list[int]], bool] = lambda row, ids: False,
    rows: Sequence[int] | None = None, all_done: Callable[[bool], bool] = bool,
) -> list[list[int]]:  # fmt: skip
    """The ids that continue each prompt, all in one batch, without the `stop_ids` that end some.

    A row is as it would be alone, up to the rounding of matrix products of other shapes. It also ends where
    `is_over(number of the row, its ids so far)` says so. `rows`: the numbers of the rows (0, 1, ...).
    `model` may be a DeepSpeed engine around a language model. Where several ranks must call it equally often (ZeRO-3),
    `all_done(whether this rank is done)` says whether all are; it is called once a step, on every rank, also on one
    without prompts.
    """
    check(model, prompts, max_tokens)
    rows = range(len(prompts)) if rows is None else rows
    found, ended = [[] for _ in prompts], set()
    for step in _steps(model, prompts, max_tokens, sampling, rows, ended, all_done):
        for place, id_ in step:
            if id_ not in stop_ids:
                found[place].append(id_)
            if id_ in stop_ids or is_over(rows[place], found[place]):
                ended.add(place)
    return found


def generate_all(
    model: nn.Module, prompts: Sequence[list[int]], max_tokens: int, batch_size: int, sampling: Sampling = GREEDY, *,
    stop_ids: Sequence[int] = (), is_over: Callable[[int, list[int]], bool] = lambda row, ids: False,
    on_rows: Callable[[int], object] = lambda count: None,
) -> list[list[int]]:  # fmt: skip
    """As `generate_batch`, in batches of prompts of similar lengths, the longest first; `on_rows(rows)` after each.

    The ids are in the order of the prompts, and so are the numbers of the rows.
    """
    check(model, prompts, max_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        chosen = [prompts[row] for row in rows]
        options = {"stop_ids": stop_ids, "is_over": is_over, "rows": rows}
        for row, ids in zip(rows, generate_batch(model, chosen, max_tokens, sampling, **options), strict=True):
            found[row] = ids
        on_rows(len(rows))
    return found


def generate_texts(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_tokens: int, batch_size: int,
    sampling: Sampling = GREEDY, *, stop_ids: Sequence[int] | None = None, stops: Sequence[str] = (),
    on_rows: Callable[[int], object] = lambda count: None,
) -> list[tuple[str, int]]:  # fmt: skip
    """For each prompt the text that `continue_text` would give, and how many ids it took, in batches."""
    writers = [Writer(tokenizer, prompt, stops) for prompt in prompts]
    texts = [""] * len(prompts)

    def is_over(row: int, ids: list[int]) -> bool:
        texts[row] += writers[row].add(ids[-1])
        return writers[row].is_over

    stop_ids = end_ids(tokenizer) if stop_ids is None else stop_ids
    options = {"stop_ids": stop_ids, "is_over": is_over, "on_rows": on_rows}
    found = generate_all(model, prompts, max_tokens, batch_size, sampling, **options)
    return [(text + writer.rest(), len(ids)) for text, writer, ids in zip(texts, writers, found, strict=True)]


def _trunk(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model).trunk  # a DeepSpeed engine holds the model as its module


@torch.no_grad()
def _steps(
    model: nn.Module, prompts: Sequence[list[int]], max_tokens: int, sampling: Sampling, rows: Sequence[int],
    ended: set[int], all_done: Callable[[bool], bool],
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Of each step (place in `prompts`, its next id) of every row that goes on. Those put in `ended` do not."""
    trunk = _trunk(model)
    limit, device = trunk.config.max_positions, trunk.embedding.weight.device
    room = [min(max_tokens, limit - len(prompt)) for prompt in prompts]
    going = list(range(len(prompts)))
    tokens, documents = _aligned(prompts, device)
    cache = trunk.new_cache(len(prompts), tokens.shape[1] + max(room, default=0))
    step = 0
    while not all_done(not going):
        if not going:  # the other ranks need this one's part of each weight
            model(torch.zeros(1, 1, dtype=torch.int64, device=device))
            yield []
            continue
        is_last = torch.zeros_like(tokens, dtype=torch.bool)
        is_last[:, -1] = True
        logits = model(tokens, cache=cache, documents=documents, at=is_last)
        chosen = sampling.choose(logits, [rows[place] for place in going], step)
        yield list(zip(going, chosen.tolist(), strict=True))
        step += 1
        stay = [i for i, place in enumerate(going) if place not in ended and step < room[place]]
        if len(stay) < len(going):
            going, chosen = [going[i] for i in stay], chosen[stay]
            documents = None if documents is None else documents[stay]
            for layer in cache:
                layer.keep(stay)
        tokens = chosen[:, None]
        documents = None if documents is None else nn.functional.pad(documents, (0, 1))


def _aligned(prompts: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens [B, T] that end together, and documents: 0, and -1 for the padding before; None where there is none."""
    length = max(map(len, prompts), default=0)
    padding = [length - len(prompt) for prompt in prompts]
    padded = [[0] * before + prompt for before, prompt in zip(padding, prompts, strict=True)]
    tokens = torch.tensor(padded, dtype=torch.int64, device=device).view(len(prompts), length)
    documents = -(torch.arange(length, device=device) < torch.tensor(padding, device=device)[:, None]).int()
    return tokens, documents if any(padding) else None
