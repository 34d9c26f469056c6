"""tools/show_model.py: sizes against the model built, FLOPs against torch's count, bytes against real engines."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import compose
from pretrain.model.heads import build_model
from pretrain.model.losses import loss_rows
from pretrain.model.transformer import flops_per_token
from tools import show_model

SMALL = ["model.layers=3", "model.width=64", "model.heads=4", "model.vocab_size=211", "model.attention=plain"]
FAMILIES = {
    "gpt2_124m": [], "llama_8b": ["model.kv_heads=2", "model.ffn_width=160"],
    "llama_14m": ["model.ffn_width=160", "model.head_width=24"], "sinusoidal_base": [], "bert_base": [],
    "roberta_base": [], "modernbert_base": ["model.ffn_width=96", "model.sliding_window=16"],
}  # fmt: skip


def overrides(name, seq_len):
    return [f"model={name}", f"train.seq_len={seq_len}", *SMALL, *FAMILIES[name]]


def shown(capsys, *arguments):
    show_model.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("share", [1.0, 0.15])
@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_those_that_torch_counts(name, share):
    cfg = compose.compose("pretrain", ["run.name=x", *overrides(name, 64)]).model
    torch.manual_seed(0)
    tokens = torch.randint(0, 211, (4, 64))
    labels = torch.where(torch.rand(4, 64) < share, tokens, -100)
    predicted = float((labels != -100).double().mean())
    with FlopCounterMode(display=False) as counter:
        loss_rows(build_model(cfg), tokens, labels, sparse=share < 1).sum().backward()
    expected = flops_per_token(cfg, 64, predicted) * tokens.numel()
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert predicted == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sizes_are_those_of_the_model(capsys, name):
    found = shown(capsys, *overrides(name, 48))
    cfg = compose.compose("pretrain", ["run.name=x", *overrides(name, 48)]).model
    model = build_model(cfg)
    assert found["shapes"] == {key: list(value.shape) for key, value in model.named_parameters()}
    assert found["parameters"] == sum(value.numel() for value in model.parameters())
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    assert found["non_embedding_parameters"] == found["parameters"] - sum(table.weight.numel() for table in tables)
    assert found["flops_per_token"] == flops_per_token(cfg, 48, 1.0 if cfg.causal else 0.15) and found["seq_len"] == 48


def test_the_tree_names_every_parameter_and_shows_equal_blocks_once(capsys):
    show_model.main(["model=modernbert_base"])
    text = capsys.readouterr().out
    assert "    0\n      attention\n" in text and "    1 ... 21\n      attention_norm      weight [768]\n" in text
    assert text.count("up                weight [1152, 768]") == 2, "the first block has no norm"
    assert "head                      bias [50368], weight is trunk.embedding.weight" in text
    assert "149,655,232" in text and "1,024 tokens a row, logits of 15% of the tokens" in text
    show_model.main(["model=llama_8b", "train.seq_len=8192", "--ranks", "64"])
    text = capsys.readouterr().out
    assert "0 ... 31" in text and "head                      weight [128256, 4096]" in text
    assert "zero3          0.251       0.502       1.506       2.259" in text


def test_seventy_billion_parameters_take_no_time(tool):
    found = json.loads(tool("show_model.py", "model=llama_70b", "--json", "--ranks", 64).stdout)
    assert found["parameters"] == 70_553_706_496
    assert found["bytes_per_rank"]["zero0"]["sum"] == 16 * 70_553_706_496
    assert found["bytes_per_rank"]["zero3"]["sum"] == 18 * 1_102_401_664  # a 64th


def test_a_length_that_nobody_asked_for_fits_the_model(capsys):
    assert shown(capsys, "model=bert_base")["seq_len"] == 512
    assert shown(capsys, "model=gpt2_124m")["seq_len"] == 1024
    assert shown(capsys, "experiment=quickstart", "model.vocab_size=24576")["seq_len"] == 256
    with pytest.raises(ValueError, match="train.seq_len=1024 is longer than model.max_positions=512"):
        shown(capsys, "model=bert_base", "train.seq_len=1024")


def test_mistakes_are_explained(tool):
    for arguments, said in (
        (["model=llama_14m"], "error: model.vocab_size=0: this model takes the vocabulary of the run's tokenizer"),
        (["model=llama_9b"], "did you mean llama_"),
        (["model=bert_base", "model.layrs=3"], "did you mean model.layers?"),
    ):
        done = tool("show_model.py", *arguments, check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def held(worker):
    """What engines on 2 ranks hold, by rank."""
    return worker("memory_worker.py")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bytes_are_those_that_an_engine_holds(capsys, held, precision, stage):
    model = ["model=llama_tiny", "model.layers=6", "model.vocab_size=64"]
    expected = shown(capsys, *model, "--ranks", "2", "--precision", precision)["bytes_per_rank"][f"zero{stage}"]
    for rank in held:
        found = rank[f"{precision}-{stage}"]
        for key in ("weights", "optimizer"):
            assert found[key] == pytest.approx(expected[key], rel=0.001), "but for padding"
        assert found["sum"] == pytest.approx(expected["sum"], rel=0.02)
