"""What the filters take out, exactly; what they must leave; and that every bit of it is in the report."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.prepare import filters, pii
from pretrain.prepare.filters import KINDS, REASONS, Filters, FilterSettings, Report
from tests.forked import ROOT

pytest.importorskip("phonenumbers")


def scrub(text: str, region: str | None = "US") -> str:
    return pii.Scrubber(region).scrub(text, lambda *found: None)


# Personal data: each line is a text and what becomes of it


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("write to jane.doe+news@mail.example.co.uk.", "write to <EMAIL>."),
        ("<a@b.io>,c_d%x@sub-domain.example.museum;", "<<EMAIL>>,<EMAIL>;"),
        ("MAILTO:X@EXAMPLE.ORG?subject", "MAILTO:<EMAIL>?subject"),
        ("-- j@x.de --", "-- <EMAIL> --"),
        ("j@m\u00fcnchen.de", "<EMAIL>"),
        ("a@b.de b@c.fr", "<EMAIL> <EMAIL>"),
    ],
)
def test_email_addresses_are_found(text, wanted):
    assert scrub(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "@property", "x @ y.z", "user@localhost", "a@b", "icon@2x.png", "pip install torch@2.1.0", "a.@b.de", "@b.de",
        "a@@b.de",
    ],
)  # fmt: skip
def test_what_only_looks_like_an_email_address_stays(text):
    assert scrub(text) == text


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("from 192.168.0.1 to 8.8.8.8.", "from <IP_ADDRESS> to <IP_ADDRESS>."),
        ("http://10.0.0.7:8080/x, (172.16.254.1)", "http://<IP_ADDRESS>:8080/x, (<IP_ADDRESS>)"),
        ("10.0.0.0/8", "<IP_ADDRESS>/8"),
        ("2001:0db8:85a3:0000:0000:8a2e:0370:7334", "<IP_ADDRESS>"),
        ("[2001:db8::1]:443, fe80::1%eth0 2001:db8::/32", "[<IP_ADDRESS>]:443, <IP_ADDRESS>%eth0 <IP_ADDRESS>/32"),
        ("at ::ffff:192.0.2.128: and 2001:db8::7.", "at <IP_ADDRESS>: and <IP_ADDRESS>."),
        ("addr:2001:db8::7 IP:10.2.3.4", "addr:<IP_ADDRESS> IP:<IP_ADDRESS>"),
    ],
)
def test_ip_addresses_are_found(text, wanted):
    assert scrub(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4", "v1.2.3.4", "numpy 1.26.4", "1.2.3.4.5", "1.3.6.1.4.1.311", "256.1.1.1", "1.2.3.400",
        "01.02.03.04", "x1.2.3.4", "1.2.3.4a", "12:34:56", "12:34:56:78", "00:1a:2b:3c:4d:5e", "std::vector<int>",
        "x[::2] a[10::20]", "dead::beef", "add::add", "1::", "Foo::bar1::baz2", "x2001:db8::1", "2001:db8::1z",
        ":".join(["9f"] * 20), ":".join(["9f"] * 32), ":".join(["ab12"] * 9),
    ],
)  # fmt: skip
def test_versions_times_and_names_are_not_ip_addresses(text):
    assert scrub(text) == text


@pytest.mark.parametrize(
    "number",
    [
        "4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "4222222222222", "5555555555554444",
        "2223003122003222", "378282246310005", "3782 822463 10005", "6011 1111 1111 1117", "30569309025904",
        "3056 930902 5904", "3530111333300000", "6200000000000005", "6304000000000000", "4000000000000000006",
    ],
)  # fmt: skip
def test_card_numbers_are_found(number):
    assert scrub(f"paid with {number}, thanks") == "paid with <CARD_NUMBER>, thanks"
    assert scrub(f"{number}") == "<CARD_NUMBER>"
    wrong = number[:-1] + str((int(number[-1]) + 1) % 10)
    assert scrub(f"paid with {wrong}, thanks", None) == f"paid with {wrong}, thanks"


@pytest.mark.parametrize(
    "text",
    [
        "1111111111111117", "2999999999999990", "6999999999999991",  # a right check digit, no such prefix
        "0.4111111111111111", "4111111111111111.5", "x4111111111111111", "4111111111111111abcd", "9-4111111111111111",
        "4012 8888 8888 1881 4012 8888 8888 1881",  # columns
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "550e8400-e29b-41d4-a716-446655440000", "978-3-16-148410-0", "41111111111111110000000",
    ],
)  # fmt: skip
def test_other_long_numbers_are_not_cards(text):
    assert scrub(text, None) == text


@pytest.mark.parametrize(
    "text, region, wanted",
    [
        ("call +1 202-555-0143 now", None, "call <PHONE> now"),
        ("call +44 20 7946 0958 or +49 (0)30 23125-123.", None, "call <PHONE> or <PHONE>."),
        ("call (202) 555-0143, 202.555.0144; 202-555-0145 x12!", "US", "call <PHONE>, <PHONE>; <PHONE>!"),
        ("tel:2025550143", "US", "tel:<PHONE>"),
        ("Tel.: 030 23125 123", "DE", "Tel.: <PHONE>"),
        ("01 42 68 53 00 / 01.42.68.53.01", "FR", "<PHONE> / <PHONE>"),
        ("Tel.: 030 23125 123, (202) 555-0143", None, "Tel.: 030 23125 123, (202) 555-0143"),  # of which country?
    ],
)
def test_telephone_numbers_are_found(text, region, wanted):
    assert scrub(text, region) == wanted
    padding = "word " * 50
    assert scrub(f"{padding}{text} {padding}", region) == f"{padding}{wanted} {padding}"


@pytest.mark.parametrize("region", [None, "US", "DE", "FR", "IT", "BR"])
@pytest.mark.parametrize(
    "text",
    [
        "2024-01-02 10:11:12", "01/02/2024", "31.12.1999", "10.11.2024 12:00", "2024.01.02", "20240102", "1999-2004",
        "ISBN 0-306-40615-2", "ISBN-13: 978-3-16-148410-0", "978-0-306-40615-7", "ISSN 2049-3630",
        "numpy-1.26.4", "3.14159265358979", "0.5772156649", "+35236450.6", "-2147483646", "0x7fffffff 2147483647",
        "sha1 da39a3ee5e6b4b0d3255bfef95601890afd80709", "550e8400-e29b-41d4-a716-446655440000", "aix-6107-1415-32",
        "1,234,567,890", "1 2 3 4 5 6 7 8 9 10 11 12", "id=12345", "for i in range(1000000):", "a+1234567",
        "01.01.1999", "30 03 2024", "979 1 7787 1695 8", "$2025550143",
    ],
)  # fmt: skip
def test_dates_versions_hashes_and_books_are_not_telephone_numbers(text, region):
    assert scrub(text, region) == text


def test_finds_of_all_kinds_in_a_long_text_keep_their_places():
    data = {"a@b.de": "<EMAIL>", "10.1.2.3": "<IP_ADDRESS>", "4111 1111 1111 1111": "<CARD_NUMBER>",
            "+1 202-555-0143": "<PHONE>"}  # fmt: skip
    pieces = [f"line {n} \u00e9\U0001f600 of {item} and" for n in range(200) for item in data]
    text = "\n".join(pieces)
    wanted = text
    for item, placeholder in data.items():
        wanted = wanted.replace(item, placeholder)
    assert scrub(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "a@" * 50_000, "@a." * 50_000, "a" * 200_000 + "@", "a@" + "b." * 100_000 + "1", "1.2.3." * 50_000,
        ":1" * 100_000, ":" * 200_000, "1" * 300_000, "1234 " * 40_000, "+1 " * 60_000, "12-" * 60_000,
        "(202) 555-0143x" * 100,
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_no_text_takes_long(text):
    start = time.process_time()
    scrub(text)
    assert time.process_time() - start < 60  # where time grows with the square, it takes many minutes


def test_a_region_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no telephone region 'usa': give the two letters of a country, like US or DE"):
        Filters(FilterSettings(scrub_pii=True, phone_region="usa"))


def test_without_phonenumbers_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(ValueError, match=r"needs phonenumbers: .* else pip install 'pretrain\[prepare\]'"):
        Filters(FilterSettings(scrub_pii=True))
    Filters(FilterSettings(min_chars=1))


# Length


def test_length_limits_are_inclusive():
    report, limits = Report(), Filters(FilterSettings(min_chars=3, max_chars=5))
    kept = [limits.apply("\u00e9" * n, f"f, line {n}", report) for n in range(1, 8)]
    assert kept == [None, None, "\u00e9" * 3, "\u00e9" * 4, "\u00e9" * 5, None, None]
    assert report.to_json()["dropped"]["too_short"] == {
        "documents": 2, "bytes": 6, "examples": [
            {"source": "f, line 1", "text": "\u00e9", "detail": "1 characters, at least 3 wanted"},
            {"source": "f, line 2", "text": "\u00e9\u00e9", "detail": "2 characters, at least 3 wanted"},
        ],
    }  # fmt: skip
    assert report.dropped["too_long"].documents == 2 and report.dropped["too_long"].bytes == 26
    assert report.dropped["too_long"].examples[1]["detail"] == "7 characters, at most 5 wanted"
    nothing = Filters(FilterSettings())
    assert nothing.apply("a@b.de " * 10_000, "f", report) == "a@b.de " * 10_000
    for wrong in (FilterSettings(min_chars=5, max_chars=4), FilterSettings(min_chars=-1)):
        with pytest.raises(ValueError, match="no text is from"):
            Filters(wrong)


# Decontamination

QUESTION = "The quick brown fox jumps over the lazy dog, while seven wizards boil two quarts of jam."


def decontaminator(folder: Path, texts: list[str], ngram: int = 13) -> Filters:
    path = folder / "evaluation.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Filters(FilterSettings(decontaminate=(str(path),), ngram=ngram))


def test_a_shared_run_of_words_drops_the_document(tmp_path):
    filters_, report = decontaminator(tmp_path, [QUESTION]), Report()
    words = QUESTION.lower().replace(",", "").replace(".", "").split()
    text = "Before. " + " -- ".join(words[2:15]).upper() + "\nafter"  # another case, other marks between
    assert filters_.apply(text, "web, line 3", report) is None
    assert report.to_json()["dropped"]["contaminated"] == {
        "documents": 1, "bytes": len(text),
        "examples": [{"source": "web, line 3", "text": text, "detail": " ".join(words[2:15])}],
    }  # fmt: skip
    for harmless in (
        " ".join(words[2:14]),  # one word less
        " ".join([*words[2:8], "not", *words[8:15]]),
        " ".join(words[2:15][::-1]),
        " ".join(words[14:] + words[:12]),  # 12 in a row, at most
        "jam",
        "!?",
    ):
        assert filters_.apply(harmless, "web", report) == harmless
    assert report.dropped["contaminated"].documents == 1


def test_two_evaluation_texts_do_not_run_into_each_other(tmp_path):
    first, second = "a b c d", "e f g h"
    filters_, report = decontaminator(tmp_path, [first, second], ngram=3), Report()
    assert filters_.apply("c d e", "f", report) == "c d e"
    assert filters_.apply("x b c d", "f", report) is None
    assert filters_.apply("x e f g y", "f", report) is None
    assert [example["detail"] for example in report.dropped["contaminated"].examples] == ["b c d", "e f g"]


def test_every_ngram_of_a_large_evaluation_set_is_found_and_nothing_else(tmp_path):
    texts = [" ".join(f"w{(n * 7919 + k * k * 31) % 100_003}" for k in range(40)) for n in range(500)]
    filters_, report = decontaminator(tmp_path, texts, ngram=8), Report()
    for text in texts:
        words = text.split()
        for place in (0, 16, 32):
            assert filters_.apply(" ".join(["x", *words[place : place + 8], "y"]), "f", report) is None
        for place in (0, 16, 32):
            near = [*words[place : place + 7], "other", *words[place + 8 :][:7]]
            assert filters_.apply(" ".join(near), "f", report) is not None
    assert report.dropped["contaminated"].documents == 1500


def test_a_collision_of_hashes_is_no_shared_run_of_words(tmp_path, monkeypatch):
    """With a hash that is 0 for everything, only the first n-gram can still be found; with one beyond, nothing."""
    hashes = filters._ngram_hashes
    monkeypatch.setattr(filters, "_ngram_hashes", lambda words, ngram: hashes(words, ngram) * 0)
    filters_, report = decontaminator(tmp_path, ["a b c d e"], ngram=3), Report()
    assert filters_.apply("x y z", "f", report) == "x y z"
    assert filters_.apply("x a b c", "f", report) is None
    monkeypatch.setattr(filters, "_ngram_hashes", lambda words, ngram: hashes(words, ngram) * 0 + 1)
    assert filters_.apply("x a b c", "f", report) == "x a b c"


def test_evaluation_texts_too_short_to_cover_are_reported(tmp_path):
    some = decontaminator(tmp_path, [QUESTION, "too short", "also short", QUESTION])
    assert some.notes() == [
        "decontaminating: 5 13-grams of 4 evaluation texts",
        "note: 2 of 4 evaluation texts have fewer than 13 words and are not covered: lower --ngram to cover them",
    ]
    assert Filters(FilterSettings()).notes() == []
    with pytest.raises(ValueError, match="has 13 words: choose smaller n-grams with --ngram"):
        decontaminator(tmp_path, ["too short"])
    with pytest.raises(ValueError, match="n-grams of 0 words: choose at least 1"):
        decontaminator(tmp_path, [QUESTION], ngram=0)
    with pytest.raises(ValueError, match="is not a file or a folder"):
        Filters(FilterSettings(decontaminate=("nowhere.jsonl",)))


def test_evaluation_files_of_every_kind_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": ["one two three"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"question": "four five six"}\n')
    (tmp_path / "c.txt").write_text("seven eight nine")
    settings = FilterSettings(decontaminate=(str(tmp_path),), ngram=3, text_key="question")
    filters_, report = Filters(settings), Report()
    for text in ("one two three", "four five six", "seven eight nine"):
        assert filters_.apply(text, "f", report) is None
    assert filters_.apply("two three four", "f", report) == "two three four"


def test_what_is_dropped_does_not_hang_on_the_seed_of_pythons_hash(tmp_path):
    (tmp_path / "e.txt").write_text(QUESTION)
    code = (
        "import sys; from pretrain.prepare.filters import *; r = Report()\n"
        "f = Filters(FilterSettings(decontaminate=(sys.argv[1],)))\n"
        "f.apply('x ' + open(sys.argv[1]).read(), 's', r); print(r.to_json())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "e.txt")], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(outputs) == 1 and "'documents': 1" in outputs.pop()


def test_the_filters_work_in_this_order(tmp_path):
    """Length and evaluation texts are judged on the text as it came, personal data goes last."""
    path = tmp_path / "e.txt"
    path.write_text("mail jane@example.org about it")
    filters_ = Filters(FilterSettings(min_chars=12, scrub_pii=True, decontaminate=(str(path),), ngram=5))
    report = Report()
    assert filters_.apply("a@bbbbbbb.de", "f, line 1", report) == "<EMAIL>"
    assert filters_.apply("a@bbbbbb.de", "f, line 2", report) is None
    assert filters_.apply("Mail jane@example.org about it", "f, line 3", report) is None
    assert [report.dropped[reason].documents for reason in REASONS] == [1, 0, 1, 0, 0]
    assert [report.scrubbed[kind].finds for kind in KINDS] == [1, 0, 0, 0]


# The report


def reported(*texts: str, first: int = 1) -> Report:
    report, filters_ = Report(), Filters(FilterSettings(min_chars=5, scrub_pii=True))
    for number, text in enumerate(texts, start=first):
        filters_.apply(text, f"f, line {number}", report)
    return report


def test_counts_and_examples_are_exact():
    report = reported("tiny", "x" * 100 + " a@b.de 10.1.2.3 c@d.de", "10.9.8.7 \u00e9", "none here")
    data = report.to_json()
    assert list(data["dropped"]) == list(REASONS) and sorted(data["scrubbed"]) == sorted(KINDS)
    assert [entry["documents"] for entry in data["dropped"].values()] == [1, 0, 0, 0, 0]
    assert data["scrubbed"]["email"] == {
        "finds": 2, "documents": 1, "examples": [
            {"source": "f, line 2", "text": "x" * 39 + " a@b.de 10.1.2.3 c@d.de", "detail": "a@b.de"},
            {"source": "f, line 2", "text": "x" * 23 + " a@b.de 10.1.2.3 c@d.de", "detail": "c@d.de"},
        ],
    }  # fmt: skip
    assert data["scrubbed"]["ip_address"]["finds"] == 2 and data["scrubbed"]["ip_address"]["documents"] == 2
    assert [example["detail"] for example in data["scrubbed"]["ip_address"]["examples"]] == ["10.1.2.3", "10.9.8.7"]
    assert report.summary() == [
        "dropped 1 documents (0.0 MB) too short, first: f, line 1 (4 characters, at least 5 wanted)",
        "replaced 2 e-mail addresses in 1 documents by <EMAIL>, first: f, line 2",
        "replaced 2 IP addresses in 2 documents by <IP_ADDRESS>, first: f, line 2",
    ]
    assert Report().summary() == []


def test_the_reports_of_parts_merge_to_that_of_the_whole():
    texts = [f"{'tiny' if n % 3 else 'write to'} {n}@b.de"[: 4 if n % 3 == 1 else 99] for n in range(40)]
    whole = reported(*texts)
    for cut in (0, 1, 3, 17, 40):
        report = Report()
        for part in (reported(*texts[:cut]), reported(*texts[cut:], first=cut + 1)):
            report.merge(Report.from_json(json.loads(json.dumps(part.to_json()))))
        assert report.to_json() == whole.to_json()
    assert len(whole.dropped["too_short"].examples) == filters.MAX_EXAMPLES < whole.dropped["too_short"].documents


def test_examples_are_short_and_few():
    report = Report()
    for number in range(20):
        report.drop("near_duplicate", f"f, line {number}", "y" * 1000, "z" * 1000)
    tally = report.dropped["near_duplicate"]
    assert (tally.documents, tally.bytes, len(tally.examples)) == (20, 20_000, 5)
    assert tally.examples[4] == {"source": "f, line 4", "text": "y" * 200 + "...", "detail": "z" * 200 + "..."}
