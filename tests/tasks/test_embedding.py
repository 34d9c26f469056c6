"""Embeddings: the loss of a whole global batch in any split, vectors ranks and figures of held-out pairs."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain import finetune
from pretrain.examples.stream import ExampleRows
from pretrain.tasks import contrast, embedding
from pretrain.tasks.contrast import Pairs, gradients, log_normalisers, pair_losses
from pretrain.tasks.embedding import Embedding, ranked
from pretrain.tasks.validation import TaskValidation
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests.task_helpers import config_of, make, table_of

MODEL = ["model.causal=false", "model.head=embedding", "model.pooling=mean"]


@pytest.fixture
def new_task(shards):
    return functools.partial(make, "embedding", load_tokenizer(shards), *MODEL)


@pytest.fixture
def table(tmp_path):
    return functools.partial(table_of, tmp_path, name="pairs.jsonl")


@pytest.fixture(scope="module")
def results(worker):
    """{number of ranks: what contrast_worker.py found}."""
    return {ranks: worker("contrast_worker.py", ranks=ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradient_are_those_of_the_whole_batch_in_one_graph(results, ranks):
    """With any micro-batches, ZeRO stage and dropout, which is drawn for each rank and micro-batch."""
    steps = results[ranks]["steps"]
    for found in steps:
        assert found["loss"] == pytest.approx(found["expected"], rel=1e-6)
        assert found["norm"] == pytest.approx(found["expected_norm"], rel=1e-6)
        assert found["worst"] < 1e-6 * found["scale"] and found["scale"] > 1
    whole = results[1]["steps"][0]["loss"]
    assert [found["loss"] == pytest.approx(whole, rel=1e-6) for found in steps] == [True, True, False, False]


def test_figures_do_not_depend_on_ranks_and_batches(results):
    figures = [results[ranks][f"figures-{micro}"] for ranks in (1, 2) for micro in (2, 4)]
    assert all(found == pytest.approx(figures[0], rel=1e-6) for found in figures)
    assert figures[0]["val_loss"] == pytest.approx(results[1]["steps"][0]["loss"], rel=1e-6), "the same pairs"
    assert 0 < figures[0]["val_mrr"] < 1


def random_pairs(count: int, width: int = 8) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(count, 2, width, dtype=torch.float64, generator=generator), dim=-1)
    return Pairs(vectors, torch.arange(2 * count).view(count, 2))


def plain_losses(pairs: Pairs, temperature: float) -> torch.Tensor:
    places = torch.arange(len(pairs.texts))
    alike = (pairs.texts[:, None] == pairs.texts).any(2) & (places[:, None] != places)
    scores = (pairs.vectors[:, 0] @ pairs.vectors[:, 1].T / temperature).masked_fill(alike, -math.inf)
    ways = [F.cross_entropy(table, places, reduction="none") for table in (scores, scores.T)]
    return (ways[0] + ways[1]) / 2


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("cells", [1, 30, 1 << 24])
def test_the_formulas_are_what_autograd_finds_for_a_part_of_the_pairs(temperature, cells, monkeypatch):
    monkeypatch.setattr(contrast, "CELLS_AT_ONCE", cells)
    everyone = random_pairs(12)
    everyone.texts[3, 1], everyone.texts[7, 0], everyone.texts[9] = everyone.texts[5, 1], 4, everyone.texts[1]
    everyone.vectors.requires_grad_()
    expected = plain_losses(everyone, temperature)
    expected.sum().backward()
    with torch.no_grad():
        normalisers = log_normalisers(everyone, everyone, temperature)
        for part in (slice(0, 12), slice(4, 10)):
            mine = Pairs(everyone.vectors[part], everyone.texts[part])
            own = log_normalisers(mine, everyone, temperature)
            torch.testing.assert_close(pair_losses(mine, own, temperature), expected[part], rtol=0, atol=1e-13)
            found = gradients(mine, everyone, own, normalisers, temperature)
            torch.testing.assert_close(found, everyone.vectors.grad[part], rtol=0, atol=1e-13)


def test_the_loss_of_hand_made_pairs():
    """Of pairs at right angles to each other, each has N - 1 negatives, fewer where texts are shared."""
    pairs = Pairs(torch.eye(4)[:, None].expand(4, 2, 4), torch.arange(8).view(4, 2))
    losses = pair_losses(pairs, log_normalisers(pairs, pairs, 0.5), 0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + 3 * math.exp(-2))] * 4)
    pairs.texts[1, 1] = pairs.texts[0, 1]  # the document of two queries
    shared = pair_losses(pairs, log_normalisers(pairs, pairs, 0.5), 0.5)
    assert shared.tolist() == pytest.approx([math.log(1 + n * math.exp(-2)) for n in (2, 2, 3, 3)])
    alone = Pairs(pairs.vectors[:1], pairs.texts[:1])
    assert pair_losses(alone, log_normalisers(alone, alone, 0.5), 0.5).tolist() == pytest.approx([0.0])


def test_batches_hold_both_texts_with_their_special_ids_cut_to_the_length(new_task, table):
    task = new_task("train.seq_len=8")
    pairs = table({"query": "list", "document": "def f(a, b): return {a: b}"}, {"query": "dict", "document": "list"})
    examples = task.encode(pairs)
    tokenizer, columns = task.tokenizer, examples.columns
    assert columns["inputs"][0].tolist() == [*tokenizer.prefix, *tokenizer.encode("list"), *tokenizer.suffix]
    room = 8 - len(tokenizer.prefix) - len(tokenizer.suffix)
    cut = tokenizer.encode("def f(a, b): return {a: b}")[:room]
    assert columns["inputs_document"][0].tolist() == [*tokenizer.prefix, *cut, *tokenizer.suffix]
    assert examples.lengths.tolist() == [8 + len(columns["inputs"][0]), sum(len(columns[n][1]) for n in columns) - 2]
    batch = task.collate(ExampleRows(np.arange(2), np.arange(2), examples))
    assert batch["texts"].tolist() == [[0, 1], [2, 0]], "the same text has the same number on either side"
    assert (batch["labels"] == 0).all() and batch["inputs_document"].shape == (2, 8)
    padded = 8 - len(columns["inputs"][0])
    assert batch["documents_document"].tolist() == [[0] * 8, [0] * (8 - padded) + [-1] * padded]


def test_rows_that_teach_nothing_are_named_or_left_out(new_task, table):
    rows = [{"query": "a", "document": "b"}, {"query": "a", "document": " \n"}]
    with pytest.raises(ValueError, match=r"1 examples.*pairs.jsonl, line 2: 'document' is empty.*task.drop_bad=true"):
        new_task().encode(table(*rows))
    left = new_task("task.drop_bad=true").encode(table(*rows))
    assert left.rows.tolist() == [0] and len(left.dropped) == 1
    for score, reason in (("high", "score='high' is no number"), (math.inf, "score=1e999 is not finite")):
        written = table(*(row | {"document": "c", "score": score if score == "high" else "1e999"} for row in rows))
        with pytest.raises(ValueError, match=reason):
            new_task().encode(written)


def test_pairs_to_learn_from_are_not_scored(new_task, table):
    scored = table({"query": "a", "document": "b", "score": 0.1})
    with pytest.raises(ValueError, match=r"pairs.jsonl has the column 'score'.*task.score=..."):
        Embedding.settled(new_task().config, scored)
    other = new_task("task.score=similarity").config
    assert Embedding.settled(other, scored) is other


def vectors_at(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize("cells", [1, 1 << 24])
def test_ranks_among_all_different_documents(cells, monkeypatch):
    monkeypatch.setattr(embedding, "CELLS_AT_ONCE", cells)
    queries, documents = vectors_at(0, 90, 40, 0, 47), vectors_at(10, 60, 60, 5, 80)
    texts = torch.tensor([[0, 10], [1, 11], [2, 11], [0, 12], [4, 13]])  # 1 and 2 share a document, 0 and 3 a query
    ranks, nearest = ranked(Pairs(torch.stack([queries, documents], 1), texts))
    # 12 is nearer to the first query than 10, and as right; to the second one 13 is the nearest, to the last one 11
    assert ranks.tolist() == [1, 2, 1, 1, 2]
    assert [texts[pair, 1].item() for pair in nearest] == [10, 13, 11, 12, 11]


def test_a_tie_or_no_number_is_no_success():
    same = torch.ones(3, 2, 4) / 2
    assert ranked(Pairs(same, torch.arange(6).view(3, 2)))[0].tolist() == [3, 3, 3]
    assert ranked(Pairs(same * math.nan, torch.arange(6).view(3, 2)))[0].tolist() == [3, 3, 3]


def test_figures_and_details_of_held_out_pairs(new_task, table):
    task = new_task("task.temperature=0.5")
    pairs = table(*({"query": f"q{n}", "document": f"d{n}"} for n in range(3)))
    vectors = torch.stack([vectors_at(0, 90, 30), vectors_at(0, 60, 90)], 1)
    examples = task.encode(pairs)
    figures, details, facts = task.score(pairs, examples, vectors.flatten(1).numpy())
    assert figures.pop("loss") == pytest.approx(
        plain_losses(Pairs(vectors, torch.arange(6).view(3, 2)), 0.5).mean().item()
    )
    assert figures == pytest.approx({
        "recall_at_1": 1 / 3, "recall_at_10": 1, "mrr": (1 + 1 / 2 + 1 / 3) / 3,
        "ndcg_at_10": (1 + 1 / math.log2(3) + 1 / 2) / 3,
    })  # fmt: skip
    assert {"loss", *figures} == set(task.figures_of(examples)) and facts == {"documents": 3}
    assert task.best_on(examples) == "val_mrr" and "mrr" in figures
    assert details[1] == {"query": "q1", "gold": "d1", "prediction": "d2", "rank": 2, "right": False}
    assert [row["right"] for row in details] == [True, False, False]


def test_scored_pairs_have_a_correlation_instead(new_task, table):
    task = new_task()
    scored = table(*({"query": f"q{n}", "document": f"d{n}", "score": score} for n, score in enumerate((5, "3.5", 0))))
    examples = task.encode(scored)
    vectors = torch.stack([vectors_at(0, 0, 0), vectors_at(20, 90, 60)], 1).flatten(1).numpy()
    figures, details, _ = task.score(scored, examples, vectors)
    assert figures == {"spearman": pytest.approx(0.5)}  # ranks 3, 2, 1 beside 3, 1, 2
    assert task.figures_of(examples) == ("spearman",) and task.best_on(examples) == "val_spearman"
    assert details[1] == {"query": "q1", "document": "d1", "gold": 3.5, "prediction": pytest.approx(0, abs=1e-7)}
    told = task.outputs(scored, examples, vectors)
    assert [row["similarity"] for row in told] == pytest.approx(
        [math.cos(math.radians(a)) for a in (20, 90, 60)], abs=1e-6
    )


@pytest.mark.parametrize("scored, best, other", [(True, "val_spearman", "val_mrr"), (False, "val_mrr", "val_spearman")])
def test_the_best_figure_is_one_that_these_pairs_have(new_task, table, scored, best, other):
    task = new_task()
    pairs = table(*({"query": f"q{n}", "document": f"d{n}"} | ({"score": n} if scored else {}) for n in range(3)))
    validation = {"": TaskValidation(task, pairs, task.encode(pairs), 2)}
    cfg = config_of("embedding", "data.val=x")
    assert finetune.best_metric(cfg, task, validation) == best
    for wrong in (other, "val_loss") if scored else (other,):
        with pytest.raises(ValueError, match=f"tuning.best={wrong} is no figure of .*: take one of .*{best}"):
            finetune.best_metric(config_of("embedding", "data.val=x", f"tuning.best={wrong}"), task, validation)


def test_queries_alone_give_their_vectors(new_task, table):
    task = new_task()
    queries = table({"query": "q0"}, {"query": ""})
    examples = task.encode(queries, with_gold=False)
    batch = task.collate(ExampleRows(np.arange(2), np.arange(2), examples))
    tensors = {name: torch.from_numpy(column) for name, column in batch.items()}
    found = task.score_rows(lambda tokens, documents: vectors_at(0, 30), **tensors)[:, 2:].numpy()
    assert task.outputs(queries, examples, found) == [{"embedding": [1, 0]}, {"embedding": [0.866025, 0.5]}]
