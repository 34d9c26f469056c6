"""python tools/show_model.py model=NAME [train.seq_len=T] [KEY=VALUE ...] [--ranks 8] [--precision bf16] [--json]

What a model is, before anything is allocated: its modules with the shapes of their parameters, how many these are,
the FLOPs of training on a token, and the bytes that each rank holds at each ZeRO stage. KEY=VALUE as the trainer takes
them.

    python tools/show_model.py model=llama_8b train.seq_len=8192 --ranks 64
    python tools/show_model.py model=llama_14m model.vocab_size=24576 model.layers=6

"""

import argparse
import json
from typing import Any

from pretrain.cli import run_tool
from pretrain.config import compose
from pretrain.config.schema import Config, ModelConfig
from pretrain.model.heads import parameter_shapes, trained_parameters
from pretrain.model.transformer import flops_per_token

EPILOG = """
non-embedding parameters leave out what is looked up: token, position and segment embeddings (a tied output matrix is
the token embedding; one of its own counts).

flops_per_token: forward and backward, 6 a matrix weight and 12 x layers x width x T for attention (windows count as
full). A model that is not causal is trained by masked_lm: only objective.mask_rate of its tokens need logits.

bytes, with AdamW as the trainer runs it:
  weights    that the model computes with: 2 bytes each in bf16, 4 in fp32; ZeRO 3 shares them out
  gradients  when a backward pass is done, 4 bytes each; ZeRO 2 and 3 share them out; in bf16, ZeRO 0 has 2 bytes each,
             ZeRO 1 both
  optimizer  two moments, 8 bytes a weight, and the weights in fp32, 4 (not for ZeRO 0 in fp32, where the weights are);
             ZeRO 1, 2 and 3 share them out
On top come activations, DeepSpeed's buffers, what ZeRO 3 gathers or keeps whole (small parameters) to compute, and
while the optimizer works, when the activations are gone, often its part of the gradients once more in fp32.
"""
LOOKED_UP = ("trunk.embedding.", "trunk.positions.", "trunk.segments.")
FP32 = 4
ROOMY = "model.max_positions=1073741824"


def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=form)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="+", help="model=NAME, and changes to it")
    parser.add_argument("--ranks", type=int, default=8, help="GPUs that share a model (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    args = parser.parse_intermixed_args(argv)
    if args.ranks < 1:
        parser.error("--ranks counts from 1")
    facts = describe(configure(args.overrides), args.ranks, args.precision)
    print(json.dumps(facts, indent=1) if args.json else in_words(facts))


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
    counts = {name: count(shape) for name, shape in shapes.items()}
    parameters, predicted = sum(counts.values()), 1.0 if model.causal else config.objective.mask_rate
    trained = sum(counts[name] for name in trained_parameters(model))
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "non_embedding_parameters": sum(n for name, n in counts.items() if not name.startswith(LOOKED_UP)),
        "flops_per_token": flops_per_token(model, seq_len, predicted),
        "seq_len": seq_len,
        "predicted": predicted,
        "ranks": ranks,
        "precision": precision,
        "bytes_per_rank": {
            f"zero{stage}": bytes_per_rank(parameters, trained, stage, ranks, precision) for stage in range(4)
        },
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "tied": tied(model),
    }


def bytes_per_rank(parameters: int, trained: int, stage: int, ranks: int, precision: str) -> dict[str, int]:
    """What a rank holds of a model under ZeRO (Rajbhandari et al., 2020) as `deepspeed_config` sets it up."""
    part, low = -(-trained // ranks), 2 if precision == "bf16" else FP32
    in_both = low + FP32 if low < FP32 else FP32
    gradients = {0: low * trained, 1: in_both * trained, 2: FP32 * part, 3: FP32 * part}
    copy = FP32 if stage or low < FP32 else 0
    found = {
        "weights": low * (-(-parameters // ranks) if stage == 3 else parameters),
        "gradients": gradients[stage],
        "optimizer": (2 * FP32 + copy) * (part if stage else trained),
    }
    return found | {"sum": sum(found.values())}


def tied(model: ModelConfig) -> dict[str, str]:
    """Parameters that are another one, by name."""
    return {"head.weight": "trunk.embedding.weight"} if model.head == "lm" and model.tied_embeddings else {}


def count(shape: list[int] | tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


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
        f"GB a rank, {facts['ranks']} ranks, {facts['precision']}",
        f"{'':8}{'weights':>12}{'gradients':>12}{'optimizer':>12}{'sum':>12}",
    ]
    for stage, sizes in facts["bytes_per_rank"].items():
        lines.append(f"{stage:8}" + "".join(f"{size / 1e9:12.3f}" for size in sizes.values()))
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
