"""Predictions and gold -> figures, each as its field's own script computes it. The home of sacrebleu and rouge-score.

Everything is between 0 and 1, but for `translation`, whose BLEU and chrF are sacrebleu's, between 0 and 100.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from pretrain.cli import how_to_install

Figures = dict[str, float]
INSTALL = how_to_install("tasks")
# Scripts that put no space between words: kana, ideographs, Thai, Lao, Burmese, Khmer. Each character is a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{UNSPACED}]|[^{UNSPACED}\\s]+")
_LETTERS = re.compile(f"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\\W_])+")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def confusion(gold: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
    """int64[count, count]: how many of each gold class (row) were predicted as each class (column)."""
    return np.bincount(np.asarray(gold) * count + predicted, minlength=count * count).reshape(count, count)


def classification(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> Figures:
    """Class numbers int[n], one an example. macro_f1: the mean of all `labels`' F1, 0 for one that does not occur."""
    table = confusion(gold, predicted, len(labels))
    right = table.diagonal()
    f1 = _ratio(2 * right, table.sum(0) + table.sum(1))
    return {"accuracy": float(right.sum() / table.sum()), "macro_f1": float(f1.mean())}


def per_label(table: np.ndarray, labels: Sequence[str]) -> list[dict[str, float | str]]:
    """Precision, recall and F1 of each label, and how many examples have it (support), out of a `confusion`."""
    right, gold, predicted = table.diagonal(), table.sum(1), table.sum(0)
    columns = _ratio(right, predicted), _ratio(right, gold), _ratio(2 * right, gold + predicted)
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, p, r, f, n in zip(labels, *columns, gold, strict=True)
    ]


def multi_label(gold: np.ndarray, predicted: np.ndarray) -> Figures:
    """bool[n, c]: which of c labels each example has. subset_accuracy: the share with all labels right."""
    gold, predicted = np.asarray(gold, dtype=bool), np.asarray(predicted, dtype=bool)
    both, either = (gold & predicted).sum(0), gold.sum(0) + predicted.sum(0)
    return {
        "micro_f1": float(_ratio(2 * both.sum(), either.sum())),
        "macro_f1": float(_ratio(2 * both, either).mean()),
        "subset_accuracy": float((gold == predicted).all(1).mean()),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where both are."""
    return np.asarray(part) / np.maximum(whole, 1)


def answers(predicted: Sequence[str], gold: Sequence[Sequence[str]]) -> Figures:
    """Means of `answer_scores`; `gold` has the answers of each question that are right, none where there is none."""
    scores = np.array([answer_scores(*row) for row in zip(predicted, gold, strict=True)])
    return {"exact_match": float(scores[:, 0].mean()), "f1": float(scores[:, 1].mean())}


def answer_scores(predicted: str, gold: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of words with the gold answer that is nearest (Rajpurkar et al., SQuAD, 2016).

    Case, punctuation, articles and spaces do not count. In scripts without spaces (Chinese) each character is a word,
    as in MLQA (Lewis et al., 2020). Where no answer is right, an empty one is.
    """
    said = _answer_words(predicted)
    pairs = [(said, _answer_words(answer)) for answer in gold or [""]]
    return float(any(ours == theirs for ours, theirs in pairs)), max(_word_f1(*pair) for pair in pairs)


def _answer_words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation and not _is_wide_punctuation(c))
    return _WORD.findall(_ARTICLES.sub(" ", kept))


def _is_wide_punctuation(character: str) -> bool:
    """Punctuation of East Asian scripts: SQuAD's own script knows ASCII's only."""
    return character > "\u3000" and unicodedata.category(character)[0] == "P"


def _word_f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def spans(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Figures:
    """F1, precision and recall of whole spans in BIO tags (B-X, I-X, O), one list of tags a sentence.

    As conlleval (Tjong Kim Sang and De Meulder, CoNLL-2003) and seqeval count: a span is right when its ends and its
    type are, and an I-X that goes on with no X begins one.
    """
    true, said = ({(n, *span) for n, tags in enumerate(rows) for span in _spans(tags)} for rows in (gold, predicted))
    right = len(true & said)
    return {
        "span_f1": 2 * right / max(len(true) + len(said), 1),
        "span_precision": right / max(len(said), 1),
        "span_recall": right / max(len(true), 1),
    }


def _spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first, end) of each span."""
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, found = tag.partition("-")
        if mark not in ("B", "I", "O"):
            raise ValueError(f"{tag!r} is no tag of BIO: write B-NAME, I-NAME or O")
        if kind and (mark != "I" or found != kind):
            yield kind, start, place
            kind = ""
        if not kind and mark != "O":
            kind, start = found, place


def translation(predicted: Sequence[str], gold: Sequence[str]) -> Figures:
    """Corpus BLEU (Papineni et al., 2002) and chrF (Popović, 2015) by sacrebleu, 0 to 100.

    BLEU's words are its 13a's; where the gold text is Chinese for the most part, its `zh`'s.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ValueError(f"figures of translations need sacrebleu: {INSTALL}") from None
    text = "".join(gold)
    bleu = BLEU(tokenize="zh" if 2 * len(_HAN.findall(text)) > len(text) else "13a")
    scores = {"bleu": bleu, "chrf": CHRF()}
    return {name: float(metric.corpus_score(list(predicted), [list(gold)]).score) for name, metric in scores.items()}


def summaries(predicted: Sequence[str], gold: Sequence[str]) -> Figures:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) by rouge-score, with its stemmer of English, 0 to 1.

    Words of other scripts, which rouge-score drops, count as they are; without spaces, each character does.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError:
        raise ValueError(f"figures of summaries need rouge-score: {INSTALL}") from None
    english = DefaultTokenizer(use_stemmer=True)

    class Words:
        """What rouge-score asks for words."""

        def tokenize(self, text: str) -> list[str]:
            found = _LETTERS.findall(text.lower())
            return [word for run in found for word in (english.tokenize(run) if run.isascii() else [run])]

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())
    rows = [scorer.score(*texts) for texts in zip(gold, predicted, strict=True)]
    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    return {ours: float(np.mean([row[theirs].fmeasure for row in rows])) for ours, theirs in names.items()}


def ranking(ranks: np.ndarray) -> Figures:
    """Ranks int[n], from 1 on, of the one right document of each query."""
    ranks = np.asarray(ranks)
    return {
        "recall_at_1": float((ranks <= 1).mean()),
        "recall_at_10": float((ranks <= 10).mean()),
        "mrr": float((1 / ranks).mean()),
        "ndcg_at_10": float(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two columns [n]; equal values share their mean rank; 0 where one is constant."""
    x, y = (ranks - ranks.mean() for ranks in map(_mean_ranks, (a, b)))
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread else 0.0


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
