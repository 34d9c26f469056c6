"""python tools/show_model.py model=NAME [train.seq_len=T] [KEY=VALUE ...] [--ranks 8] [--precision bf16] [--json]

What a model is, before anything is allocated: its modules with the shapes of their parameters, how many these are,
the FLOPs of training on a token, and the bytes that each rank holds at each ZeRO stage. KEY=VALUE as the trainer takes
them.

    python tools/show_model.py model=llama_8b train.seq_len=8192 --ranks 64
    python tools/show_model.py model=llama_8b train.seq_len=8192 --fit 8x80GB
    python tools/show_model.py model=llama_14m model.vocab_size=24576 model.layers=6

"""

import argparse
import json
import math
import re
import sys
from dataclasses import asdict
from typing import Any

from pretrain.cli import run_tool
from pretrain.config import compose
from pretrain.config.schema import Config, ModelConfig
from pretrain.engine import memory
from pretrain.engine.settings import bucket_of
from pretrain.hardware import PRECISIONS
from pretrain.model.heads import parameter_shapes
from pretrain.model.transformer import flops_per_token, recomputed_flops_per_token

EPILOG = """
non-embedding parameters leave out what is looked up: token, position and segment embeddings (a tied output matrix is
the token embedding; one of its own counts).

flops_per_token: forward and backward, 6 a matrix weight and 12 x layers x width x T for attention (windows count as
full). A model that is not causal is trained by masked_lm: only objective.mask_rate of its tokens need logits.

bytes, as the trainer runs it, gradients accumulated over micro-batches:
  weights    that the model computes with: 2 bytes each in bf16 and fp16, 4 in fp32; ZeRO 3 shares them out
  gradients  summed over the micro-batches in fp32, 4 bytes each; ZeRO 2 and 3 share them out; ZeRO 0 sums nothing up in
             bf16, and has 2 bytes each
  optimizer  two moments, 8 bytes a weight (optim=muon: one, 4 bytes, of the matrices of blocks), and the weights in
             fp32, 4 (not for ZeRO 0 in fp32, where the weights are); ZeRO 1, 2 and 3 share them out
  extra      the most that comes on top within a step: activations of train.micro_batch_size rows of train.seq_len
             tokens, buckets and copies that are reduced, parameters that ZeRO 3 gathers
activations are those of each train.activation_checkpointing: kept by a forward pass, the most at any moment, and the
FLOPs, with what is computed again, over those without. pretrain/engine/README.md has the formulas. What CUDA itself
takes, 1 to 2 GB, is not counted.

--fit CARDSxGB: of stages 1 to 3, for each activation checkpointing, from none to full, the largest micro-batch that
fits (a tenth of the card is kept for CUDA and for memory in pieces), and what is left. What stands first communicates
and computes least. Labels count as if every token had one.
"""
LOOKED_UP = ("trunk.embedding.", "trunk.positions.", "trunk.segments.", "trunk.values.")
KEPT_FREE = 0.1  # of a card: CUDA itself, libraries, memory in pieces
ROOMY = "model.max_positions=1073741824"


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=form)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="+", help="model=NAME, and changes to it")
    parser.add_argument(
        "--ranks", type=int, default=8, help="GPUs that share a model (default: %(default)s; --fit has its own)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="default: %(default)s")
    parser.add_argument("--fit", metavar="CARDSxGB", help="what fits so many cards of so much memory, as 8x80GB")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    args = parser.parse_intermixed_args(argv)
    if args.ranks < 1:
        parser.error("--ranks counts from 1")
    config = configure(args.overrides)
    if args.fit:
        print("measuring activations on tensors without memory (10 to 40 s)", file=sys.stderr)
        facts = fit(config, *cards(args.fit), args.precision)
        words = fit_in_words(facts)
    else:
        facts = describe(config, args.ranks, args.precision)
        words = in_words(facts)
    print(json.dumps(facts, indent=1) if args.json else words)


def configure(overrides: list[str]) -> Config:
    """The composed run; a length that nobody asked for is shortened to what the model has positions for."""
    overrides = ["run.name=show", *overrides]
    if not any(override.lstrip("+").startswith("train.seq_len=") for override in overrides):
        default = compose.compose("pretrain", [*overrides, ROOMY]).train.seq_len
        longest = compose.compose("pretrain", [*overrides, "train.seq_len=1"]).model.max_positions
        overrides.append(f"train.seq_len={min(default, longest)}")
    config = compose.compose("pretrain", overrides)
    if not config.model.vocab_size:
        raise ValueError(
            "model.vocab_size=0: this model takes the vocabulary of the run's tokenizer; say how large it is with "
            "model.vocab_size=N"
        )
    return config


def describe(config: Config, ranks: int, precision: str) -> dict[str, Any]:
    """Everything that is shown, as plain numbers."""
    model, seq_len = config.model, config.train.seq_len
    shapes = parameter_shapes(model)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    predicted = 1.0 if model.causal else config.objective.mask_rate
    sizes = memory.counts(model, config.optim.name)
    rows, checkpointing = config.train.micro_batch_size, config.train.activation_checkpointing
    measured = {kind: memory.activations(model, rows, seq_len, precision, kind) for kind in memory.CHECKPOINTING}
    activations, flops = measured[checkpointing], flops_per_token(model, seq_len, predicted)
    bucket = bucket_of(config.deepspeed)
    return {
        "parameters": sizes.parameters,
        "trained_parameters": sizes.trained,
        "non_embedding_parameters": sum(n for name, n in counts.items() if not name.startswith(LOOKED_UP)),
        "flops_per_token": flops,
        "seq_len": seq_len,
        "predicted": predicted,
        "ranks": ranks,
        "precision": precision,
        "bytes_per_rank": {
            f"zero{stage}": asdict(found) | {"peak": found.peak}
            for stage in range(4)
            for found in [memory.footprint(sizes, stage, ranks, precision, activations, bucket)]
        },
        "micro_batch_size": rows,
        "activation_checkpointing": checkpointing,
        "activations": {
            kind: asdict(found) | {"flops": 1 + recomputed_flops_per_token(model, seq_len, kind) / flops}
            for kind, found in measured.items()
        },
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "tied": tied(model),
    }


def cards(text: str) -> tuple[int, int]:
    """`8x80GB` -> (8 cards, bytes of each)."""
    found = re.fullmatch(r"(\d+)\s*x\s*(\d+(?:\.\d+)?)\s*GB", text, re.IGNORECASE)
    if not found or not int(found[1]):
        raise ValueError(f"--fit {text} is no number of cards and their memory: write it as 8x80GB")
    return int(found[1]), int(float(found[2]) * 1e9)


def fit(config: Config, ranks: int, card_bytes: int, precision: str) -> dict[str, Any]:
    """What fits the cards, and what would be needed where nothing does."""
    counts = memory.counts(config.model, config.optim.name)
    room, length = int(card_bytes * (1 - KEPT_FREE)), config.train.seq_len
    bucket = bucket_of(config.deepspeed)
    fits = list(memory.fitting(config.model, counts, ranks, room, length, precision, bucket))
    least = min(memory.footprint(counts, stage, ranks, precision, bucket=bucket).peak for stage in (1, 2, 3))
    return {"ranks": ranks, "card_bytes": card_bytes, "usable_bytes": room, "precision": precision, "seq_len": length,
            "parameters": counts.parameters, "fits": fits, "least_bytes": least}  # fmt: skip


def fit_in_words(facts: dict[str, Any]) -> str:
    number = "1 card" if facts["ranks"] == 1 else f"{facts['ranks']} cards"
    head = (
        f"{facts['parameters']:,} parameters in {facts['precision']}, {facts['seq_len']:,} tokens a row, on {number} "
        f"of {facts['card_bytes'] / 1e9:g} GB, of which {facts['usable_bytes'] / 1e9:g} are used"
    )
    if not facts["fits"]:
        return (f"{head}\nnothing fits: {facts['least_bytes'] / 1e9:.1f} GB on each are needed before any activation. "
                "More cards, a shorter train.seq_len or a smaller model would.")  # fmt: skip
    lines = [head, f"{'':16}{'checkpointing':>14}{'micro-batch':>13}{'GB a rank':>11}{'GB left':>9}"]
    for found in facts["fits"]:
        sizes = f"{found['bytes'] / 1e9:>11.1f}{found['left'] / 1e9:>9.1f}"
        kind, rows = found["activation_checkpointing"], found["micro_batch_size"]
        lines.append(f"deepspeed=zero{found['stage']} {kind:>14}{rows:>13}{sizes}")
    first = facts["fits"][0]
    keys = [f"deepspeed=zero{first['stage']}", f"train.micro_batch_size={first['micro_batch_size']}"]
    keys += [f"train.activation_checkpointing={first['activation_checkpointing']}"]
    return "\n".join([*lines, f"take {' '.join(keys)}"])


def tied(model: ModelConfig) -> dict[str, str]:
    """Parameters that are another one, by name."""
    return {"head.weight": "trunk.embedding.weight"} if model.head == "lm" and model.tied_embeddings else {}


def in_words(facts: dict[str, Any]) -> str:
    leaves = {name: str(shape) for name, shape in facts["shapes"].items()}
    leaves |= {name: f"is {other}" for name, other in facts["tied"].items()}
    share = "" if facts["predicted"] == 1 else f", logits of {facts['predicted']:.0%} of the tokens"
    lora = [f"trained parameters        {facts['trained_parameters']:>16,}   (of LoRA)"]
    lora = lora if facts["trained_parameters"] < facts["parameters"] else []
    lines = [
        *tree(nested(leaves)),
        "",
        f"parameters                {facts['parameters']:>16,}",
        f"non-embedding parameters  {facts['non_embedding_parameters']:>16,}",
        *lora,
        f"flops_per_token           {facts['flops_per_token']:>16,.0f}   ({facts['seq_len']:,} tokens a row{share})",
        "",
        f"GB a rank, {facts['ranks']} ranks, {facts['precision']}, {facts['micro_batch_size']} rows at a time, "
        f"activation checkpointing {facts['activation_checkpointing']}",
        f"{'':8}{'weights':>12}{'gradients':>12}{'optimizer':>12}{'extra':>12}{'peak':>12}",
    ]
    for stage, sizes in facts["bytes_per_rank"].items():
        lines.append(f"{stage:8}" + "".join(f"{size / 1e9:12.3f}" for size in sizes.values()))
    lines += ["", f"{'GB of activations':24}{'kept':>12}{'most':>12}{'FLOPs':>12}"]
    for kind, found in facts["activations"].items():
        lines.append(
            f"checkpointing {kind:10}{found['kept'] / 1e9:12.3f}{found['most'] / 1e9:12.3f}{found['flops']:12.2f}"
        )
    return "\n".join(lines)


def nested(leaves: dict[str, str]) -> dict[str, Any]:
    """Dotted names -> dictionaries within dictionaries, by module."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *modules, last = name.split(".")
        node = root
        for module in modules:
            node = node.setdefault(module, {})
        node[last] = leaf
    return root


def tree(node: dict[str, Any], indent: str = "") -> list[str]:
    """A line for each module, its parameters behind it; modules in a row that are alike are shown once."""
    lines, names = [], [name for name, child in node.items() if isinstance(child, dict)]
    while names:
        name = names.pop(0)
        child, alike = node[name], name
        while names and name.isdigit() and node[names[0]] == child:
            alike = names.pop(0)
        title = indent + (name if alike == name else f"{name} ... {alike}")
        own = ", ".join(f"{key} {leaf}" for key, leaf in child.items() if isinstance(leaf, str))
        lines += [f"{title:24}  {own}".rstrip(), *tree(child, indent + "  ")]
    return lines


if __name__ == "__main__":
    run_tool(main)
