"""Sampling text from a model, token by token, with a key/value cache."""

from collections.abc import Iterator

import torch

from pretrain.data.tokenizer import Tokenizer
from pretrain.model.heads import LanguageModel


@torch.no_grad()
def sample_ids(
    model: LanguageModel, prompt: list[int], max_tokens: int, temperature: float, top_p: float, seed: int, stop: int
) -> Iterator[int]:
    """Ids after `prompt`, until `stop`, `max_tokens` or the model's last position.

    `temperature` 0 takes the likeliest; `top_p` samples from the smallest set of ids of that probability (nucleus
    sampling, Holtzman et al., 2020).
    """
    generator = torch.Generator().manual_seed(seed)
    capacity = min(len(prompt) + max_tokens, model.trunk.config.max_positions)
    cache = model.trunk.new_cache(1, capacity)
    tokens = torch.tensor([prompt])
    for _ in range(capacity - len(prompt)):
        logits = model(tokens, cache)[0, -1].float()
        chosen = int(logits.argmax()) if temperature == 0 else _draw(logits / temperature, top_p, generator)
        if chosen == stop:
            return
        yield chosen
        tokens = torch.tensor([[chosen]])


def _draw(logits_V: torch.Tensor, top_p: float, generator: torch.Generator) -> int:
    probabilities, ids = logits_V.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)  # the likeliest always stays: nothing is before it
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def check_sampling(model: LanguageModel, prompt: list[int], max_tokens: int, temperature: float, top_p: float) -> None:
    """`ValueError` for values that cannot be sampled with."""
    limit = model.trunk.config.max_positions
    if len(prompt) >= limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model {limit} positions: shorten the prompt")
    if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError("max-tokens must be at least 1, temperature at least 0, and top-p in (0, 1]")
    if not model.trunk.config.causal:
        raise ValueError("this model is bidirectional (model.causal=false): it fills in, it does not continue")


def continue_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, max_tokens: int, temperature: float = 0.8,
    top_p: float = 0.95, seed: int = 0,
) -> Iterator[str]:  # fmt: skip
    """Pieces of text that continue `prompt`; joined, they decode exactly as the ids do."""
    ids = [*tokenizer.prefix, *tokenizer.encode(prompt)] or [tokenizer.suffix[-1]]  # what a text begins after
    check_sampling(model, ids, max_tokens, temperature, top_p)
    stop = tokenizer.suffix[-1] if tokenizer.eos is None else tokenizer.eos
    written, said = tokenizer.encode(prompt), tokenizer.decode(tokenizer.encode(prompt))
    for chosen in sample_ids(model, ids, max_tokens, temperature, top_p, seed, stop):
        written.append(chosen)
        text = tokenizer.decode(written)  # with the prompt: some decoders drop the space of a first word
        if not text.endswith("\ufffd"):  # the bytes of a character may still be coming
            yield text[len(said) :]
            said = text
    yield tokenizer.decode(written)[len(said) :]
