"""Tasks made of a run's own held-out text, in any language and without a network: what a causal model has learnt.

Documents are cut into stretches, some of which, spread evenly, are the examples: the same ones every time.
"""

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pretrain.evaluation.metrics import UNSPACED
from pretrain.model.losses import score_rows
from pretrain.shards.documents import stretches
from pretrain.shards.manifest import Manifest
from pretrain.stream.objectives import IGNORE
from pretrain.tokenizer.tokenizer import Tokenizer

LENGTH = 128  # tokens of a stretch at most
CHOICES = 4
BATCH_SIZE = 16
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


def run_suite(
    model: nn.Module, manifest: Manifest, tokenizer: Tokenizer, seq_len: int, limit: int
) -> dict[str, dict[str, float]]:
    """The figures of each task on at most `limit` stretches of at most half of `seq_len`, which the model can hold.

    next_passage: the last quarter of a stretch against that of 3 other documents, by its likelihood after the rest (as
    HellaSwag, Zellers et al., 2019). last_word: whether the likeliest tokens are those of a stretch's last word (as
    LAMBADA, Paperno et al., 2016). copying: nats a token of a stretch, and when it is read a second time (Olsson et
    al., "In-context Learning and Induction Heads", 2022).
    """
    if not model.trunk.config.causal:
        raise ValueError("--suite is for causal models: this one is bidirectional (model.causal=false)")
    length = min(LENGTH, seq_len // 2)
    rows, documents = sample(manifest, length, limit)
    with tqdm(total=(CHOICES + 3) * len(rows), desc="suite", unit=" rows") as bar:

        def score(tokens: np.ndarray, is_target: np.ndarray) -> np.ndarray:
            return score_targets(model, tokens, is_target, BATCH_SIZE, bar.update)

        return {
            "next_passage": next_passage(score, rows, documents),
            "last_word": last_word(score, rows, tokenizer),
            "copying": copying(score, rows),
        }


def sample(manifest: Manifest, length: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` stretches [n, length] spread evenly over a data set, and the document of each [n]."""
    numbers = np.array([document for document, _ in stretches(manifest, length)])
    count = min(limit, len(numbers))
    wanted = np.arange(count) * len(numbers) // max(count, 1)
    if (found := len(np.unique(numbers[wanted]))) < CHOICES:
        raise ValueError(f"{manifest.location} gives examples of {found} documents of {length} tokens or more, the "
                         f"suite needs {CHOICES}: take a greater --limit, or more held-out text")  # fmt: skip
    kept = set(wanted.tolist())
    rows = [tokens for place, (_, tokens) in enumerate(stretches(manifest, length)) if place in kept]
    return np.stack(rows).astype(np.int64), numbers[wanted]


@torch.no_grad()
def score_targets(
    model: nn.Module, tokens: np.ndarray, is_target: np.ndarray, batch_size: int, on_rows: Callable[[int], object]
) -> np.ndarray:  # fmt: skip
    """Of the targets of each row of tokens [n, T]: their loss in nats, and how many are the likeliest; [n, 2]."""
    device = next(model.parameters()).device
    labels = np.where(is_target, tokens, IGNORE)[:, 1:]
    found = []
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        batch = (torch.from_numpy(column[part]).to(device) for column in (tokens[:, :-1], labels))
        found.append(score_rows(model, *batch).double().cpu().numpy())
        on_rows(len(found[-1]))
    return np.concatenate(found)


def next_passage(score: Score, rows: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    """How often a stretch's own end is likelier than each of the others; all are of one length."""
    start = rows.shape[1] - max(1, rows.shape[1] // 4)
    is_target = np.broadcast_to(np.arange(rows.shape[1]) >= start, rows.shape)
    losses = []
    for choice in range(CHOICES):
        tokens = rows.copy()
        tokens[:, start:] = rows[others(documents, choice), start:]
        losses.append(score(tokens, is_target)[:, 0])
    right = losses[0] < np.min(losses[1:], axis=0)
    return _share(right) | {"chance": 1 / CHOICES}


def others(documents: np.ndarray, choice: int) -> np.ndarray:
    """For each row, one of another document, as far on as `choice` says; itself for 0."""
    places = (np.arange(len(documents)) + len(documents) * choice // CHOICES) % len(documents)
    while choice and (same := documents[places] == documents).any():
        places[same] = (places[same] + 1) % len(documents)
    return places


def last_word(score: Score, rows: np.ndarray, tokenizer: Tokenizer) -> dict[str, float]:
    """How often the likeliest tokens are the last whole word's of a stretch, which is in its second half."""
    start, end = word_bounds(rows, tokenizer)
    known = start >= rows.shape[1] // 2
    places = np.arange(rows.shape[1])
    is_target = (places >= start[:, None]) & (places < end[:, None]) & known[:, None]
    scores = score(rows, is_target)[known]
    return _share(scores[:, 1] == (end - start)[known])


def word_bounds(rows: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(first token, token after the last) of the last whole word of each row, [n] each; -1 where there is none.

    A word is of letters and digits alone; in scripts without spaces each token is one.
    """
    used, inverse = np.unique(rows, return_inverse=True)
    texts = [tokenizer.decode([id_]).strip() for id_ in used.tolist()]
    wordy = np.array([text.isalnum() for text in texts])[inverse].reshape(rows.shape)
    unspaced = np.array([bool(re.match(f"[{UNSPACED}]", text)) for text in texts])[inverse].reshape(rows.shape)
    goes_on = np.zeros_like(wordy)  # with the word of the token before
    goes_on[:, 1:] = tokenizer.continues_word()[rows[:, 1:]] & wordy[:, 1:] & wordy[:, :-1] & ~unspaced[:, 1:]
    begins = wordy & ~goes_on
    ends = np.zeros_like(wordy)  # where a word that began before is over: what comes next does not go on with it
    ends[:, 1:] = wordy[:, :-1] & ~goes_on[:, 1:]
    places = np.arange(rows.shape[1])
    end = np.where(ends, places, -1).max(1)
    return np.where(begins & (places < end[:, None]), places, -1).max(1), end


def copying(score: Score, rows: np.ndarray) -> dict[str, float]:
    """Nats a token of a stretch read first and read again; its first token, which nothing announces, is left out."""
    count, length = rows.shape
    places = np.arange(2 * length)[None].repeat(count, 0)
    first = score(rows, places[:, :length] > 0)[:, 0].sum()
    again = score(np.concatenate([rows, rows], 1), places > length)[:, 0].sum()
    targets = count * (length - 1)
    return {"items": count, "first_loss": float(first / targets), "repeat_loss": float(again / targets)}


def _share(right: np.ndarray) -> dict[str, float]:
    """The share that is right, and the standard error of it."""
    items = len(right)
    accuracy = float(right.sum() / max(items, 1))
    return {"items": items, "accuracy": accuracy, "stderr": (accuracy * (1 - accuracy) / max(items, 1)) ** 0.5}
