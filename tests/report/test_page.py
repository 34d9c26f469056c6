"""The report shows what the run wrote, at any moment of it, as one file that needs nothing else."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from pretrain.hardware import environment
from pretrain.report import curves
from pretrain.report.page import write_report
from tests import forked
from tests.forked import ROOT
from tests.journals import journal
from tools.report import headline

TITLES = ("Loss", "Validation bits per byte", "Learning rate", "Gradient norm", "Tokens per second", "MFU")
VOID = ("meta", "link", "br", "img", "path", "use", "rect")


class Page(HTMLParser):
    """Tags that do not match, the text seen, and what would be loaded from elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.loaded = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value]
        self.loaded += [value for name, value in attrs if name == "xlink:href" and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    return html, page, " ".join(" ".join(page.text).split())


def write_run(run_dir, rows):
    """A run's folder as training leaves it, with text that would break a page that did not escape it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "metrics.jsonl", "w") as journal:
        for step in range(1, rows + 1):
            row = {
                "step": step, "tokens": step * 4096, "loss": 2 + 7 * math.exp(-step / 60), "lr": 3e-4, "grad_norm": 0.6,
                "tokens_per_second": 2900 + step % 7, "mfu": 0.62, "step_seconds": 1.5, "batch_hash": "ab",
            }  # fmt: skip
            if step % max(rows // 10, 1) == 0:
                row |= {"val_loss": 2.5, "val_bits_per_byte": 1.25}
            if step == rows // 2:
                row |= {"loss": None, "grad_norm": None}
            journal.write(json.dumps(row) + "\n")
    (run_dir / "config.yaml").write_text(f"train:\n  steps: {rows}\nmodel: '<script>alert(1)</script>'\n")
    (run_dir / "events.jsonl").write_text(
        '{"time": "2026-11-24T09:46:28.939+00:00", "kind": "start", "ranks": 2}\n'
        '{"time": "2026-11-24T09:48:28.939+00:00", "kind": "skip", "because_of": "<img src=x>"}\n'
    )
    samples = [{"step": s, "prompt": "def <f>(", "text": f"def <f>(x):\n    return {s} & x"} for s in (1, rows)]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (run_dir / "environment.json").write_text(json.dumps({"torch": "2.13.0", "gpus": [], "cuda": None, "cores": 2}))
    return run_dir


def test_a_whole_run(tmp_path):
    html, page, text = read(write_report(write_run(tmp_path / "R&D", 200)))
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == list(TITLES)
    assert page.tags.count("svg") == 6 and page.tags.count("style") == 1
    assert "<h1>R&amp;D</h1>" in html and "step 200 of 200 · 5 min 0 s of training" in text
    tiles = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd><small>(.*?)</small>", html)
    final = np.mean([2 + 7 * math.exp(-step / 60) for step in range(192, 201)])
    assert tiles == [
        ("Training loss", f"{final:.3f}", "mean of the last 9"),  # a 20th of the 199 rows that have one
        ("Validation loss", "2.500", "best 2.500"),
        ("Bits per byte", "1.250", "validation, best 1.250"),
        ("Tokens per second", "2,903", "median"),
        ("MFU", "62.0%", "median"),
        ("Tokens seen", "819.2k", "819,200"),
    ]
    assert "2026-11-24 09:46:28 start ranks 2" in text and "because of <img src=x>" in text
    assert text.index("return 200 & x") < text.index("return 1 & x")
    assert (
        "trained on too" not in text
        and "torch 2.13.0" in text
        and "gpus none" in text
        and "<script>alert(1)</script>" in text
    )


def test_nothing_of_a_run_becomes_markup_and_nothing_is_loaded(tmp_path):
    html, page, _ = read(write_report(write_run(tmp_path / "<i>run", 30)))
    assert not {"script", "img", "i", "link", "iframe", "f"} & set(page.tags)
    assert page.loaded == [] and "@import" not in html and "default-src 'none'" in html
    assert not re.findall(r"url\((?!#)", html)


def test_curves_follow_the_theme_and_carry_the_numbers(tmp_path):
    html, _, _ = read(write_report(write_run(tmp_path / "run", 200)))
    assert "prefers-color-scheme: dark" in html
    svg = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--accent)" in svg and "var(--second)" in svg and "var(--muted)" in svg
    assert not re.findall(r"#(?!000000)[0-9a-f]{6}\b", svg) and "font-family" not in svg
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert ">0.0003</text>" in svg  # a label keeps its digits
    loss = re.search(r"<svg[^>]*aria-label=\"Loss\".*?</svg>", html, flags=re.DOTALL)[0]
    longest = max(re.findall(r' d="(M[^"]*)"', loss), key=lambda path: path.count("L"))
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", longest)]
    assert len(heights) > 40 and max(heights[:20]) < min(heights[-20:])  # it falls: y points down


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_the_first_steps_of_a_run(tmp_path, rows):
    html, page, text = read(write_report(write_run(tmp_path / "run", rows)))
    assert page.tags.count("svg") == (6 if rows else 0)
    assert ("No step has been logged yet." in text) == (rows == 0) and "nan" not in text.lower()


def test_an_empty_folder_and_damaged_files(tmp_path):
    _, page, text = read(write_report(tmp_path))
    assert "no step yet" in text and "details" not in page.tags
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": "x"}\n{"step": 2, "loss": null}\n\0\0\n[1]\n{"step": 3, "loss": 2.5, "mfu": tr'
    )
    (tmp_path / "events.jsonl").write_bytes(b'{"kind": null}\n{"ki')
    (tmp_path / "samples.jsonl").write_bytes(b"{}\n")
    (tmp_path / "environment.json").write_bytes(b"\xff{")
    (tmp_path / "config.yaml").write_bytes(b"a: [")
    html, page, text = read(write_report(tmp_path))
    assert "step 2 ·" in text and page.tags.count("svg") == 0
    assert page.tags.count("details") == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")


def test_long_runs_are_thinned_without_hiding_a_spike(tmp_path):
    step = np.arange(1, 100_001, dtype=np.float64)
    value = np.ones_like(step)
    value[77_777], value[5] = 50.0, math.nan
    x, mean, low, high, breaks = curves._thin(step, value, True)
    assert breaks.tolist() == [1]  # after the first lot, which holds the row without a number
    assert x.size == mean.size == low.size == high.size == curves.POINTS
    assert high.max() == 50.0 and low.min() == 1.0 and np.isfinite(mean).all()
    assert abs(x[high.argmax()] - 77_778) < 100 and (np.diff(x) > 0).all()
    html, _, _ = read(write_report(write_run(tmp_path / "run", 20_000)))
    assert len(html) < 500_000


def test_the_running_mean_is_the_mean_and_does_not_bend_a_line():
    line = np.linspace(3, 8, 50)
    assert np.allclose(curves._running_mean(line, 5), line)
    noisy = np.array([1.0, 5.0, 0.0, 7.0, 2.0])
    assert np.allclose(curves._running_mean(noisy, 1), [1, 2, 4, 3, 2])


def test_environment_tells_versions_and_machine_but_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "d1" * 20)
    facts = environment()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"].startswith("2.") and facts["cores"] >= 1 and facts["memory_gib"] > 0 and facts["cpu"]
    assert "d1d1" not in json.dumps(facts) and os.environ["HOME"] not in [str(value) for value in facts.values()]


def test_the_command_line(tmp_path):
    write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 3)

    def run(*arguments):
        command = forked.program(ROOT / "tools" / "report.py", *arguments)
        return subprocess.run(command, capture_output=True, text=True, env=forked.ENVIRONMENT, timeout=600)

    done = run(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0 and done.stderr == ""
    for name in "ab":
        assert f"{tmp_path / name}: step 3, 12,288 tokens, loss" in done.stdout
        assert f"report: {tmp_path / name / 'report.html'}" in done.stdout
    refused = run(tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "runs/NAME" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "report.html").exists()


def tuned_run(run_dir):
    """A fine-tuned run's folder: figures of its own in the journal, its best evaluation, and what it got wrong."""
    write_run(run_dir, 20)
    rows = journal(run_dir)
    for row in rows:
        row.pop("val_bits_per_byte", None)
        if row["step"] % 10 == 0:
            row |= {"val_macro_f1": 0.5 + row["step"] / 100, "val_accuracy": 0.8}
            row["val_ndcg_at_10"] = 0.9 - row["step"] / 100
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "task.json").write_text(json.dumps({"name": "token_classification", "labels": ["<a>", "b"]}))
    result = {"metric": "val_macro_f1", "best": 0.7, "step": 20, "figures": {"val_macro_f1": 0.7, "val_loss": 1 / 3},
              "labels": ["<a>", "b"], "confusion": [[31, 2], [3, 47]],
              "per_label": [{"label": "<a>", "precision": 31 / 34, "recall": 0.5, "support": 33}]}  # fmt: skip
    (run_dir / "result.json").write_text(json.dumps(result))
    texts = [f"<img src={number}> " + "long " * 100 for number in range(25)]
    wrong = [{"right": False, "score": 0.75, "text": text, "gold": ["b"], "prediction": "<a>"} for text in texts]
    lines = [{"right": True, "text": "all is well", "gold": "b", "prediction": "b"}, *wrong]
    (run_dir / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"right": fal')
    return run_dir


def test_a_fine_tuned_run(tmp_path):
    html, page, text = read(write_report(tuned_run(tmp_path / "mood")))
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert titles[1:4] == ["Validation accuracy", "Validation macro F1", "Validation nDCG at 10"]
    tiles = {label: (value, note) for label, value, note in
             re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd><small>(.*?)</small>", html)}  # fmt: skip
    assert tiles["Macro F1"] == ("0.7", "validation, best 0.7") and tiles["Accuracy"][1] == "validation, best 80.0%"
    assert tiles["NDCG at 10"] == ("0.7", "validation, best 0.8")
    assert "Fine-tuned: token classification" in text and "The best evaluation by macro F1: step 20." in text
    assert "macro F1 loss validation 0.7 0.3333" in text
    assert "<a> b <a> 31 2 b 3 47" in text  # the header, then a row for each label
    assert "Each label precision recall support <a> 0.9118 0.5 33" in text
    assert page.tags.count("img") == 0 and "<img src=19>" in text and "<img src=20>" not in text  # the first 20
    assert "all is well" not in text and "text gold prediction score" in text and "… b <a> 0.75" in text


def test_the_headline_of_a_run_that_went_wrong(tmp_path):
    row = {"step": 1, "tokens": 8, "loss": None, "tokens_per_second": 2.0, "mfu": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "step 1, 8 tokens, loss not finite" in headline(tmp_path)


def test_the_headline_of_a_fine_tuned_run(tmp_path):
    tuned_run(tmp_path)
    assert headline(tmp_path).splitlines()[-1] == "  best macro F1 0.7, at step 20"
    (tmp_path / "evaluation.json").write_text('{"suite": {"step": 20}}')
    assert headline(tmp_path).count("\n") == 2


def test_a_fine_tuned_run_with_damaged_files_still_has_a_page(tmp_path):
    tuned_run(tmp_path)
    for name in ("task.json", "result.json", "predictions.jsonl", "evaluation.json"):
        (tmp_path / name).write_text('{"figures": {"val_f1": 1}, "suite": {"ste')
    _, _, text = read(write_report(tmp_path))
    assert "Macro F1" in text and "Fine-tuned" not in text and "got wrong" not in text


def test_what_the_evaluation_tool_found_is_in_tables(tmp_path):
    write_run(tmp_path, 3)
    (tmp_path / "evaluation.json").write_text(json.dumps({
        "step": 3, "val_loss": 2.5,
        "suite": {"step": 3, "next_passage": {"accuracy": 0.6123456, "chance": 0.25}, "copying": {"repeat_loss": 0.5}},
        "memorization": {"step": 2, "once": {"windows": 1000, "exact": 0.001}},
        "tasks": {"step": 3, "limit": None, "hellaswag": {"acc": 0.3, "acc_stderr": 0.01}},
    }))  # fmt: skip
    html, page, text = read(write_report(tmp_path))
    assert "accuracy chance repeat loss next_passage 0.6123 0.25 copying 0.5" in text
    assert "step 2 windows exact once 1000 0.001" in text
    assert "step 3, limit none acc acc stderr hellaswag 0.3 0.01" in text and page.tags.count("section") >= 4
    assert "Evaluation on all held-out text step 3 loss 2.5" in text


def test_what_happened_is_marked_on_the_curves_and_said(tmp_path):
    write_run(tmp_path, 200)
    plain, _, text = read(write_report(tmp_path))
    assert "var(--bad)" not in plain.split("</style>")[1] and "On the curves" not in text
    saves = [{"kind": "saved", "step": step, "seconds": 0.5, "megabytes": 3.0} for step in (50, 100, 150)]
    happened = [
        {"kind": "resume", "step": 40}, {"kind": "phase", "from_step": 60}, {"kind": "not_finite", "step": 90},
        {"kind": "phase", "from_step": 300}, *saves,
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in happened))
    html, _, text = read(write_report(tmp_path))
    marked = html.split("</style>")[1]
    assert marked.count("var(--bad)") == 6  # a line a panel
    drawn = [len(re.findall("stroke-dasharray: [^n]", page)) for page in (plain, marked)]
    assert drawn[1] - drawn[0] == 12  # one resume and one phase a panel: what is to come is not drawn
    assert "resumed (dotted) at step 40; a new phase (dashed) at step 60; a fault (red) at step 90." in text
    assert "saved 3 times until" in text and "steps 50 to 150: 3 MB each, in 0.5 s" in text


def test_rows_that_are_missing_are_a_gap(tmp_path):
    def pieces(title):
        html, _, _ = read(write_report(tmp_path))
        svg = re.search(rf'<svg[^>]*aria-label="{title}".*?</svg>', html, flags=re.DOTALL)[0]
        path = max(re.findall(r' d="(M[^"]*)"', svg), key=lambda path: path.count("L"))
        return path.count("M"), path.count("L") + path.count("M")

    write_run(tmp_path, 20)
    rows = [row | {"loss": 2.0, "grad_norm": 0.5} for row in journal(tmp_path)]
    for kept, expected in ((rows, (1, 20)), (rows[:8] + rows[12:], (2, 16))):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        assert pieces("Gradient norm") == expected
    rows[9]["grad_norm"] = None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pieces("Gradient norm") == (2, 19)
    assert pieces("Validation bits per byte") == (1, 10)  # of every second row, as it should be


def test_compressors_are_lines_and_an_accuracy_has_its_own_scale(tmp_path):
    tuned_run(tmp_path)
    rows = [
        row | ({"val_accuracy": 0.9 + row["step"] / 1000} if "val_accuracy" in row else {}) for row in journal(tmp_path)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row | {"val_bits_per_byte": 1.25}) + "\n" for row in rows)
    )
    (tmp_path / "evaluation.json").write_text('{"gzip_bits_per_byte": 1.842, "xz_bits_per_byte": 1.566}')
    html, _, _ = read(write_report(tmp_path))
    panels = dict(re.findall(r'<svg[^>]*aria-label="([^"]*)"(.*?)</svg>', html, flags=re.DOTALL))
    assert re.findall(r">(gzip -9|xz -9|this model)<", panels["Validation bits per byte"]) == [
        "gzip -9",
        "xz -9",
        "this model",
    ]
    shares = [float(share) for share in re.findall(r">([\d.]+)%<", panels["Validation accuracy"])]
    assert 90 <= min(shares) and max(shares) <= 93
    (tmp_path / "evaluation.json").write_text("{}")
    assert "gzip" not in read(write_report(tmp_path))[0]


def test_figures_that_are_not_of_held_out_text_are_said_above_them(tmp_path):
    write_run(tmp_path, 3)
    (tmp_path / "data.json").write_text('{"train": "ab", "val_trained_on": "news=/d/<news>"}')
    _, _, text = read(write_report(tmp_path))
    said = "data.val=news=/d/<news> is trained on too: its figures are not of held-out text."
    assert said in text and text.index(said) < text.index("Validation loss")
