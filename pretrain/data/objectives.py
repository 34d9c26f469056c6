"""What a model is asked about a row of tokens: rows -> (inputs, labels). A plain dict from name to function."""

import numpy as np

IGNORE = -100  # the label of a position that has no target, as in torch's cross_entropy


def causal_lm(rows) -> tuple[np.ndarray, np.ndarray]:
    """Predict each next token. `rows`: stream.Rows of b windows of T tokens; returns inputs and labels, int64[b, T].

    Where a window ends its chunk the next token is not at hand, and the last label is IGNORE.
    """
    tokens = rows.tokens.astype(np.int64)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
    labels[~rows.last_is_target, -1] = IGNORE
    return np.ascontiguousarray(inputs), labels


OBJECTIVES = {"causal_lm": causal_lm}
