"""The model card of an exported model: what it is, how it was trained and how well, how to load it, what was compared.

Everything in it comes from the run's own files; what a run does not have is left out.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from pretrain import compose
from pretrain.config import ModelConfig

PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask",
             "AutoModel": "feature-extraction"}  # fmt: skip
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
}  # fmt: skip


def model_card(
    name: str, run: Path, step: int, config: ModelConfig, hf: dict[str, Any], parameters: int, auto: str,
    proof: dict[str, Any],
) -> str:  # fmt: skip
    """The text of README.md. `proof`: what `parity.prove` compared."""
    front = {"library_name": "transformers", "pipeline_tag": PIPELINES[auto], "tags": [hf["model_type"], "pretrain"]}
    facts = {
        "architecture": hf["architectures"][0],
        "parameters": f"{parameters:,}",
        "layers, width, heads": f"{config.layers}, {config.width}, {config.heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "positions": f"{config.max_positions:,}",
        "weights": hf["dtype"],
        **_source(run),
        **_training(run, step),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    extra = ", add_pooling_layer=False" if auto == "AutoModel" and config.head == "none" else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

| | |
|---|---|
{table}

## Load it

```python
from transformers import {auto}, AutoTokenizer

folder = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder{extra})
{USES[auto]}
```

## Checked

Before this folder got its name, it was loaded with transformers {proof["transformers"]} ({proof["class"]}) and compared
with the weights that it was made from: {proof["compared"]} of {proof["positions"]:,} positions of text and random ids
differ by at most {proof["max_difference"]:.1e} (fp32), {_continued(proof)}the ids and the decoding of {proof["texts"]}
tricky texts are equal.
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
    rows = [row for row in _rows(run / "metrics.jsonl") if row["step"] <= step]
    if rows:
        facts |= {"tokens seen": f"{rows[-1]['tokens']:,}", "training loss": f"{rows[-1]['loss']:.4f} nats a token"}
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        facts[f"validation at step {validated[-1]['step']:,}"] = _quality(validated[-1])
    evaluated = _json(run / "evaluation.json")
    if evaluated and evaluated["step"] == step:
        facts["evaluation on all held-out text"] = _quality(evaluated)
    if (run / "config.yaml").is_file():
        config = compose.read(run / "config.yaml")
        if config.init:
            facts["started from"] = Path(config.init).name
        facts["objective"] = config.objective.name
        facts["optimizer"] = (f"{config.optim.name}, peak learning rate {config.optim.lr:g}, {config.schedule.name}, "
                              f"weight decay {config.optim.weight_decay:g}")  # fmt: skip
        facts["batch"] = f"{config.train.global_batch_size} x {config.train.seq_len} tokens"
        facts["seed"] = str(config.seed)
    return facts | {f"data: {key}": f"`{value}`" for key, value in _json(run / "data.json").items()}


def _quality(row: dict[str, Any]) -> str:
    loss = f"loss {row['val_loss']:.4f} nats a token"
    bits = row.get("val_bits_per_byte")
    return loss if bits is None else f"{loss}, {bits:.4f} bits per byte"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The journal, without a last line that is still being written."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
