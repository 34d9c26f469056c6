"""Figures against the scripts of their fields (scikit-learn, scipy, sacrebleu, rouge-score) and counts by hand."""

import math

import numpy as np
import pytest

from pretrain.evaluation import metrics


def test_classification_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        gold, predicted = rng.integers(0, classes, (2, 40))
        gold[gold == classes - 1] = 0  # a label without gold
        figures = metrics.classification(gold, predicted, [*"abcdefg"][:classes])
        assert figures["accuracy"] == pytest.approx(sklearn.accuracy_score(gold, predicted), abs=1e-12)
        expected = sklearn.f1_score(gold, predicted, labels=range(classes), average="macro", zero_division=0)
        assert figures["macro_f1"] == pytest.approx(expected, abs=1e-12)
        table = sklearn.confusion_matrix(gold, predicted, labels=range(classes))
        assert (metrics.confusion(gold, predicted, classes) == table).all()
        theirs = sklearn.precision_recall_fscore_support(gold, predicted, labels=range(classes), zero_division=0)
        ours = metrics.per_label(table, list(map(str, range(classes))))
        for name, column in zip(("precision", "recall", "f1", "support"), theirs, strict=True):
            assert [row[name] for row in ours] == pytest.approx(column.tolist())


def test_a_label_that_does_not_occur_counts_as_0():
    figures = metrics.classification(np.array([0, 1]), np.array([0, 1]), ["a", "b", "c"])
    assert figures == {"accuracy": 1.0, "macro_f1": pytest.approx(2 / 3)}


def test_multi_label_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    gold, predicted = rng.random((2, 30, 5)) < 0.4
    gold[:, 4] = predicted[:, 4] = False
    figures = metrics.multi_label(gold, predicted)
    for name in ("micro", "macro"):
        expected = sklearn.f1_score(gold, predicted, average=name, zero_division=0)
        assert figures[f"{name}_f1"] == pytest.approx(expected, abs=1e-12)
    assert figures["subset_accuracy"] == pytest.approx(sklearn.accuracy_score(gold, predicted))


@pytest.mark.parametrize(
    ("predicted", "gold", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),  # articles, case, punctuation
        ("in  Paris", ["Paris", "the city of Paris"], 0, 2 / 3),  # the nearest of several
        ("June 4, 1998", ["4 June 1998"], 0, 1),
        ("no no yes", ["no yes yes"], 0, 2 / 3),  # a word counts as often as both have it
        ("", [], 1, 1),  # no answer is right
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("a theory", ["theory"], 1, 1),
        ("athe", ["athe"], 1, 1),
        ("“Paris”", ["Paris"], 0, 0),  # only ASCII's punctuation, as in SQuAD's own script
        ("北京市。", ["北京市"], 1, 1),
        ("在北京市", ["北京"], 0, 2 * 2 / 6),  # by characters
        ("1998年", ["1998"], 0, 2 / 3),
    ],
)
def test_answers_are_compared_as_squad_does(predicted, gold, exact, f1):
    assert metrics.answer_scores(predicted, gold) == (exact, pytest.approx(f1))


def test_answers_are_means():
    figures = metrics.answers(["Paris", "in Rome", "x"], [["paris"], ["Rome"], []])
    assert figures == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx((1 + 2 / 3) / 3)}


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("I-A I-A O I-A", [("A", 0, 2), ("A", 3, 4)]),  # an I- that goes on with nothing begins a span
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),
        ("O O", []),
        ("B-X-Y I-X-Y", [("X-Y", 0, 2)]),
    ],
)
def test_spans_of_tags(tags, found):
    assert list(metrics._spans(tags.split())) == found


def test_spans_are_counted_whole():
    """The figures of conlleval: 2 of 4 predicted spans are right, 2 of 3 gold ones found."""
    gold = ["B-A I-A O B-B".split(), "O B-A".split()]
    predicted = ["B-A I-A O B-A".split(), "B-B B-A".split()]
    figures = metrics.spans(gold, predicted)
    assert figures == {"span_precision": 0.5, "span_recall": pytest.approx(2 / 3), "span_f1": pytest.approx(4 / 7)}
    assert metrics.spans([["O"]], [["O"]]) == {"span_f1": 0, "span_precision": 0, "span_recall": 0}
    with pytest.raises(ValueError, match="'S-A' is no tag of BIO"):
        metrics.spans([["S-A"]], [["O"]])


def test_translation_is_sacrebleus_of_the_whole_corpus():
    sacrebleu = pytest.importorskip("sacrebleu")
    predicted = ["the cat sat on the mat", "there is a dog in the garden"]
    gold = ["the cat sat on a mat", "a dog is in the garden"]
    figures = metrics.translation(predicted, gold)
    assert figures["bleu"] == sacrebleu.corpus_bleu(predicted, [gold]).score
    assert figures["chrf"] == sacrebleu.corpus_chrf(predicted, [gold]).score
    # 1- to 4-grams found, of 13, 11, 9, 7; as many words in both
    by_hand = 100 * math.exp(sum(map(math.log, (11 / 13, 6 / 11, 3 / 9, 1 / 7))) / 4)
    assert figures["bleu"] == pytest.approx(by_hand) and 10 < figures["bleu"] < 60
    assert metrics.translation(gold, gold)["bleu"] == pytest.approx(100)


def test_translation_into_chinese_has_words():
    sacrebleu = pytest.importorskip("sacrebleu")
    predicted, gold = ["今天天气很好。"], ["今天的天气很好。"]
    assert metrics.translation(predicted, gold)["bleu"] > 50 > sacrebleu.corpus_bleu(predicted, [gold]).score


def test_summaries_are_rouge_scores_and_have_words_of_any_script():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    predicted = ["Prices were rising by 5% again, the bank says.", "nothing"]
    gold = ["The bank said that prices rise again.", "something else"]
    figures = metrics.summaries(predicted, gold)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        expected = [scorer.score(*texts)[theirs].fmeasure for texts in zip(gold, predicted, strict=True)]
        assert figures[ours] == pytest.approx(np.mean(expected)) and 0 < figures[ours] < 1
    chinese = metrics.summaries(["银行说价格上涨"], ["价格又上涨了"])
    assert chinese["rouge_1"] == pytest.approx(2 * 4 / (7 + 6))  # by characters: 价 格 上 涨
    assert metrics.summaries(["Über Äpfel"], ["über Birnen"])["rouge_1"] == pytest.approx(0.5)


def test_ranking_by_hand():
    figures = metrics.ranking(np.array([1, 2, 10, 11]))
    assert figures == {
        "recall_at_1": 0.25, "recall_at_10": 0.75, "mrr": pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4),
        "ndcg_at_10": pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11)) / 4),
    }  # fmt: skip


def test_spearman_is_scipys_with_ties():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 6, 50), rng.random(50).round(1)
    assert metrics.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert metrics.spearman(np.array([1, 2, 3]), np.array([-1, -4, -9])) == pytest.approx(-1)
    assert metrics.spearman(a, np.ones(50)) == 0
