"""What is left out of the input and why: documents by length, evaluation texts in them (decontamination); and personal
data, which is replaced. Everything is counted, with the first few examples of each.

The examples quote what was removed, personal data too, so that wrong finds can be seen: keep a report as private as
the input.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pretrain.prepare.documents import Counts, read_documents
from pretrain.prepare.finding import find_files
from pretrain.prepare.pii import PLACEHOLDERS, Scrubber

REASONS = ("too_short", "too_long", "contaminated", "exact_duplicate", "near_duplicate")
KINDS = tuple(PLACEHOLDERS)
MAX_EXAMPLES = 5
EXAMPLE_CHARS = 200
_CONTEXT = 40  # characters around a find that its example shows
_NAMES = {
    "too_short": "too short", "too_long": "too long", "contaminated": "sharing text with the evaluation files",
    "exact_duplicate": "the same as an earlier one", "near_duplicate": "nearly the same as an earlier one",
    "email": "e-mail addresses", "phone": "telephone numbers", "ip_address": "IP addresses",
    "card_number": "card numbers",
}  # fmt: skip
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class FilterSettings:
    """Lengths are in characters, 0 for no limit; `decontaminate` are files or folders of evaluation texts, whose
    n-grams are of `ngram` words; `text_key` is the field of theirs that holds the text; `phone_region` is like "US".
    """

    min_chars: int = 0
    max_chars: int = 0
    scrub_pii: bool = False
    phone_region: str | None = None
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13
    text_key: str = "text"


@dataclass
class Tally:
    """How much went one way; `bytes` counts the text of dropped documents, `finds` what was replaced in documents."""

    documents: int = 0
    bytes: int = 0
    finds: int = 0
    examples: list[dict] = field(default_factory=list)  # source, text, detail; of duplicates also numbers, see `drop`

    def add(self, other: "Tally") -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.finds += other.finds
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]

    def example(self, source: str, text: str, detail: str, **more) -> None:
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append({"source": source, "text": _shortened(text), "detail": _shortened(detail), **more})


class Report:
    """What was dropped, by reason, and replaced, by kind of personal data."""

    def __init__(self) -> None:
        self.dropped = {reason: Tally() for reason in REASONS}
        self.scrubbed = {kind: Tally() for kind in KINDS}

    def drop(self, reason: str, source: str, text: str, detail: str = "", **more) -> None:
        """Count a document that is left out; `more` (JSON) is kept with an example, for who says the detail later."""
        tally = self.dropped[reason]
        tally.documents += 1
        tally.bytes += len(text.encode())
        tally.example(source, text, detail, **more)

    def scrub(self, kind: str, source: str, text: str, span: tuple[int, int]) -> None:
        """Count what is replaced at a place in a document."""
        tally = self.scrubbed[kind]
        tally.finds += 1
        if len(tally.examples) < MAX_EXAMPLES:
            around = text[max(0, span[0] - _CONTEXT) : span[1] + _CONTEXT]
            tally.example(source, around, text[span[0] : span[1]])

    def merge(self, other: "Report") -> None:
        """Add what came after this."""
        for mine, theirs in ((self.dropped, other.dropped), (self.scrubbed, other.scrubbed)):
            for name, tally in theirs.items():
                mine[name].add(tally)

    def to_json(self) -> dict:
        """Plain lists, numbers and strings."""
        return {
            "dropped": {
                reason: {"documents": tally.documents, "bytes": tally.bytes, "examples": list(tally.examples)}
                for reason, tally in self.dropped.items()
            },
            "scrubbed": {
                kind: {"finds": tally.finds, "documents": tally.documents, "examples": list(tally.examples)}
                for kind, tally in self.scrubbed.items()
            },
        }

    @classmethod
    def from_json(cls, data: dict) -> "Report":
        report = cls()
        for mine, theirs in ((report.dropped, data["dropped"]), (report.scrubbed, data["scrubbed"])):
            for name, entry in theirs.items():
                mine[name].add(Tally(**entry))
        return report

    def summary(self) -> list[str]:
        """Lines to print; they name sources, but do not repeat personal data."""
        lines = []
        for reason, tally in self.dropped.items():
            if tally.documents:
                first = tally.examples[0]
                lines.append(
                    f"dropped {tally.documents:,} documents ({tally.bytes / 1e6:,.1f} MB) {_NAMES[reason]}, first: "
                    f"{first['source']} ({first['detail']})"
                )
        for kind, tally in self.scrubbed.items():
            if tally.finds:
                lines.append(
                    f"replaced {tally.finds:,} {_NAMES[kind]} in {tally.documents:,} documents by {PLACEHOLDERS[kind]}"
                    f", first: {tally.examples[0]['source']}"
                )
        return lines


def _shortened(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARS else text[:EXAMPLE_CHARS] + "..."


class Filters:
    """Applies the settings to one document after the other."""

    def __init__(self, settings: FilterSettings):
        self.settings = settings
        if settings.min_chars < 0 or settings.max_chars < 0 or 0 < settings.max_chars < settings.min_chars:
            raise ValueError(f"no text is from {settings.min_chars} to {settings.max_chars} characters long")
        self._scrubber = Scrubber(settings.phone_region) if settings.scrub_pii else None
        self._ngrams = None
        if settings.decontaminate:
            self._ngrams = EvaluationNgrams(settings.decontaminate, settings.ngram, settings.text_key)

    def notes(self) -> list[str]:
        """What to tell the user of the evaluation texts before the work begins."""
        return self._ngrams.notes() if self._ngrams else []

    def apply(self, text: str, source: str, report: Report) -> str | None:
        """The text, without personal data if so set; None when it is dropped."""
        settings = self.settings
        if len(text) < settings.min_chars:
            report.drop("too_short", source, text, f"{len(text):,} characters, at least {settings.min_chars:,} wanted")
        elif settings.max_chars and len(text) > settings.max_chars:
            report.drop("too_long", source, text, f"{len(text):,} characters, at most {settings.max_chars:,} wanted")
        elif self._ngrams and (shared := self._ngrams.shared(text)):
            report.drop("contaminated", source, text, shared)
        else:
            return self._scrubbed(text, source, report) if self._scrubber else text
        return None

    def _scrubbed(self, text: str, source: str, report: Report) -> str:
        kinds = set()

        def found(kind: str, before: str, span: tuple[int, int]) -> None:
            kinds.add(kind)
            report.scrub(kind, source, before, span)

        text = self._scrubber.scrub(text, found)
        for kind in kinds:
            report.scrubbed[kind].documents += 1
        return text


class EvaluationNgrams:
    """The runs of n words (without case and punctuation) of evaluation texts, and whether a document has one of them.

    A table of hashes answers almost always; a hit is then compared word by word, so it is never a mere collision.
    """

    def __init__(self, inputs: Sequence[str], ngram: int, text_key: str):
        if ngram < 1:
            raise ValueError(f"n-grams of {ngram} words: choose at least 1, like 13")
        self.ngram = ngram
        self.texts = self.too_short = 0
        self._words: list[str] = []  # of all texts long enough, one after the other
        starts: list[np.ndarray] = []
        for document in read_documents(find_files(inputs).files, text_key, Counts()):
            self.texts += 1
            words = _words(document.text)
            if len(words) < ngram:
                self.too_short += 1
                continue
            starts.append(np.arange(len(self._words), len(self._words) + len(words) - ngram + 1))
            self._words += words
        if not starts:
            raise ValueError(f"no text of {' '.join(inputs)} has {ngram} words: choose smaller n-grams with --ngram")
        self._index(np.concatenate(starts))

    def _index(self, starts: np.ndarray) -> None:
        """Sorted hashes, each with a place in `_words`; and a table of bits of them, 16 times as large."""
        hashes = _ngram_hashes(self._words, self.ngram)[starts]
        self._hashes, first = np.unique(hashes, return_index=True)
        self._starts = starts[first]
        self._shift = np.uint64(64 - max(10, int(len(self._hashes) * 16).bit_length()))
        self._may_have = np.zeros(1 << int(64 - self._shift), dtype=bool)
        self._may_have[self._hashes >> self._shift] = True

    def notes(self) -> list[str]:
        lines = [f"decontaminating: {len(self._hashes):,} {self.ngram}-grams of {self.texts:,} evaluation texts"]
        if self.too_short:
            lines.append(
                f"note: {self.too_short:,} of {self.texts:,} evaluation texts have fewer than {self.ngram} words and "
                "are not covered: lower --ngram to cover them"
            )
        return lines

    def shared(self, text: str) -> str | None:
        """The first n-gram of the text that an evaluation text has too."""
        words = _words(text)
        if len(words) < self.ngram:
            return None
        hashes = _ngram_hashes(words, self.ngram)
        places = np.flatnonzero(self._may_have[hashes >> self._shift])
        index = np.searchsorted(self._hashes, hashes[places])
        index[index == len(self._hashes)] = 0
        is_hit = self._hashes[index] == hashes[places]
        for place, start in zip(places[is_hit].tolist(), self._starts[index[is_hit]].tolist(), strict=True):
            run = words[place : place + self.ngram]
            if run == self._words[start : start + self.ngram]:
                return " ".join(run)
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngram_hashes(words: list[str], ngram: int) -> np.ndarray:
    """A hash for each run of words: uint64[len(words) - ngram + 1]. Only equal within this process."""
    hashes = np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)
    size = len(words) - ngram + 1
    combined = np.zeros(size, dtype=np.uint64)
    for place in range(ngram):
        combined = combined * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + size]
    return combined ^ (combined >> np.uint64(32))
