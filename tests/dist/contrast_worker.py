"""Run under torchrun by tests/tasks/test_embedding.py: a step on a batch of pairs in many splits, beside one graph.

torchrun --nproc-per-node 2 tests/dist/contrast_worker.py OUT.json
"""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pretrain import dist
from pretrain.config import compose
from pretrain.config.steps import accumulation_steps
from pretrain.engine.engine import Engine
from pretrain.engine.settings import deepspeed_config
from pretrain.examples.stream import Examples, ExampleStream, Ragged, make_examples
from pretrain.examples.tables import Table
from pretrain.loop import on_device, split
from pretrain.model.heads import build_model
from pretrain.stream.order import hash_key
from pretrain.tasks.embedding import Embedding
from pretrain.tasks.validation import TaskValidation
from tests.models import fill_engine, filled_model, initial_values

BATCH, VOCAB, SEED = 8, 211, 5
CONFIG = compose.compose("finetune", [
    "task=embedding", "run.name=x", "model=llama_tiny", "model.layers=1", f"model.vocab_size={VOCAB}",
    "model.causal=false", "model.head=embedding", "model.pooling=mean", "data.train=x",
])  # fmt: skip
TASK = Embedding(CONFIG.task, None, CONFIG.model, 24, "none", 0, CONFIG.objective)
TEXTS = np.arange(2 * BATCH).reshape(BATCH, 2)
TEXTS[3, 1], TEXTS[6, 0] = TEXTS[1, 1], TEXTS[2, 0]


def main(out: Path) -> None:
    ranks = dist.from_environment()
    device = dist.start(ranks)
    results = {"steps": []}
    for stage, micro, dropout in ((2, 4, 0.0), (0, 2, 0.0), (2, 1, 0.1), (3, 1, 0.1)):
        built = build(stage, micro, dropout, ranks, device)
        if not dropout:
            rows = [{"query": f"q{query}", "document": f"d{document}"} for query, document in TEXTS.tolist()]
            table = Table("held-out", rows, ["query", "document"], [])
            results[f"figures-{micro}"] = TaskValidation(TASK, table, pairs(), micro).run(built.evaluate, ranks, device)
        results["steps"].append(compared(built, micro, dropout, ranks))
    if ranks.is_main:
        out.write_text(json.dumps(results))
    dist.finish(0)


def pairs() -> Examples:
    """A batch of pairs of many lengths, in which two share their document, and two their query."""
    random = np.random.default_rng(0)
    queries, documents = ([random.integers(7, VOCAB, length) for length in random.integers(2, 24, BATCH)] for _ in "qd")
    documents[3], queries[6] = documents[1], queries[2]
    columns = {"inputs": Ragged(queries), "inputs_document": Ragged(documents), "texts": Ragged(TEXTS, np.int64)}
    return make_examples(columns, range(BATCH))


def micro_batches(micro: int, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    stream = ExampleStream(pairs(), 0, BATCH, rank, world_size)
    return [on_device(TASK.collate(part), torch.device("cpu")) for part in split(stream.rows(stream.numbers(0)), micro)]


def build(stage: int, micro: int, dropout: float, ranks: dist.Ranks, device: torch.device) -> Engine:
    train = replace(CONFIG.train, global_batch_size=BATCH, micro_batch_size=micro)
    accumulation = accumulation_steps(train, ranks.world_size)
    settings = deepspeed_config(replace(CONFIG.deepspeed, stage=stage), BATCH, micro, accumulation, 0.0, "fp32")
    new_model = functools.partial(build_model, replace(CONFIG.model, dropout=dropout))
    built = Engine(new_model, TASK.loss_rows, settings, replace(CONFIG.optim, grad_clip=0.0), ranks, device)
    fill_engine(built, initial_values(CONFIG.model))
    return built


def compared(built: Engine, micro: int, dropout: float, ranks: dist.Ranks) -> dict:
    """A step of the engine beside the plain graph."""
    loss, norm = built.step(micro_batches(micro, ranks.rank, ranks.world_size), BATCH, 1e-3, SEED).read()
    expected, gradient = plain(dropout, micro, ranks.world_size)
    found = [  # AdamW's first moment after one step: (1 - beta1) times the gradient
        (f.values / (1 - CONFIG.optim.beta1), gradient[f.name].view(-1)[f.offset : f.offset + len(f.values)])
        for f in built.layout.fragments()
        if f.kind == "exp_avg"
    ]
    worst = max((a - b).abs().max().item() for a, b in found if len(a))
    return {"loss": loss, "expected": expected, "norm": norm, "worst": max(dist.all_gather_objects(worst)),
            "expected_norm": torch.nn.utils.get_total_norm(gradient.values()).item(),
            "scale": max(part.abs().max().item() for part in gradient.values())}  # fmt: skip


def plain(dropout: float, micro: int, world_size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and gradient of the global batch in one graph, with the dropout that each rank and micro-batch has."""
    model = filled_model(replace(CONFIG.model, dropout=dropout))
    queries, documents, texts = [], [], []
    for rank in range(world_size):
        for number, batch in enumerate(micro_batches(micro, rank, world_size)):
            torch.manual_seed(hash_key(SEED, rank, number) >> 1)
            queries.append(model(batch["inputs"], documents=batch["documents"]))
            documents.append(model(batch["inputs_document"], documents=batch["documents_document"]))
            texts.append(batch["texts"])
    scores, texts, places = torch.cat(queries) @ torch.cat(documents).T, torch.cat(texts), torch.arange(BATCH)
    alike = (texts[:, None] == texts).any(2) & ~torch.eye(BATCH, dtype=torch.bool)
    assert alike.sum() == 4
    scores = (scores / CONFIG.task.temperature).masked_fill(alike, -torch.inf)
    loss = (F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)) / 2
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
