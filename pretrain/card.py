"""The model card of an exported model: what it is, how it was trained and how well, how to load it, what was compared.

Everything in it comes from the run's own files; what a run does not have is left out.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from pretrain import compose
from pretrain.config import ModelConfig

PIPELINES = {
    "AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask", "AutoModel": "feature-extraction",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification", "AutoModelForQuestionAnswering": "question-answering",
}  # fmt: skip
USES = {
    "AutoModelForCausalLM": '''\
inputs = tokenizer("The history of the city begins", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))''',
    "AutoModelForMaskedLM": '''\
inputs = tokenizer("The history of the city", return_tensors="pt")
inputs["input_ids"][0, 2] = tokenizer.mask_token_id
print(tokenizer.decode(model(**inputs).logits[0, 2].argmax()))''',
    "AutoModel": '''\
inputs = tokenizer("The history of the city begins", return_tensors="pt")
print(model(**inputs).last_hidden_state.shape)''',
    "AutoModelForSequenceClassification": '''\
inputs = tokenizer("The history of the city begins", return_tensors="pt")
scores = model(**inputs).logits[0].{scale}
print({{model.config.id2label[label]: round(score, 3) for label, score in enumerate(scores.tolist())}})''',
    "AutoModelForTokenClassification": '''\
inputs = tokenizer("The history of the city begins", return_tensors="pt")
labels = model(**inputs).logits[0].argmax(-1).tolist()
for token, label in zip(inputs["input_ids"][0].tolist(), labels):
    print(tokenizer.decode([token]), model.config.id2label[label])''',
    "AutoModelForQuestionAnswering": '''\
inputs = tokenizer("What begins?", "The history of the city begins.", return_tensors="pt")
made = model(**inputs)
start, end = int(made.start_logits.argmax()), int(made.end_logits.argmax())
print(repr(tokenizer.decode(inputs["input_ids"][0, start : end + 1])))''',
}  # fmt: skip
LOAD = """\
from transformers import {auto}, AutoTokenizer

folder = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder{extra})
{use}"""
LOAD_SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".")  # the folder of this file
vectors = model.encode(["The history of the city begins", "How the town came to be"])
print(vectors @ vectors.T)"""


def model_card(
    name: str, run: Path, step: int, config: ModelConfig, hf: dict[str, Any], parameters: int, auto: str,
    proof: dict[str, Any],
) -> str:  # fmt: skip
    """The text of README.md. `proof`: what `parity.prove` compared."""
    is_embedding = config.head == "embedding"
    front = {
        "library_name": "sentence-transformers" if is_embedding else "transformers",
        "pipeline_tag": "sentence-similarity" if is_embedding else PIPELINES[auto],
        "tags": [hf["model_type"], "pretrain"],
    }
    facts = {
        "architecture": hf["architectures"][0],
        "parameters": f"{parameters:,}",
        "layers, width, heads": f"{config.layers}, {config.width}, {config.heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"{config.max_positions:,}",
        "weights": hf["dtype"],
        **({"labels": ", ".join(hf["id2label"].values())} if "id2label" in hf else {}),
        **_source(run),
        **_training(run, step),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    extra = ", add_pooling_layer=False" if auto == "AutoModel" and config.head == "none" else ""
    scale = "sigmoid()" if hf.get("problem_type") == "multi_label_classification" else "softmax(-1)"
    use = USES[auto].format(scale=scale) if "{scale}" in USES[auto] else USES[auto]
    load = LOAD_SENTENCES if is_embedding else LOAD.format(auto=auto, extra=extra, use=use)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

| | |
|---|---|
{table}

## Load it

```python
{load}
```

## Checked

Before this folder got its name, it was loaded with transformers {proof["transformers"]} ({proof["class"]}) and compared
with the weights that it was made from: {proof["compared"]} of {proof["positions"]:,} {proof["unit"]} of text and random
ids differ by at most {proof["max_difference"]:.1e} (fp32), {_continued(proof)}the ids and the decoding of
{proof["texts"]} tricky texts are equal.
"""


def _continued(proof: dict[str, Any]) -> str:
    count = proof["continued_tokens"]
    return f"{count} tokens of greedy continuations agree, " if count else ""


def _source(run: Path) -> dict[str, str]:
    """Of an imported model: where it came from."""
    path = run / "imported.json"
    if not path.is_file():
        return {}
    imported = json.loads(path.read_text())
    hashes = ", ".join(f"{name} {digest[:12]}" for name, digest in imported["sha256"].items())
    return {"imported from": f"{imported['source']} ({imported['architecture']})", "its files (sha256)": hashes}


def _training(run: Path, step: int) -> dict[str, str]:
    """Of a trained one: how long, how, on what, how well."""
    facts = {"step": f"{step:,}"} if step else {}
    task = _json(run / "task.json")
    unit = "target" if task else "token"
    if task:
        facts["task"] = task["name"]
    rows = [row for row in _rows(run / "metrics.jsonl") if row["step"] <= step]
    if rows:
        facts |= {"tokens seen": f"{rows[-1]['tokens']:,}", "training loss": f"{rows[-1]['loss']:.4f} nats a {unit}"}
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        facts[f"validation at step {validated[-1]['step']:,}"] = _quality(validated[-1], unit)
    evaluated = _json(run / "evaluation.json")
    if evaluated and evaluated["step"] == step:
        facts["evaluation on all held-out text"] = _quality(evaluated, unit)
    if (run / "config.yaml").is_file():
        config = compose.read(run / "config.yaml")
        if config.init:
            facts["started from"] = Path(config.init).name
        if not task:
            facts["objective"] = config.objective.name
        facts["optimizer"] = (f"{config.optim.name}, peak learning rate {config.optim.lr:g}, {config.schedule.name}, "
                              f"weight decay {config.optim.weight_decay:g}")  # fmt: skip
        batch = config.train.global_batch_size
        facts["batch"] = f"{batch} examples" if task else f"{batch} x {config.train.seq_len} tokens"
        facts["seed"] = str(config.seed)
    return facts | {f"data: {key}": f"`{value}`" for key, value in _json(run / "data.json").items()}


def _quality(row: dict[str, Any], unit: str) -> str:
    told = [f"loss {row['val_loss']:.4f} nats a {unit}"]
    for key, value in row.items():
        if key == "val_bits_per_byte" and value is not None:
            told.append(f"{value:.4f} bits per byte")
        elif key.startswith("val_") and key != "val_loss" and value is not None:
            told.append(f"{key.removeprefix('val_').replace('_', ' ')} {value:.4f}")
    return ", ".join(told)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The journal, without a last line that is still being written."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
