"""What a model is asked about a row of tokens: rows -> (inputs, labels). A plain dict from name to function."""

from collections.abc import Callable

import numpy as np

IGNORE = -100  # the label of a position that has no target, as in torch's cross_entropy


def causal_lm(rows) -> tuple[np.ndarray, np.ndarray]:
    """Predict each next token. `rows`: stream.Rows of b windows of T tokens; returns inputs and labels, int64[b, T].

    What is not a target of the rows has the label IGNORE.
    """
    tokens = rows.tokens.astype(np.int64)
    return np.ascontiguousarray(tokens[:, :-1]), np.where(rows.is_target, tokens[:, 1:], IGNORE)


OBJECTIVES = {"causal_lm": causal_lm}


def batch_of(objective: Callable, rows) -> tuple[np.ndarray, ...]:
    """What a model is given: inputs, labels, and the documents of the inputs where the rows know them; [b, T] each."""
    documents = () if rows.documents is None else (np.ascontiguousarray(rows.documents[:, :-1]),)
    return (*objective(rows), *documents)
