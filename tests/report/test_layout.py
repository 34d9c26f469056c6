"""Reports of every kind of run in a browser, on a desk and on a phone: no column is a sliver, no text is cut off.

Needs Chromium (Debian, Ubuntu: apt-get install chromium), and skips without.
"""

import html
import json
import re
import shutil
import subprocess

import pytest

from pretrain.report.page import write_report
from tests.journals import journal
from tests.report.test_page import tuned_run, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)
KINDS = ("pretraining", "classification", "tagging", "many labels", "questions")
LEAST = 12  # characters a line of a text that takes more than two; a column narrower than that is a sliver

MEASURE = """
<body><script>
const found = {};
function lines(cell) {  // how many lines a cell's text takes
  const range = document.createRange();
  range.selectNodeContents(cell);
  return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size;
}
function measure(page) {
  const root = page.documentElement, kinds = {}, cut = [];
  page.querySelectorAll("details").forEach(part => part.open = true);
  for (const table of page.querySelectorAll("table")) {
    const kind = kinds[table.className] ??= {cells: [], overflow: 0};
    kind.overflow = Math.max(kind.overflow, table.parentElement.scrollWidth - table.parentElement.clientWidth);
    for (const cell of table.querySelectorAll("td, th"))
      if (cell.textContent.trim() && cell.getClientRects().length)
        kind.cells.push({text: cell.textContent, lines: lines(cell), width: cell.getBoundingClientRect().width,
                         aligned: getComputedStyle(cell).textAlign});
  }
  for (const label of page.querySelectorAll("svg text")) {
    const outer = label.closest("svg").getBoundingClientRect(), inner = label.getBoundingClientRect();
    if (inner.left < outer.left - 1 || inner.right > outer.right + 1) cut.push(label.textContent);
  }
  for (const box of page.querySelectorAll("dd, dt, small, h1, h2, h3, p, figcaption, pre"))
    if (box.scrollWidth > box.clientWidth + 1 && box.clientWidth) cut.push(box.textContent);
  return {overflow: root.scrollWidth - root.clientWidth, width: root.clientWidth, kinds, cut};
}
onload = () => {
  for (const frame of document.querySelectorAll("iframe")) found[frame.name] = measure(frame.contentDocument);
  document.body.textContent = JSON.stringify(found);
};
</script>
"""


def make_run(folder, kind):
    """A run's folder of a kind, with the long and the many that its tables may have to hold."""
    if kind == "pretraining":
        write_run(folder, 200)
        more = [{"kind": "resume", "step": 90}, {"kind": "phase", "from_step": 120, "seq_len": 64,
                 "global_batch_size": 8, "weights": [1.0]}, {"kind": "save_failed", "step": 150, "seconds": 1.0,
                 "error": f"OSError: no room on /{'a' * 120}/b"}]  # fmt: skip
        with open(folder / "events.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"time": "2026-11-24T09:49:28+00:00"} | event) + "\n" for event in more)
        suite = {"step": 200, "next_passage": {"accuracy": 0.61, "chance": 0.25, "windows": 1000}}
        found = {"gzip_bits_per_byte": 1.8, "xz_bits_per_byte": 1.5, "val_bits_per_byte": 1.2, "suite": suite}
        (folder / "evaluation.json").write_text(json.dumps(found))
        (folder / "data.json").write_text(json.dumps({"val_trained_on": f"/data/{'a' * 150}"}))
        rows = [row | {"grad_norm": 0.007092 + row["step"] / 5e7} for row in journal(folder)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        facts = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "git": "0123456789abcdef" * 4, "torch": "2.13.0"}
        (folder / "environment.json").write_text(json.dumps(facts))
        return folder
    tuned_run(folder)
    result = json.loads((folder / "result.json").read_text())
    text = "A text as people write them, with words of many lengths. " * 20
    row = {"right": False, "text": text, "gold": "indifferent", "prediction": "very positive", "score": 0.75}
    if kind == "many labels":
        labels = [f"a rather long label, number {number}" for number in range(40)]
        result |= {"labels": labels, "confusion": [[number * 1000] * 40 for number in range(40)]}
        result["per_label"] = [{"label": label, "precision": 0.5, "recall": 0.25, "support": 7} for label in labels]
        row |= {"gold": labels[:6], "prediction": labels[6]}
    if kind == "tagging":
        row |= {"gold": ["B-PERSON", "I-PERSON", "O"] * 30, "prediction": ["O"] * 90}
    if kind == "questions":
        row |= {"question": "Who wrote the letters?", "gold": [], "prediction": "the man who lived next door " * 5}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "predictions.jsonl").write_text((json.dumps(row) + "\n") * 5)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{(kind, width): what the browser measured}, of all of them in one start of it."""
    if BROWSER is None:
        pytest.skip("no Chromium here: install it (Debian, Ubuntu: apt-get install chromium)")
    root, frames = tmp_path_factory.mktemp("layout"), []
    for kind in KINDS:
        page = write_report(make_run(root / kind.replace(" ", "-"), kind)).read_text(encoding="utf-8")
        frames += [
            f'<iframe name="{kind}/{width}" style="width: {width}px; height: 900px; border: 0" '
            f'srcdoc="{html.escape(page)}"></iframe>' for width in WIDTHS
        ]  # fmt: skip
    (root / "all.html").write_text(MEASURE + "\n".join(frames), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={root / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", (root / "all.html").as_uri()], capture_output=True, encoding="utf-8", timeout=600
    )  # fmt: skip
    told = re.search(r"<body>(.*)</body>", done.stdout, flags=re.DOTALL)
    assert told, done.stderr
    return {tuple(name.split("/")): found for name, found in json.loads(html.unescape(told[1])).items()}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_can_be_read(measured, kind, width):
    page = measured[kind, str(width)]
    assert page["width"] == width and page["overflow"] == 0 and page["cut"] == []
    assert set(page["kinds"]) >= ({"events", "facts"} if kind == "pretraining" else {"events", "figures", "texts"})
    for name, table in page["kinds"].items():
        assert table["overflow"] <= 0 or name == "figures", name  # numbers are scrolled, text is not
        for cell in table["cells"]:
            per_line = len(cell["text"]) / cell["lines"]
            assert cell["lines"] <= 2 or per_line >= LEAST, (name, cell)
        aligned = {cell["aligned"] for cell in table["cells"][1:] if re.fullmatch(r"[\d.]+", cell["text"])}
        assert name not in ("figures", "texts") or aligned <= {"right" if name == "figures" else "left"}


def test_a_phone_shows_long_texts_in_its_whole_width(measured):
    for kind in KINDS:
        for name, least in (("texts", 300), ("events", 300)):
            cells = measured[kind, "390"]["kinds"].get(name, {"cells": []})["cells"]
            assert all(cell["width"] > least for cell in cells if len(cell["text"]) > 60), (kind, name)
