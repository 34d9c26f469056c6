"""tools/show_model.py: sizes against the model built, FLOPs against torch's count, bytes against real engines."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import compose
from pretrain.engine import memory
from pretrain.model.heads import build_model
from pretrain.model.losses import loss_rows
from pretrain.model.output import ON_GPU
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
    said = [*overrides(name, 48), f"model.value_embeddings={int(name == 'llama_14m')}"]
    found = shown(capsys, *said)
    cfg = compose.compose("pretrain", ["run.name=x", *said]).model
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
    assert "zero3          0.251       0.702       1.506" in text, "the bucket of the gradients is whole on every rank"


def test_seventy_billion_parameters_take_no_time(tool):
    found = json.loads(tool("show_model.py", "model=llama_70b", "--json", "--ranks", 64).stdout)
    assert found["parameters"] == 70_553_706_496
    zero0, zero3 = (found["bytes_per_rank"][stage] for stage in ("zero0", "zero3"))
    assert zero0["weights"] + zero0["gradients"] + zero0["optimizer"] == 16 * 70_553_706_496
    assert zero3["weights"] + zero3["optimizer"] == 14 * 1_102_401_664  # a 64th


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


CASES = [f"{precision}-{stage}" for precision in ("fp32", "bf16", "fp16") for stage in range(precision == "fp16", 4)]
MUON = [f"{case}-muon" for case in CASES if "fp16" not in case]
CLASSES = {
    "fp32-0": "AdamW", "fp32-0-muon": "Orthogonalizer", "bf16-0": "FP16_UnfusedOptimizer", "bf16-1": "BF16_Optimizer"
} | {f"{precision}-3": "DeepSpeedZeroOptimizer_Stage3" for precision in ("fp32", "bf16", "fp16")}  # fmt: skip
# Small buckets and nothing kept whole, or these would be most of the memory.
SMALL_ONE = ["model=llama_tiny", "model.layers=6", "model.vocab_size=64", "++deepspeed.extra={zero_optimization: "
             "{reduce_bucket_size: 5000, stage3_param_persistence_threshold: 0}}"]  # fmt: skip
LARGE_ONE = ["model=llama_tiny", "model.width=768", "model.layers=14", "model.heads=12", "model.kv_heads=12",
             "model.ffn_width=2048", "model.vocab_size=20000"]  # fmt: skip


def expected_of(capsys, model, case):
    precision, stage, *optimizer = case.split("-")
    rows = ["train.micro_batch_size=1", "train.seq_len=16", *(f"optim={name}" for name in optimizer)]
    return shown(capsys, *model, *rows, "--ranks", "2", "--precision", precision)["bytes_per_rank"][f"zero{stage}"]


@pytest.fixture(scope="module")
def held(worker):
    """What engines on 2 ranks hold, by rank."""
    return worker("memory_worker.py", ",".join(CASES + MUON), *SMALL_ONE)


@pytest.mark.parametrize("case", CASES + MUON)
def test_the_bytes_are_those_that_an_engine_holds(capsys, held, case):
    expected = expected_of(capsys, SMALL_ONE, case)
    for rank in held:
        found = rank[case]
        assert found["class"] == CLASSES.get(case, CLASSES.get(case[:6], "DeepSpeedZeroOptimizer"))
        for key in ("weights", "optimizer"):
            assert found[key] == pytest.approx(expected[key], rel=0.001), "but for padding"
        # what stages 2 and 3 gather and reduce at a time is all of so small a model
        assert found["peak"] == pytest.approx(expected["peak"], rel=0.05 if case[5] in "01" else 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + MUON)
def test_the_bytes_of_a_model_of_a_hundred_million_parameters(capsys, worker, case):
    """Also of the process, which has buckets that it has not filled, and gloo's own copies, of which NCCL has none."""
    expected = expected_of(capsys, LARGE_ONE, case)
    found = [rank[case] for rank in worker("memory_worker.py", case, *LARGE_ONE)]
    for kind, rel in (("peak", 0.05), ("resident", 0.1)):
        assert max(rank[kind] for rank in found) == pytest.approx(expected["peak"], rel=rel), "of the rank with most"


def test_the_logits_of_all_positions_are_no_part_of_a_step():
    small = ["model=gpt2_124m", "model.layers=1", "model.width=64", "model.heads=1"]
    model = compose.compose("pretrain", ["run.name=x", *small]).model
    found, whole = memory.activations(model, 32, 1024, "bf16", "full"), 2 * 32 * 1024 * model.vocab_size
    assert found.kept < 0.02 * whole and found.kept + 2 * ON_GPU.piece < found.most < 0.3 * whole


def test_each_checkpointing_keeps_less_and_computes_more(capsys):
    found = shown(capsys, "model=llama_1b", "model.layers=2", "train.seq_len=512")
    none, ffn, full = (found["activations"][kind] for kind in ("none", "ffn", "full"))
    for name in ("kept", "most"):
        assert none[name] > ffn[name] > full[name] > 0
    assert 1 == none["flops"] < ffn["flops"] < full["flops"] < 4 / 3
    extra = found["bytes_per_rank"]["zero1"]["extra"]
    other = shown(capsys, "model=llama_1b", "model.layers=2", "train.seq_len=512", "train.activation_checkpointing=ffn")
    assert extra - other["bytes_per_rank"]["zero1"]["extra"] == none["most"] - ffn["most"]


def test_what_fits_is_found(capsys):
    show_model.main(["model=gpt2_124m", "--fit", "1x24GB"])
    words = capsys.readouterr().out
    assert "124,439,808 parameters in bf16, 1,024 tokens a row, on 1 card of 24 GB, of which 21.6 are used" in words
    found = shown(capsys, "model=gpt2_124m", "model.layers=4", "--fit", "2x4GB")
    assert [(each["stage"], each["activation_checkpointing"]) for each in found["fits"]] == [
        (stage, checkpointing) for checkpointing in ("none", "ffn", "full") for stage in (1, 2, 3)
    ]
    for each in found["fits"]:
        assert each["bytes"] + each["left"] == found["usable_bytes"] == 3_600_000_000 and each["left"] >= 0
        keys = [f"train.activation_checkpointing={each['activation_checkpointing']}", "train.global_batch_size=256"]
        said, twice = (
            shown(capsys, "model=gpt2_124m", "model.layers=4", "--ranks", "2", *keys, f"train.micro_batch_size={rows}")
            for rows in (each["micro_batch_size"], 2 * each["micro_batch_size"])
        )
        assert said["bytes_per_rank"][f"zero{each['stage']}"]["peak"] == each["bytes"]
        assert twice["bytes_per_rank"][f"zero{each['stage']}"]["peak"] > found["usable_bytes"], "or it would fit"
    show_model.main(["model=gpt2_124m", "--fit", "1x1GB"])
    assert "nothing fits: 2.7 GB on each are needed before any activation" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--fit eight is no number of cards and their memory: write it as 8x80GB"):
        show_model.main(["model=gpt2_124m", "--fit", "eight"])


def test_what_does_not_fit_a_card_is_refused_with_what_does():
    eight = memory.Sizes(8_030_261_248, 8_030_261_248, 2 * 8_030_261_248)
    memory.check_fits(eight, 2, 8, "bf16", 80 * 10**9)
    model = compose.compose("pretrain", ["run.name=x", "model=llama_8b"]).model
    assert memory.counts(model, "adamw") == eight
    head = memory.counts(model, "adamw", lambda name: name.startswith("head."))
    assert head[:2] == (eight[0], 128_256 * 4096)
    memory.check_fits(head, 1, 1, "bf16", 80 * 10**9)  # a head alone learns on one card
    with pytest.raises(ValueError) as refused:
        memory.check_fits(eight, 0, 8, "bf16", 80 * 10**9)
    for said in ("deepspeed=zero0 in bf16 needs 160.", "the card has 80.0 GB", "deepspeed=zero1 (60.2 GB)",
                 "deepspeed=zero3 ("):  # fmt: skip
        assert said in str(refused.value)
    with pytest.raises(ValueError, match="no stage fits: take more GPUs or a smaller model"):
        memory.check_fits(eight, 3, 1, "bf16", 80 * 10**9)


def test_muon_keeps_one_moment_of_a_matrix_and_updates_one_at_a_time():
    model = compose.compose("pretrain", ["run.name=x", "model=llama_8b"]).model
    found, adamw = memory.counts(model, "muon"), memory.counts(model, "adamw")
    matrices = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert found == (*adamw[:2], adamw.moments - matrices, 3 * 14336 * 4096 + 2 * 4096 * 4096)
    for stage, ranks in ((0, 1), (1, 8), (2, 8), (3, 8)):
        less = memory.footprint(adamw, stage, ranks, "bf16").optimizer - 4 * matrices // ranks
        assert memory.footprint(found, stage, ranks, "bf16").optimizer == less
    alone = [memory.footprint(sizes, 2, 1, "bf16", bucket=1).extra for sizes in (adamw, found)]
    assert alone[1] - alone[0] == 2 * found.update
