"""What fine-tuned models have to beat: plain methods without a neural network, on the same examples."""

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np


def rows(path: Path) -> list[dict]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def tf_idf(train: list[dict], val: list[dict], test: list[dict], **features) -> float:
    """Macro-F1 on `test` of logistic regression on TF-IDF features, its regularisation chosen on `val`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, **features)
    parts = [vectorizer.fit_transform([row["text"] for row in train])]
    parts += [vectorizer.transform([row["text"] for row in part]) for part in (val, test)]
    labels = [[row["label"] for row in part] for part in (train, val, test)]
    models = [LogisticRegression(C=c, max_iter=2000).fit(parts[0], labels[0]) for c in (0.3, 1, 3, 10)]
    scores = [f1_score(labels[1], model.predict(parts[1]), average="macro") for model in models]
    return f1_score(labels[2], models[int(np.argmax(scores))].predict(parts[2]), average="macro")


def bm25_ranks(queries: list[str], documents: list[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """The rank of document i for query i among all documents, ties last (Robertson and Zaragoza, 2009)."""
    words = [re.findall(r"\w+", text.lower()) for text in documents]
    mean, postings = sum(map(len, words)) / len(words), defaultdict(list)
    for number, listed in enumerate(words):
        for word, count in Counter(listed).items():
            weight = count * (k1 + 1) / (count + k1 * (1 - b + b * len(listed) / mean))
            postings[word].append((number, weight))
    ranks = []
    for right, query in enumerate(queries):
        scores = np.zeros(len(documents))
        for word in set(re.findall(r"\w+", query.lower())):
            numbers, weights = zip(*postings.get(word, [(0, 0.0)]), strict=True)
            idf = math.log(1 + (len(documents) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            scores[list(numbers)] += idf * np.array(weights)
        ranks.append(int((scores >= scores[right]).sum()))
    return np.array(ranks)


def first_answer_of_its_kind(examples: list[dict]) -> list[str]:
    """For each question, the first of the answers that its context holds for questions of the same kind: it knows
    where the answers are, and not whom the question is about.
    """
    known = defaultdict(list)
    kinds = [(row["context"], " ".join(re.findall(r"\b[a-z]+\b|^\w+|\?", row["question"]))) for row in examples]
    for row, kind in zip(examples, kinds, strict=True):
        known[kind].append((row["answers"]["answer_start"][0], row["answers"]["text"][0]))
    return [min(known[kind])[1] for kind in kinds]
