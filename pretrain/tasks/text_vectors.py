"""Texts to vectors of length 1, with a model tuned for it or, less well, with any other."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pretrain.examples.stream import Ragged
from pretrain.model.heads import pooled
from pretrain.tasks.task import padded_tokens, whole_text
from pretrain.tokenizer.tokenizer import Tokenizer


@torch.no_grad()
def embed_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, batch_size: int = 32,
    on_texts: Callable[[int], object] = lambda count: None,
) -> np.ndarray:  # fmt: skip
    """float32[n, D]: the vector of each text, of its first `max_tokens` tokens; their products are cosines.

    A model whose head is not `embedding` gives the mean of its hidden states. Batches are of texts of like lengths.
    """
    config, device = model.trunk.config, next(model.parameters()).device
    encoded = tokenizer.encode_batch(list(texts))
    rows = Ragged([whole_text(tokenizer, config, ids, max_tokens)[0] or tokenizer.suffix[-1:] for ids in encoded])
    found = np.empty((len(texts), config.width), dtype=np.float32)
    by_length = np.argsort(-rows.lengths, kind="stable")
    for start in range(0, len(texts), batch_size):
        numbers = by_length[start : start + batch_size]
        tokens, documents = (torch.from_numpy(part).to(device) for part in padded_tokens(rows, numbers))
        if config.head == "embedding":
            vectors = model(tokens, documents=documents)
        else:
            vectors = F.normalize(pooled(model.trunk(tokens, None, documents), documents, "mean").float(), dim=-1)
        found[numbers] = vectors.cpu().numpy()
        on_texts(len(numbers))
    return found
