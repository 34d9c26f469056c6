"""The model card of an exported model: what it is, how it was trained and how well, how to load it, what was compared.

Everything in it comes from the run's own files; what a run does not have is left out.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import compose
from pretrain.config.held_out import parted, text_of
from pretrain.config.schema import ModelConfig
from pretrain.files import DATA, EVALUATION, IMPORTED, TASK, TRAINED_ON, read_lines, read_object
from pretrain.report import theme

_MODEL_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_SAYS_NOTHING = re.compile(  # names of folders that are as good for any model
    r"[./\\~]*|(hf|my)?[_-]?(models?|checkpoints?|weights|exports?|exported|outputs?|snapshots|hf)|final|best|last|latest|"
    r"(checkpoint|step)-\d+|[0-9a-f]{40}", re.IGNORECASE,
)  # fmt: skip
PIPELINES = {
    "AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask", "AutoModel": "feature-extraction",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification", "AutoModelForQuestionAnswering": "question-answering",
}  # fmt: skip
USES = {
    "AutoModelForCausalLM": '''\
inputs = tokenizer("The history of the city begins", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))''',
    "chat": '''\
messages = [{"role": "user", "content": "How does the history of the city begin?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
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
CHAT_WARNING = """
In training, whatever a message held was text. transformers takes the text of a special token in a message for the
token: remove such texts from messages that others write.
"""
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
    is_chat = bool(read_object(run / TASK).get("chat"))
    load = LOAD_SENTENCES if is_embedding else _load(auto, config, hf, USES["chat" if is_chat else auto])
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
{CHAT_WARNING if is_chat else ""}
## Checked

Before this folder got its name, it was loaded with transformers {proof["transformers"]} ({proof["class"]}) and compared
with the weights that it was made from: {proof["compared"]} of {proof["positions"]:,} {proof["unit"]} of text and random
ids differ by at most {proof["max_difference"]:.1e} (fp32), {_continued(proof)}the ids and the decoding of
{proof["texts"]} tricky texts are equal.
"""


def _load(auto: str, config: ModelConfig, hf: dict[str, Any], use: str) -> str:
    extra = ", add_pooling_layer=False" if auto == "AutoModel" and config.head == "none" else ""
    scale = "sigmoid()" if hf.get("problem_type") == "multi_label_classification" else "softmax(-1)"
    return LOAD.format(auto=auto, extra=extra, use=use.format(scale=scale) if "{scale}" in use else use)


def _continued(proof: dict[str, Any]) -> str:
    count = proof["continued_tokens"]
    return f"{count} tokens of greedy continuations agree, " if count else ""


def _source(run: Path) -> dict[str, str]:
    """Of an imported model: where it came from."""
    imported = read_object(run / IMPORTED)
    if not imported:
        return {}
    hashes = ", ".join(f"{name} {digest[:12]}" for name, digest in imported["sha256"].items())
    return {"imported from": f"{imported['source']} ({imported['architecture']})", "its files (sha256)": hashes}


def _training(run: Path, step: int) -> dict[str, str]:
    """Of a trained one: how long, how, on what, how well."""
    facts = {"step": f"{step:,}"} if step else {}
    task = read_object(run / TASK)
    unit = "target" if task else "token"
    if task:
        facts["task"] = task["name"]
    rows = [row for row in read_lines(run / "metrics.jsonl") if row["step"] <= step]
    if rows:
        facts |= {"tokens seen": f"{rows[-1]['tokens']:,}", "training loss": f"{rows[-1]['loss']:.4f} nats a {unit}"}
    validated = [row for row in rows if any(name.startswith("val_") for name in row)]
    if validated:
        facts[f"validation at step {validated[-1]['step']:,}"] = _quality(validated[-1], unit)
    evaluated = read_object(run / EVALUATION)
    if evaluated.get("step") == step:
        facts[f"evaluation on all {text_of(evaluated)}"] = _quality(evaluated, unit)
    if (run / "config.yaml").is_file():
        config = compose.read(run / "config.yaml")
        if config.init:
            facts["started from"] = model_name(config.init)
        if not task:
            facts["objective"] = config.objective.name
        facts["optimizer"] = (f"{config.optim.name}, peak learning rate {config.optim.lr:g}, {config.schedule.name}, "
                              f"weight decay {config.optim.weight_decay:g}")  # fmt: skip
        batch = config.train.global_batch_size
        facts["batch"] = f"{batch} examples" if task else f"{batch} x {config.train.seq_len} tokens"
        facts["seed"] = str(config.seed)
    data = read_object(run / DATA)
    if data.pop(TRAINED_ON, None):
        facts["note"] = "(some of) the validation data was trained on too: its figures are not of held-out text"
    return facts | {f"data: {key}": f"`{value}`" for key, value in data.items()}


def model_name(location: str | Path) -> str:
    """What a run, one of its checkpoints or a Hugging Face folder is called, for others: by the names of its own folder
    and of the two above, where these are deep enough to be no user's or disk's.
    """
    path = Path(location)
    if path.exists():
        path = Path(os.path.abspath(path))
    if path.parent.name == "checkpoints" and (step := re.fullmatch(r"step-(\d+)", path.name)):
        return f"{path.parent.parent.name}, step {int(step[1]):,}"
    if (path / "config.yaml").is_file():  # a run: whatever it is called, its maker named it so
        return path.name
    said = read_object(path / "config.json").get("_name_or_path")
    if isinstance(said, str) and _MODEL_ID.fullmatch(said) and not _says_nothing(said.rpartition("/")[2]):
        return said
    imported = read_object(path / IMPORTED).get("source", "")
    above = path.parts[3 if path.is_absolute() else 0 : -1]  # /home/somebody, /scratch/project
    for name in (path.name, imported, *above[:-3:-1]):
        if name.startswith("models--"):  # the cache of the hub: models--google--bert/snapshots/<hash>
            return name.removeprefix("models--").replace("--", "/")
        if not _says_nothing(name):
            return name
    return path.name


def _says_nothing(name: str) -> bool:
    return bool(_SAYS_NOTHING.fullmatch(name))


def _quality(row: dict[str, Any], unit: str) -> str:
    told = []
    for name, value in row.items():
        if not name.startswith("val_") or value is None:
            continue
        held_out, figure = parted(name)
        if figure == "bits_per_byte":
            told.append(f"{held_out} {value:.4f} bits per byte".lstrip())
        else:
            told.append(f"{theme.words(name)} {value:.4f}" + f" nats a {unit}" * (figure == "loss"))
    return ", ".join(told)
