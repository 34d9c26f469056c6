"""Every token of a data set is walked over once, and stretches are of one document each."""

import numpy as np

from pretrain.shards.documents import chunks, stretches
from tests.data_helpers import random_documents, write_dataset


def test_chunks_are_all_tokens_with_the_documents_starts(tmp_path):
    documents = random_documents(60, longest=200)
    manifest = write_dataset(tmp_path, documents, chunk_tokens=300, shard_tokens=900)
    found = list(chunks(manifest))
    assert np.concatenate([tokens for tokens, _ in found]).tolist() == np.concatenate(documents).tolist()
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in found)])
    starts = [offset + start for offset, (_, some) in zip(offsets, found, strict=False) for start in some]
    assert starts == np.cumsum([0, *map(len, documents[:-1])]).tolist()


def test_stretches_are_of_one_document_and_never_over_a_chunks_end(tmp_path):
    documents = random_documents(60, longest=200)
    manifest = write_dataset(tmp_path, documents, chunk_tokens=300, shard_tokens=900)
    tokens, length, expected, at = np.concatenate(documents), 32, [], 0
    bounds = np.cumsum([0, *(len(some) for some, _ in chunks(manifest))])
    for number, document in enumerate(documents):
        edges = [at, *bounds[(bounds > at) & (bounds < at + len(document))].tolist(), at + len(document)]
        for start, end in zip(edges, edges[1:], strict=False):
            expected += [(number, tokens[i : i + length].tolist()) for i in range(start, end - length + 1, length)]
        at += len(document)
    found = [(number, stretch.tolist()) for number, stretch in stretches(manifest, length)]
    assert found == expected and len(found) > 60
