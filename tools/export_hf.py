"""python tools/export_hf.py runs/NAME --output DIR

Exports a run's newest checkpoint (of a fine-tuned run its best; or the checkpoint folder given) as a Hugging Face
folder: config.json with the names of labels, safetensors, tokenizer, model card. LoRA is merged; an embedding model is
one that SentenceTransformer loads. Any ZeRO stage and number of ranks, without a GPU, with memory for the largest
tensor, not the model. transformers loads the result and is compared with the checkpoint (logits or embeddings, greedy
text, token ids); DIR does not appear when they differ.
"""

import argparse
from pathlib import Path

from pretrain import hardware
from pretrain.cli import run_tool, stops_as_ctrl_c
from pretrain.hub import convert


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Export a run as a Hugging Face folder, proven equal.",
        epilog="example: python tools/export_hf.py runs/quickstart --output quickstart-hf --dtype bf16",
    )
    parser.add_argument("run", type=Path, help="the run's folder, or one of its checkpoints")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make; must not exist")
    parser.add_argument("--dtype", choices=tuple(hardware.DTYPES), default="fp32", help="of the weights (%(default)s)")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file (%(default)s)")
    args = parser.parse_args(argv)
    if args.shard_gb <= 0:
        parser.error("--shard-gb must be positive")
    with stops_as_ctrl_c():
        proof = convert.export_hf(args.run, args.output, args.dtype, args.shard_gb)
    print(f"wrote {args.output}: {proof['class']}")
    print(convert.said(proof))


if __name__ == "__main__":
    run_tool(main, tells=True)
