"""Models to and from Hugging Face's folders: proven equal, or refused in words with nothing left behind."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from pretrain import entry, hardware  # noqa: E402
from pretrain.checkpoint import load  # noqa: E402
from pretrain.checkpoint.load import Weights, load_model  # noqa: E402
from pretrain.checkpoint.manifest import MANIFEST, Reader, committed, manifest_bytes  # noqa: E402
from pretrain.checkpoint.save import write_weights  # noqa: E402
from pretrain.checkpoint.tensors import TensorFolder  # noqa: E402
from pretrain.cli import STOP_SIGNALS, STOPPED, uninterrupted  # noqa: E402
from pretrain.config import compose  # noqa: E402
from pretrain.config.schema import ModelConfig  # noqa: E402
from pretrain.dist import Ranks  # noqa: E402
from pretrain.engine.fragments import WEIGHT, Fragment  # noqa: E402
from pretrain.hub import convert, families, folder, parity  # noqa: E402
from pretrain.model.heads import parameter_shapes  # noqa: E402
from pretrain.tokenizer import huggingface  # noqa: E402
from pretrain.tokenizer.chat import ChatFormat  # noqa: E402
from pretrain.tokenizer.sentencepiece import SentencePieceTokenizer  # noqa: E402
from pretrain.tokenizer.tokenizer import load_tokenizer  # noqa: E402
from tests import forked  # noqa: E402
from tests.forked import ROOT  # noqa: E402
from tests.journals import journal  # noqa: E402
from tests.tokenizer.test_huggingface import byte_level, word_piece  # noqa: E402
from tools import export_hf, import_hf  # noqa: E402

SMALL = ["run.name=x", "data.train=x", "train.seq_len=32", "model.layers=2", "model.width=24", "model.heads=4",
         "model.max_positions=96", "model.ffn_width=40", "model.dropout=0"]  # fmt: skip

PYTHON = sys.executable
pytestmark = pytest.mark.usefixtures("transformers_forked")


def model(*overrides: str, vocab_size: int) -> ModelConfig:
    return replace(compose.compose("pretrain", [*SMALL, *overrides]).model, vocab_size=vocab_size)


def drawn(config: ModelConfig):
    """Random weights by name, of a size at which every one of them matters."""
    shapes = parameter_shapes(config)

    def read(name: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        values = torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed))
        return 0.2 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)

    return read


def write_run(folder: Path, config: ModelConfig, tokenizer) -> Path:
    write_weights(folder, config, drawn(config))
    (folder / tokenizer.file_name).write_bytes(tokenizer.file_bytes)
    return folder


def equal(one: Path, other: Path) -> bool:
    """Whether two runs hold the same weights, bit for bit."""
    one, other = Weights(one), Weights(other)
    return one.shapes == other.shapes and all(torch.equal(one.read(name), other.read(name)) for name in one.shapes)


def unseen(folder: Path) -> list[str]:
    """What lies in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """BERT's kind of tokenizer, as a Hugging Face folder."""
    return saved(tmp_path_factory.mktemp("words"), *word_piece())


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """RoBERTa's kind of tokenizer: bytes, and its ids of special tokens (padding is 1)."""
    made, _ = byte_level()
    content = json.loads(made.to_str())
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    vocab = {token: id_ + 3 for token, id_ in content["model"]["vocab"].items() if not token.startswith("<|")}
    content["model"]["vocab"] = {token: id_ for id_, token in enumerate(names.values())} | vocab
    content["added_tokens"] = []
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens(list(names.values()))
    made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False,
                                                                 add_prefix_space=False)  # fmt: skip
    roles = {f"{name}_token": token for name, token in names.items()} | {"cls_token": "<s>", "sep_token": "</s>"}
    return saved(tmp_path_factory.mktemp("pieces"), made, roles)


@pytest.fixture(scope="module")
def endoftext(tmp_path_factory) -> Path:
    """GPT-2's kind of tokenizer: its only special token ends a text."""
    return saved(tmp_path_factory.mktemp("endoftext"), *byte_level())


def saved(folder: Path, made, roles: dict) -> Path:
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained(folder)
    return folder


def test_a_trained_run_becomes_a_proven_folder_with_a_card_and_comes_back_bit_for_bit(
    undisturbed, capsys, environment, tmp_path
):
    export_hf.main([str(undisturbed), "--output", str(tmp_path / "hf")])
    said = capsys.readouterr().out
    assert "equal to transformers" in said and "72 tokens of greedy text" in said
    assert unseen(tmp_path) == ["hf"]
    assert unseen(tmp_path / "hf") == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    hf, tokenizer = json.loads((tmp_path / "hf/config.json").read_text()), load_tokenizer(undisturbed)
    assert hf["architectures"] == ["LlamaForCausalLM"] and hf["vocab_size"] == tokenizer.vocab_size
    for name in ("bos", "eos", "pad"):
        assert hf[f"{name}_token_id"] == tokenizer.special_ids[name]
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == tokenizer.eos

    card = (tmp_path / "hf/README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llama", "pretrain"]}
    last = journal(undisturbed)[-1]
    data = json.loads((undisturbed / "data.json").read_text())
    for fact in (f"| step | {last['step']} |", f"{last['tokens']:,}", f"{last['loss']:.4f}", f"{last['val_loss']:.4f}",
                 f"{last['val_bits_per_byte']:.4f} bits per byte", data["train"], "causal_lm", "adamw"):  # fmt: skip
        assert fact in card
    code = card.split("```python\n")[1].split("```")[0]
    line = forked.program("-c", code)
    ran = subprocess.run(line, cwd=tmp_path / "hf", env=environment, capture_output=True, text=True, timeout=600)
    assert ran.stdout.startswith("The history of the city begins"), ran.stderr

    facts = convert.import_hf(tmp_path / "hf", tmp_path / "back", check=False)
    assert facts["source"] == "hf" and facts["proof"] is None and equal(undisturbed, tmp_path / "back")
    digest = hashlib.sha256((tmp_path / "hf/model.safetensors").read_bytes()).hexdigest()
    assert facts["sha256"]["model.safetensors"] == digest
    assert load_tokenizer(tmp_path / "back").encode("a  text") == tokenizer.encode("a  text")


def test_zero3_in_bf16_shards_and_a_checkpoint_by_name(train, transformers_here, tmp_path):
    train(
        2,
        "run.name=zero3",
        "deepspeed=zero3",
        "train.steps=2",
        "train.save_every=1",
        "log.sample_tokens=0",
        "train.checkpoint_file_gb=1e-6",
    )
    first = train.root / "zero3" / "checkpoints" / "step-000000001"
    assert len(list(first.glob("part-*"))) == 2, "what a rank has is more than train.checkpoint_file_gb"
    proof = convert.export_hf(first, tmp_path / "hf", "bf16", 0.0001)
    assert proof["max_difference"] <= parity.TOLERANCE and "| step | 1 |" in (tmp_path / "hf/README.md").read_text()
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    tensors = {name: load_file(tmp_path / "hf" / file)[name] for name, file in index["weight_map"].items()}
    assert sum(tensor.nbytes for tensor in tensors.values()) == index["metadata"]["total_size"]
    assert all((tmp_path / "hf" / name).stat().st_size < 101_000 for name in shards)
    ours = Weights(first)
    full = ours.read("trunk.blocks.1.ffn.up.weight")
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], full.bfloat16())
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    convert.import_hf(tmp_path / "hf", tmp_path / "back", check=False)
    back = Weights(tmp_path / "back")
    assert all(torch.equal(back.read(name), ours.read(name).bfloat16().float()) for name in ours.shapes)


TUNED = {  # a model, its head, its tokenizer, the class it becomes
    "bert": ("bert_base", "sequence", "words", "BertForSequenceClassification"),
    "bert embedding": ("bert_base", "embedding", "words", "BertModel"),
    "roberta": ("roberta_base", "tokens", "pieces", "RobertaForTokenClassification"),
    "modernbert": ("modernbert_base", "span", "words", "ModernBertForQuestionAnswering"),
    "gpt2, padding of its own": ("gpt2_124m", "sequence", "own", "GPT2ForSequenceClassification"),
    "gpt2": ("gpt2_124m", "sequence", "endoftext", "GPT2ForSequenceClassification"),
    "llama with lora": ("llama_tiny", "tokens", "own", "LlamaForTokenClassification"),
    "qwen3 embedding": ("llama_14m", "embedding", "endoftext", "Qwen3Model"),
}  # fmt: skip


@pytest.mark.parametrize("case", TUNED)
def test_a_tuned_model_goes_out_proven_with_its_labels_and_comes_back(
    case, request, shards, transformers_here, monkeypatch, capsys, tmp_path
):
    preset, head, kind, name = TUNED[case]
    tokenizer = load_tokenizer(shards if kind == "own" else request.getfixturevalue(kind))
    labels = ["bad", "so so", "gut, für alle"] if head in ("sequence", "tokens") else []
    base = model(f"model={preset}", vocab_size=tokenizer.vocab_size)
    config = replace(families.fitting_head(base, head, len(labels)), lora_rank=2 * (case == "llama with lora"))
    run, task = write_run(tmp_path / "run", config, tokenizer), folder.TASK_OF_HEAD[head]
    facts = {"name": task, "labels": labels, "multi_label": case == "bert"}
    (run / "task.json").write_text(json.dumps(facts))
    proof = convert.export_hf(run, tmp_path / "hf")
    assert proof["class"] == name and proof["max_difference"] <= parity.TOLERANCE
    written = json.loads((tmp_path / "hf/config.json").read_text())
    if labels:
        assert list(written["id2label"].values()) == list(written["label2id"]) == labels
        assert (written.get("problem_type") == "multi_label_classification") == (case == "bert")
    if case == "gpt2":  # nothing to fill up with but what ends a text
        settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
        assert written["pad_token_id"] == tokenizer.eos and settings["pad_token"] == settings["eos_token"]
    convert.import_hf(tmp_path / "hf", tmp_path / "back", check=False)
    assert equal(run, tmp_path / "back") and json.loads((tmp_path / "back/task.json").read_text()) == (
        facts | {"seq_len": config.max_positions}
    )
    card = (tmp_path / "hf/README.md").read_text()
    assert f"| task | {task} |" in card
    if case in ("bert", "roberta", "modernbert"):
        monkeypatch.chdir(tmp_path / "hf")
        exec(card.split("```python\n")[1].split("```")[0], {})
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("kind", ["own", "endoftext"])
def test_a_model_tuned_on_chats_brings_the_template_that_it_was_tuned_with(
    kind, request, shards, transformers_here, monkeypatch, capsys, tmp_path
):
    tokenizer = load_tokenizer(shards if kind == "own" else request.getfixturevalue(kind))
    config = model("model=llama_tiny", vocab_size=tokenizer.vocab_size)
    run, task = write_run(tmp_path / "run", config, tokenizer), {"name": "instruct", "labels": [], "chat": True}
    (run / "task.json").write_text(json.dumps(task))
    convert.export_hf(run, tmp_path / "hf")
    roles = ("system", "user", "assistant", "user")
    talk = [{"role": role, "content": f"{role}: wie geht's?\n 漢 🙂 "} for role in roles]
    ours, theirs = ChatFormat(tokenizer), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    again = ChatFormat(load_tokenizer(tmp_path / "hf"))
    assert ours.is_default and not again.is_default and again.template == ours.template
    for prompt in (False, True):
        ids = theirs.apply_chat_template(talk, add_generation_prompt=prompt, return_dict=False)
        assert ids == ours.encode(talk, prompt)[0] == again.encode(talk, prompt)[0] and tokenizer.eos in ids
    monkeypatch.chdir(tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert "User: How does the history" in capsys.readouterr().out and "remove such texts" in card
    for other in ({}, task | {"chat": False}):
        files = convert.tokenizer_files(tokenizer, config, other, 64)
        assert files == tokenizer.hf_files(config.max_positions) and "chat_template.jinja" not in files


@pytest.mark.parametrize("head, changed", [("sequence", "classifier.weight"), ("embedding", "final_norm.weight")])
def test_a_head_with_one_other_number_is_caught(head, changed, words, transformers_here, tmp_path):
    tokenizer = load_tokenizer(words)
    base = model("model=modernbert_10m", vocab_size=tokenizer.vocab_size)
    config = families.fitting_head(base, head, 2 if head == "sequence" else 0)
    run = write_run(tmp_path / "run", config, tokenizer)
    convert.export_hf(run, tmp_path / "hf")
    edit(tmp_path / "hf", "model.safetensors", lambda tensors: tensors[changed].view(-1)[3].add_(0.05))
    with pytest.raises(ValueError, match=r"(logits|sentence_embedding) part on the English passage, masked: number "):
        parity.prove(tmp_path / "hf", config, Weights(run).read, tokenizer, tmp_path / "scratch")


def test_labels_of_another_number_than_the_outputs_are_refused(words, tmp_path):
    tokenizer = load_tokenizer(words)
    config = families.fitting_head(model("model=bert_base", vocab_size=tokenizer.vocab_size), "tokens", 3)
    run = write_run(tmp_path / "run", config, tokenizer)
    (run / "task.json").write_text(json.dumps({"name": "token_classification", "labels": ["O"], "multi_label": False}))
    with pytest.raises(ValueError, match="names 1 labels, the model has 3 outputs"):
        convert.export_hf(run, tmp_path / "hf")


def test_a_causal_classifier_without_padding_is_compared_row_by_row(theirs, transformers_here, tmp_path):
    """As many on the hub are: config.json has no pad_token_id, and transformers takes one text at a time."""
    folder = shutil.copytree(theirs, tmp_path / "it", ignore=shutil.ignore_patterns("model*", "config.json"))
    config = transformers.AutoConfig.from_pretrained(theirs, num_labels=4)
    torch.manual_seed(0)
    transformers.MistralForSequenceClassification(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None
    facts = convert.import_hf(folder, tmp_path / "run")
    assert facts["proof"]["compared"] == "logits" and facts["proof"]["unit"] == "rows"
    assert json.loads((tmp_path / "run/task.json").read_text())["labels"] == [f"LABEL_{n}" for n in range(4)]


def test_runs_checkpoints_and_folders_of_theirs_are_opened_alike(theirs, tmp_path):
    convert.import_hf(theirs, tmp_path / "run", check=False)
    places = [tmp_path / "run", tmp_path / "run/checkpoints/step-000000000", theirs]
    opened, loaded = map(convert.open_model, places), [convert.load_model(place) for place in places]
    first, second, third = opened
    assert first.config == second.config == third.config and first.shapes == second.shapes == third.shapes
    for name, parameter in loaded[0].named_parameters():
        for weights, other in zip((first, second, third), loaded, strict=True):
            assert torch.equal(weights.read(name), parameter) and torch.equal(other.get_parameter(name), parameter)
            assert torch.equal(weights.read_range(name, 3, 9), parameter.view(-1)[3:12])
    with pytest.raises(ValueError, match="no checkpoint in"):
        convert.open_model(tmp_path)


def test_the_parts_of_a_tensor_are_read_once(shards, transformers_here, monkeypatch, tmp_path):
    tokenizer = load_tokenizer(shards)
    config = model("model=gpt2_124m", vocab_size=tokenizer.vocab_size)
    convert.export_hf(write_run(tmp_path / "run", config, tokenizer), tmp_path / "hf")
    found, read, right = convert.open_model(tmp_path / "hf"), [], TensorFolder.read
    monkeypatch.setattr(TensorFolder, "read", lambda folder, name: read.append(name) or right(folder, name))
    ours = Weights(tmp_path / "run")
    for name in found.shapes:
        assert torch.equal(found.read(name), ours.read(name))
    assert len(read) == len(set(read)) < len(found.shapes)
    for name, shape in found.shapes.items():
        count = torch.Size(shape).numel()
        ends = [0, count // 5, count // 2 + 1, count]
        parts = [found.read_range(name, start, end - start) for start, end in itertools.pairwise(ends)]
        assert torch.equal(torch.cat(parts), ours.read(name).reshape(-1))


def mapped_bytes(name: str) -> int:
    """How much of the files of this name is mapped into this process: what was read of them, in pages."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = line.endswith(name)
        elif is_ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_rank_reads_no_more_of_a_folder_than_it_owns(tied, shards, transformers_here, tmp_path):
    tokenizer = load_tokenizer(shards)
    config = model("model=llama_tiny", f"model.tied_embeddings={tied}", "model.width=512", vocab_size=9000)
    convert.export_hf(write_run(tmp_path / "run", config, tokenizer), tmp_path / "hf", dtype="bf16")
    found, before = convert.open_model(tmp_path / "hf", config), mapped_bytes("hf/model.safetensors")
    for name, shape in found.shapes.items():  # the last of four ranks
        part = torch.Size(shape).numel() // 4
        found.read_range(name, 3 * part, part)
    read, size = mapped_bytes("hf/model.safetensors") - before, (tmp_path / "hf/model.safetensors").stat().st_size
    around = 2 * len(found.shapes) << 16  # the kernel maps 64 KiB at a time
    assert 0.9 * size / 4 < read < size / 4 + around < size / 2


FAMILIES = {
    "gpt2": (["model=gpt2_124m", "model.tied_embeddings=false"], "own", "GPT2LMHeadModel"),
    "bert": (["model=bert_base"], "words", "BertForMaskedLM"),
    "bert without a pooler": (["model=bert_base", "model.head=none", "model.head_transform=false",
                               "model.head_bias=false"], "words", "BertModel"),
    "roberta": (["model=roberta_base"], "pieces", "RobertaForMaskedLM"),
    "modernbert": (["model=modernbert_base", "model.layers=3", "model.global_every=2", "model.sliding_window=16"],
                   "words", "ModernBertForMaskedLM"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_out_proven_and_comes_back_bit_for_bit(family, request, shards, transformers_here, tmp_path):
    overrides, kind, name = FAMILIES[family]
    tokenizer = load_tokenizer(shards if kind == "own" else request.getfixturevalue(kind))
    config = model(*overrides, vocab_size=tokenizer.vocab_size + 3)  # rows that no token has
    run = write_run(tmp_path / "run", config, tokenizer)
    proof = convert.export_hf(run, tmp_path / "hf")
    assert proof["class"] == name and proof["max_difference"] <= parity.TOLERANCE
    assert (proof["continued_tokens"] > 0) == config.causal
    card = (tmp_path / "hf/README.md").read_text()
    assert ("generation_config.json" in unseen(tmp_path / "hf")) == config.causal
    assert ("add_pooling_layer=False" in card) == (config.head == "none") and "| step |" not in card
    convert.import_hf(tmp_path / "hf", tmp_path / "back", check=False)
    assert equal(run, tmp_path / "back")
    assert (tmp_path / "back" / huggingface.FILE_NAME).is_file()


@pytest.fixture(scope="module")
def theirs(words, tmp_path_factory) -> Path:
    """A Mistral of transformers with a window, and BERT's kind of tokenizer."""
    folder = tmp_path_factory.mktemp("theirs") / "mistral"
    shutil.copytree(words, folder)
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=load_tokenizer(words).vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, sliding_window=7,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_of_theirs_comes_in_proven_and_the_tool_says_so(theirs, capsys, monkeypatch, tmp_path):
    """By a transformers that is not forked: in a process that never knew anything of ours."""
    monkeypatch.setattr(sys, "executable", PYTHON)
    import_hf.main([str(theirs), "--output", str(tmp_path / "runs" / "it")])
    said = capsys.readouterr().out
    assert "MistralForCausalLM" in said and "equal to transformers" in said
    assert unseen(tmp_path / "runs") == ["it"]
    facts = json.loads((tmp_path / "runs/it/imported.json").read_text())
    assert facts["source"] == "mistral" and facts["proof"]["max_difference"] <= parity.TOLERANCE
    assert load_model(tmp_path / "runs/it").trunk.config.sliding_window == 7


def test_an_import_that_computes_something_else_leaves_nothing(theirs, transformers_here, tmp_path):
    with pytest.raises(ValueError, match="do not agree.*logits part on the English passage at position 7 "):
        convert.import_hf(theirs, tmp_path / "runs" / "it", ["sliding_window"])  # transformers does not ignore it
    assert unseen(tmp_path / "runs") == []


def edit(folder: Path, name: str, change) -> None:
    """Change a JSON file, or the tensors of a safetensors file."""
    path = folder / name
    content = json.loads(path.read_text()) if name.endswith(".json") else load_file(path)
    content = {name: tensor.clone() for name, tensor in content.items()} if not name.endswith(".json") else content
    change(content)
    path.write_text(json.dumps(content)) if name.endswith(".json") else save_file(content, path, {"format": "pt"})


def weights(change):
    return lambda folder: edit(folder, "model.safetensors", change)


def settings(**values):
    return lambda folder: edit(folder, "config.json", lambda config: config.update(values))


def into_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def into_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    listed = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def poison(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


REFUSED = {
    "another architecture": (settings(model_type="mamba"), "model_type='mamba' is not supported"),
    "an unknown setting": (settings(rotary_pct=0.5), "rotary_pct=0.5 may change what the model computes"),
    "a shape": (weights(lambda t: t.update({"lm_head.weight": torch.zeros(9, 16)})),
                r"lm_head.weight has the shape \[9, 16\], config.json calls for \[1200, 16\]"),
    "a missing tensor": (weights(lambda t: t.pop("model.norm.weight")), "lacks tensors.*model.norm.weight"),
    "an unknown tensor": (weights(lambda t: t.update({"model.extra.weight": torch.zeros(1)})), "model.extra.weight"),
    "whole numbers": (weights(lambda t: t.update({"model.norm.weight": torch.zeros(16).char()})),
                      "model.norm.weight is stored as I8"),
    "a copy that is none": (settings(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens"),
    "too many tokens": (lambda folder: edit(folder, "tokenizer.json", lambda t: t["model"]["vocab"].update(more=1200)),
                        "1,201 ids, the model's embedding only 1,200 rows"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "a pickle": (into_pickle, "pytorch_model.bin and not in model.safetensors. That is a pickle.*run whatever code.*"
                 "t.MistralForCausalLM.*import it-safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a missing shard": (into_index, "names model-00001-of-00002.safetensors .for lm_head.weight., which is not in"),
    "a cut file": (cut, "model.safetensors is damaged or cut short"),
    "not a number": (weights(poison), "model.layers.1.mlp.up_proj.weight has values that are not finite"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_imported_is_named_and_nothing_written(what, theirs, tmp_path):
    change, message = REFUSED[what]
    folder = shutil.copytree(theirs, tmp_path / "it")
    change(folder)
    with pytest.raises(ValueError, match=message):
        convert.import_hf(folder, tmp_path / "run", check=False)
    assert unseen(tmp_path) == ["it"]


def test_rank_0_looks_whether_a_copy_is_one_before_a_run_starts_from_a_folder(theirs, tmp_path):
    folder = shutil.copytree(theirs, tmp_path / "it")
    settings(tie_word_embeddings=True)(folder)
    cfg, config = SimpleNamespace(init=str(folder)), convert.open_model(folder).config
    assert entry.check_initial_weights(cfg, config, Ranks(1, 2, 1)) == {}
    for look in (lambda: entry.check_initial_weights(cfg, config, Ranks(0, 2, 0)), lambda: convert.load_model(folder)):
        with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens"):
            look()


def test_the_command_that_converts_a_pickle_does(theirs, environment, tmp_path):
    folder = shutil.copytree(theirs, tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError) as refused:
        convert.import_hf(folder, tmp_path / "run")
    command = str(refused.value).split("convert it (")[1].split(") and import")[0]
    command = command.replace("python", str(forked.python()), 1)
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=600)
    convert.import_hf(tmp_path / "old-safetensors", tmp_path / "run", check=False)
    convert.import_hf(theirs, tmp_path / "direct", check=False)
    assert equal(tmp_path / "run", tmp_path / "direct")


def test_the_name_of_a_hub_model_an_output_that_is_there_and_another_vocabulary(theirs, tmp_path, shards):
    with pytest.raises(ValueError, match="there is no folder org/gpt9: .*hf download org/gpt9 --local-dir gpt9"):
        import_hf.main(["org/gpt9", "--output", str(tmp_path / "run")])
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        convert.import_hf(theirs, tmp_path / "there")
    run = write_run(tmp_path / "run", model("model=llama_tiny", vocab_size=100), load_tokenizer(shards))
    with pytest.raises(ValueError, match="512 ids, the model's embedding only 100 rows"):
        convert.export_hf(run, tmp_path / "hf")
    config = model("model=llama_tiny", "model.activation=relu2", vocab_size=512)
    run = write_run(tmp_path / "run2", config, load_tokenizer(shards))
    with pytest.raises(ValueError, match="model.activation=relu2"):
        convert.export_hf(run, tmp_path / "hf")
    assert unseen(tmp_path) == ["run", "run2", "there"]


def test_without_transformers_nothing_is_exported_and_an_import_says_that_it_was_not_compared(
    theirs, run, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"only when transformers shows.*pip install 'pretrain\[hf\]'"):
        convert.export_hf(run, tmp_path / "hf")
    import_hf.main([str(theirs), "--output", str(tmp_path / "it")])
    assert "NOT compared with transformers: to do so, launch/setup.sh all in a checkout" in capsys.readouterr().out
    import_hf.main([str(theirs), "--output", str(tmp_path / "it2"), "--no-check"])
    assert "NOT compared with transformers: to do so, leave out --no-check" in capsys.readouterr().out
    assert unseen(tmp_path) == ["it", "it2", "run"]


@pytest.fixture
def run(shards, tmp_path) -> Path:
    config = model("model=llama_tiny", "model.kv_heads=2", vocab_size=512)
    return write_run(tmp_path / "run", config, load_tokenizer(shards))


def test_a_wrong_rule_is_caught_and_leaves_nothing(run, transformers_here, tmp_path, monkeypatch):
    def swapped(config, model_type):
        for tensor in right(config, model_type):
            swap = {"trunk.blocks.1.ffn.up.weight": "trunk.blocks.1.ffn.gate.weight"}
            yield replace(tensor, ours=tuple(swap.get(name, name) for name in tensor.ours))

    right = convert.hf_tensors
    monkeypatch.setattr(convert, "hf_tensors", swapped)
    with pytest.raises(ValueError, match="do not agree.*logits part on the English passage at position 0 .id 1,"):
        convert.export_hf(run, tmp_path / "hf")
    assert unseen(tmp_path) == ["run"]


def test_a_wrong_token_is_caught_and_leaves_nothing(run, transformers_here, tmp_path, monkeypatch):
    def swapped(tokenizer, *settings):
        files = right(tokenizer, *settings)
        content = json.loads(files["tokenizer.json"])
        vocab = content["model"]["vocab"]
        vocab["<0x01>"], vocab["<0x1B>"] = vocab["<0x1B>"], vocab["<0x01>"]
        return files | {"tokenizer.json": json.dumps(content).encode()}

    right = SentencePieceTokenizer.hf_files
    monkeypatch.setattr(SentencePieceTokenizer, "hf_files", swapped)
    with pytest.raises(ValueError, match=r"do not agree.*tokenizers part on 'nul \\x00 inside.*from id number \d+ on"):
        convert.export_hf(run, tmp_path / "hf")
    assert unseen(tmp_path) == ["run"]


def test_continuations_may_part_at_a_tie_only():
    config = model("model=llama_tiny", vocab_size=512)
    for gap, right in ((0.5 * parity.TOLERANCE, True), (2 * parity.TOLERANCE, False)):

        def logits(tokens, documents, segments, gap=gap):
            made = torch.zeros(*tokens.shape, config.vocab_size)
            made[..., 7], made[..., 9] = 1.0, 1.0 - gap
            return made

        logits.head = None
        answer = {"continuations": [[9]] * 3, "continued_texts": [""] * 3}
        tokenizer = SimpleNamespace(vocab_size=0, special_ids={}, decode="".join)
        if right:
            parity.check_continuations(logits, answer, [[1], [2], [3, 4]], tokenizer)
        else:
            with pytest.raises(ValueError, match="part at token 1: transformers goes on with id 9, this .* id 7"):
                parity.check_continuations(logits, answer, [[1], [2], [3, 4]], tokenizer)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("sent", STOP_SIGNALS)
def test_a_signal_waits_for_the_end_of_what_must_be_whole(sent):
    done = []
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), sent)
        time.sleep(0.01)
        done.append(True)
    assert done and [signal.getsignal(number) for number in STOP_SIGNALS] == before
    ignored = signal.signal(sent, signal.SIG_IGN)
    with uninterrupted():
        os.kill(os.getpid(), sent)
        assert signal.getsignal(sent) is signal.SIG_IGN, "what is started meanwhile ignores it too"
    signal.signal(sent, ignored)


def test_interrupted_while_transformers_computes_neither_it_nor_a_file_is_left(run, environment, tmp_path):
    command = [PYTHON, str(ROOT / "tools/export_hf.py"), str(run), "--output", str(tmp_path / "hf")]
    tool = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 600
    while not (found := children(tool.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ".hf.partial" in unseen(tmp_path)
    tool.send_signal(signal.SIGTERM)
    said, _ = tool.communicate(timeout=600)
    assert tool.returncode == STOPPED and said.endswith(
        "interrupted: no output was written; run the same command again\n"
    ), said
    assert unseen(tmp_path) == ["run"]
    assert found and not any(Path(f"/proc/{child}").exists() for child in found)


def test_two_exports_to_one_folder_and_what_a_killed_one_left(run, tmp_path):
    with convert.staged(tmp_path / "hf") as staging:
        with pytest.raises(ValueError, match="another process is writing"), convert.staged(tmp_path / "hf"):
            pass
        assert staging.is_dir(), "the other's folder stays"
    (tmp_path / ".left.partial" / "inner").mkdir(parents=True)
    (tmp_path / ".left.partial" / "model.safetensors").write_text("half")
    with convert.staged(tmp_path / "left"):
        pass
    assert unseen(tmp_path / "left") == [] and unseen(tmp_path) == ["hf", "left", "run"]


def test_training_cannot_go_on_from_weights_alone(run):
    (first,) = committed(run / "checkpoints")
    ours = Weights(run)
    name, shape = next(iter(ours.shapes.items()))
    half = torch.zeros(ours.read(name).numel() // 2)
    load.fill(Reader(first), [Fragment(name, WEIGHT, len(half), shape, half)])
    assert torch.equal(half, ours.read(name).view(-1)[len(half) :])
    assert torch.equal(half[5:9], ours.read_range(name, len(half) + 5, 4))
    with pytest.raises(ValueError, match=f"weights only.*init={run}"):
        load.fill(Reader(first), [Fragment(name, "exp_avg", 0, shape, half)])


def test_a_checkpoint_of_other_shapes_than_its_config_is_named(run):
    (first,) = committed(run / "checkpoints")
    found = Reader(first)
    header = replace(found.header, model=found.header.model | {"ffn_width": 48})
    (first / MANIFEST).write_bytes(manifest_bytes(header, found.manifest["parameters"], found.files))
    with pytest.raises(ValueError, match=r"6 shapes differing.*ffn.up.weight has \(40, 24\), not \(48, 24\)"):
        load_model(run)


MEASURE = """
import json, sys, threading, time
from pathlib import Path
from pretrain.hub import convert
def anonymous(pid):
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon")), 0.0)
    except OSError:
        return 0.0
def watch():
    while True:
        peak[0] = max(peak[0], anonymous("self"))
        for child in Path("/proc/self/task").glob("*/children"):
            peak[1] = max([peak[1], *map(anonymous, child.read_text().split())])
        time.sleep(0.005)
peak = [0.0, 0.0]
threading.Thread(target=watch, daemon=True).start()
found = []
dtype, *runs = sys.argv[1:]
for run in runs:  # a tiny model first: what both processes take for themselves
    peak[:] = [anonymous("self"), 0.0]
    convert.export_hf(Path(run), Path(run + "-hf"), dtype)
    found.append([*peak])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", hardware.DTYPES)
def test_memory_is_bounded_by_the_largest_tensor_not_the_model(shards, environment, tmp_path, dtype):
    tokenizer = load_tokenizer(shards)
    config = replace(model("model=llama_tiny", vocab_size=10_000), layers=9, heads=8,
                     width=1024, ffn_width=2816, max_positions=parity.LENGTH)  # fmt: skip
    sizes = [torch.Size(shape).numel() * 4e-6 for shape in parameter_shapes(config).values()]
    assert sum(sizes) > 400 and max(sizes) < 45
    # rows of the full length: shorter ones would hide what the logits take
    runs = [write_run(tmp_path / "tiny", model("model=llama_tiny", vocab_size=512), tokenizer),
            write_run(tmp_path / "big", config, tokenizer)]  # fmt: skip
    command = [sys.executable, "-c", MEASURE, dtype, *map(str, runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    tiny, big = json.loads(done.stdout.splitlines()[-1])
    for who, before, after in zip(("this program", "transformers"), tiny, big, strict=True):
        said = f"{who}: {before:.0f} -> {after:.0f} MB, for {sum(sizes):.0f} MB of model"
        # each holds some of the largest at a time, 8.7 seen as the allocator happens to give them back; all would be 11
        assert after - before < 9.5 * max(sizes), said


def test_a_folder_that_cuts_long_texts_elsewhere_is_no_proof(shards, transformers_here, tmp_path):
    """A pipeline of transformers cuts at the tokenizer's model_max_length: at another length its answers are others."""
    tokenizer = load_tokenizer(shards)
    config = families.fitting_head(model("model=bert_base", vocab_size=tokenizer.vocab_size), "sequence", 2)
    tuned = write_run(tmp_path / "tuned", config, tokenizer)
    facts = {"name": "classification", "labels": ["bad", "good"], "multi_label": False}
    (tuned / "task.json").write_text(json.dumps(facts))
    convert.export_hf(tuned, tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings["model_max_length"] == config.max_positions == 96
    file.write_text(json.dumps(settings | {"model_max_length": 40}))
    source = folder.open_source(tmp_path / "hf")
    with pytest.raises(ValueError, match="a text of more than 96 tokens is cut to 40 by transformers and to 96 by"):
        parity.prove(tmp_path / "hf", source.config, source.read, tokenizer, tmp_path / "scratch", length=96)
