"""What a model is asked about a row of tokens: rows -> (inputs, labels). A plain dict from name to function."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from pretrain.config.schema import ObjectiveConfig
from pretrain.stream.order import hash_key, hash_keys, splitmix64_at
from pretrain.tokenizer.tokenizer import Tokenizer

IGNORE = -100  # the label of a position that has no target, as in torch's cross_entropy
_AT_ONCE = 1 << 15  # random numbers, that stay in the processor's cache
_CHOOSE, _REPLACE, _RANDOM_ID = 5, 6, 7  # keep these uses of the keys apart from those of order, mixture and source


def causal_lm(rows) -> tuple[np.ndarray, np.ndarray]:
    """Predict each next token. `rows`: stream.Rows of b windows of T tokens; returns inputs and labels, int64[b, T].

    What is not a target of the rows has the label IGNORE.
    """
    tokens = rows.tokens.astype(np.int64)
    return np.ascontiguousarray(tokens[:, :-1]), np.where(rows.is_target, tokens[:, 1:], IGNORE)


class MaskedLM:
    """Fill in what is missing (Devlin et al., BERT, 2018): of `mask_rate` of the tokens, 80 % become the mask, 10 % a
    random token, 10 % stay; the model predicts what they were. Special tokens and padding are never among them.

    Masks are a function of (seed, sample number, place in the row): the same for any number of ranks and after a
    resume, and other ones in each epoch, whose samples have other numbers (dynamic masking; Liu et al., RoBERTa, 2019).
    """

    def __init__(self, config: ObjectiveConfig, tokenizer: Tokenizer, seed: int):
        """`config.whole_word`: all tokens of a word are chosen or none; the mask, a random token or none for each."""
        if not 0 < config.mask_rate < 1:
            raise ValueError(f"objective.mask_rate={config.mask_rate} must lie between 0 and 1; BERT's is 0.15")
        if tokenizer.mask is None:
            raise ValueError(
                f"{tokenizer.path} has no mask token, which objective=masked_lm puts in the place of others: take "
                "objective=causal_lm, or a tokenizer of tools/train_tokenizer.py"
            )
        self._mask, self._keys = tokenizer.mask, [hash_key(seed, use) for use in (_CHOOSE, _REPLACE, _RANDOM_ID)]
        self._limit = _share(Fraction(config.mask_rate))
        self._is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_special[list(tokenizer.special_ids.values())] = True
        self._ordinary = np.flatnonzero(~self._is_special)
        self._continues = tokenizer.continues_word() if config.whole_word else None

    def __call__(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """As `causal_lm`; the label of a token that was not chosen is IGNORE."""
        inputs = rows.tokens[:, :-1].astype(np.int64)
        labels, special = np.full_like(inputs, IGNORE), self._is_special[inputs]
        choose, replace, random_id = (hash_keys(key, rows.sample_numbers) for key in self._keys)
        places = np.arange(inputs.shape[1], dtype=np.uint64)
        parts = np.array_split(choose[:, None], -(-inputs.size // _AT_ONCE) or 1)
        chosen = np.concatenate([splitmix64_at(part, places) < self._limit for part in parts])
        if self._continues is not None:
            chosen = np.take_along_axis(chosen, self._word_starts(inputs, rows.is_target), 1)
        row, place = np.divmod(np.flatnonzero(chosen & ~special & ~is_padding(rows)), inputs.shape[1])
        originals = labels[row, place] = inputs[row, place]
        how = splitmix64_at(replace[row], places[place])
        others = self._ordinary[splitmix64_at(random_id[row], places[place]) % np.uint64(len(self._ordinary))]
        inputs[row, place] = np.where(how < _share(0.8), self._mask, np.where(how < _share(0.9), others, originals))
        return inputs, labels

    def _word_starts(self, inputs: np.ndarray, is_target: np.ndarray) -> np.ndarray:
        """Of each place the one where its word begins; a word whose beginning lies before the row begins with it."""
        begins = ~self._continues[inputs]
        begins[:, 1:] |= ~is_target[:, :-1]  # another document
        return np.maximum.accumulate(np.where(begins, np.arange(inputs.shape[1]), 0), axis=1)


def _share(share) -> np.uint64:
    """The number that this share of all uint64 are below."""
    return np.uint64(int(Fraction(share) * (1 << 64)))


def is_padding(rows) -> np.ndarray:
    """bool[b, T], which inputs hold no token. Where rows do not number their documents: what comes after the last
    target (a document of one token there counts as padding, there is nothing to learn from it).
    """
    if rows.documents is not None:
        return rows.documents[:, :-1] < 0
    length = rows.is_target.shape[1]
    held = length + 1 - rows.is_target[:, ::-1].argmax(1)  # up to the last target, and one more
    return np.arange(length) >= np.where(rows.is_target.any(1), held, 0)[:, None]


OBJECTIVES = {"causal_lm": lambda config, tokenizer, seed: causal_lm, "masked_lm": MaskedLM}


def make_objective(config: ObjectiveConfig, tokenizer: Tokenizer, seed: int) -> Callable:
    """The function from rows to (inputs, labels); `ValueError` where the tokenizer does not serve it."""
    return OBJECTIVES[config.name](config, tokenizer, seed)


def batch_of(objective: Callable, rows) -> dict[str, np.ndarray]:
    """What a model is given: inputs, labels, and the documents of the inputs where the rows know them; [b, T] each.

    A model that looks ahead would see padding: where there is any, each row counts as one document before it.
    """
    documents = None if rows.documents is None else np.ascontiguousarray(rows.documents[:, :-1])
    if documents is None and isinstance(objective, MaskedLM) and (padding := is_padding(rows)).any():
        documents = -padding.astype(np.int32)
    inputs, labels = objective(rows)
    return {"inputs": inputs, "labels": labels} | ({} if documents is None else {"documents": documents})
