"""python tools/generate.py runs/NAME --prompt "def " --max-tokens 100

Continues a prompt with a run's newest checkpoint (or the checkpoint folder given), printing as it goes.
"""

import argparse
import sys
from pathlib import Path

from pretrain import checkpoint, generate
from pretrain.cli import run_tool
from pretrain.data.tokenizer import load_tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder, or one of its checkpoints")
    parser.add_argument("--prompt", default="", help="the text to continue (default: a new text)")
    parser.add_argument("--max-tokens", type=int, default=128, help="stop after this many tokens (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling's mass (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default %(default)s)")
    args = parser.parse_args(argv)
    model = checkpoint.load_model(args.run)
    tokenizer = load_tokenizer(checkpoint.run_of(args.run))
    pieces = generate.continue_text(
        model, tokenizer, args.prompt, args.max_tokens, args.temperature, args.top_p, args.seed
    )
    for index, piece in enumerate(pieces):
        sys.stdout.write(args.prompt + piece if index == 0 else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    run_tool(main)
