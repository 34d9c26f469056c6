"""What the report and the headline say of several held-out sets, of a pretraining run and of a fine-tuned one."""

import json
import re

from pretrain.hub.card import _quality
from pretrain.report import curves
from pretrain.report.page import write_report
from pretrain.report.theme import words
from tests.report.test_page import read, write_run
from tools.report import headline

TILE = r"<dt>(.*?)</dt><dd>(.*?)</dd><small>(.*?)</small>"


def judged_run(run_dir, *evaluations: dict):
    """A run's folder whose last rows are evaluations with these figures."""
    write_run(run_dir, 20)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    plain = [{name: value for name, value in row.items() if not name.startswith("val_")} for row in rows]
    for row, figures in zip(plain[-len(evaluations) :], evaluations, strict=True):
        row |= figures
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    return run_dir


def panels(html: str) -> dict[str, str]:
    return dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", html, flags=re.DOTALL))


def legend(svg: str) -> list[str]:
    return [text for text in re.findall(r">([^<>]+)</text>", svg) if not re.match(r"[−\d.]", text) and text != "step"]


def test_each_figure_has_a_panel_with_a_line_for_each_set(tmp_path):
    told = [{"val_web/loss": 3.0 - n, "val_web/bits_per_byte": 1.5, "val_a_news/loss": 2.5 + n,
             "val_a_news/bits_per_byte": 1.25} for n in (0, 1)]  # fmt: skip
    html, _, _ = read(write_report(judged_run(tmp_path / "run", *told)))
    drawn = panels(html)
    assert list(drawn)[:3] == ["Loss", "Validation bits per byte", "Learning rate"]
    assert legend(drawn["Loss"]) == ["training", "web", "a_news"]
    assert legend(drawn["Validation bits per byte"]) == ["web", "a_news"]
    assert all(f"var(--{name})" in drawn["Loss"] for name in ("accent", "second", "third"))
    assert all(f"--{name}: " in html for name in ("accent", "second", "third", "fourth", "fifth", "sixth"))
    assert re.findall(TILE, html)[1:5] == [
        ("Validation loss", "2.000", "web, best 2.000"), ("Bits per byte", "1.500", "web, best 1.500"),
        ("Validation loss", "3.500", "a_news, best 2.500"), ("Bits per byte", "1.250", "a_news, best 1.250"),
    ]  # fmt: skip


def test_a_run_that_got_names_on_a_resume_shows_both(tmp_path):
    html, _, _ = read(write_report(judged_run(tmp_path / "run", {"val_bits_per_byte": 2}, {"val_a/bits_per_byte": 1})))
    assert legend(panels(html)["Validation bits per byte"]) == ["without a name", "a"]


def test_of_many_sets_the_first_have_tiles_and_all_have_a_line_that_differs(tmp_path):
    told = {f"val_s{n}/loss": 2.0 + n for n in range(20)}
    html, _, _ = read(write_report(judged_run(tmp_path / "run", told, told)))
    assert [note.partition(",")[0] for _, _, note in re.findall(TILE, html)[1:4]] == ["s0", "s1", "s2"]
    assert "s3, best" not in html
    loss = panels(html)["Loss"]
    assert legend(loss) == ["training", *(f"s{n}" for n in range(20))]
    lines = re.findall(r'<path d="M[^"]*"[^>]*style="(fill: none; [^"]*stroke: var\(--[a-z]+\)[^"]*)"', loss)
    looks = {re.sub(r"stroke-(width|linecap): [\w.]+;?", "", line) for line in lines if "--line" not in line}
    assert len(looks) == 3 * len(curves.COLOURS)


def test_a_fine_tuned_run_of_several_sets(tmp_path):
    figures = {"val_news/loss": 0.5, "val_news/macro_f1": 0.7, "val_web/loss": 1 / 3, "val_web/macro_f1": 0.6}
    run = judged_run(tmp_path / "mood", figures | {"val_web/accuracy": 0.8})
    facts = {name: {"labels": ["a", "b"], "confusion": [[n, 2], [3, 4]]} for name, n in (("news", 31), ("web", 41))}
    (run / "task.json").write_text(json.dumps({"name": "classification", "labels": ["a", "b"]}))
    result = {"metric": "val_web/macro_f1", "best": 0.6, "step": 20, "figures": figures, "sets": facts}
    (run / "result.json").write_text(json.dumps(result))
    wrong = [{"set": name, "text": f"{name} {n}", "gold": "a", "prediction": "b", "right": False, "score": 0.5}
             for name in ("news", "web") for n in range(25)]  # fmt: skip
    (run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong))
    html, _, text = read(write_report(run))
    assert list(panels(html))[1:3] == ["Validation macro F1", "Validation accuracy"]
    assert legend(panels(html)["Validation macro F1"]) == ["news", "web"]
    assert ("Macro F1", "0.6", "web, best 0.6") in re.findall(TILE, html)
    assert "Fine-tuned: classification, news The best evaluation by web macro F1: step 20." in text
    assert "loss macro F1 validation 0.5 0.7" in text and "loss macro F1 validation 0.3333 0.6" in text
    assert "a b a 31 2 b 3 4 Fine-tuned: classification, web" in text and "a b a 41 2 b 3 4" in text
    assert "set text gold prediction score news news 0 a b 0.5" in text and "web web 19 a b 0.5" in text
    assert "news 20" not in text and "web 20" not in text
    assert headline(run).splitlines()[-1] == "  best web macro F1 0.6, at step 20"


def test_a_figure_of_a_set_in_words():
    assert words("val_my_web/macro_f1") == "my_web macro F1"
    assert words("val_macro_f1") == words("macro_f1") == "macro F1"
    assert words("acc,none/x_y") == "acc,none/x y"
    told = _quality({"val_news/loss": 2.5, "val_news/bits_per_byte": 1.25, "step": 3}, "token")
    assert told == "news loss 2.5000 nats a token, news 1.2500 bits per byte"
