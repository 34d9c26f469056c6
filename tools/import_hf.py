"""python tools/import_hf.py DIR --output runs/NAME

Imports a model from a Hugging Face folder (config.json, safetensors, a fast tokenizer): GPT-2, LLaMA, Mistral, Qwen3,
BERT, RoBERTa, ModernBERT; a language model, a classifier of texts or of tokens, one that finds answers, an embedding
model of sentence-transformers. runs/NAME then holds a checkpoint of its weights, its tokenizer, and its labels in
task.json: generate from it, predict with it, or start a run from it with init=runs/NAME. Where transformers is
installed, what it computes is compared, and runs/NAME does not appear when they differ.
"""

import argparse
from pathlib import Path

from pretrain.cli import run_tool, stops_as_ctrl_c
from pretrain.hub import convert


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Import a model from a Hugging Face folder, proven equal.",
        epilog="example: hf download HuggingFaceTB/SmolLM2-135M --local-dir smollm2; "
        "python tools/import_hf.py smollm2 --output runs/smollm2",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="config.json, model.safetensors, tokenizer.json, ...")
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="the folder to make; must not exist")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="KEY", help="keys of config.json to leave out")
    parser.add_argument("--no-check", action="store_true", help="do not compare with transformers")
    args = parser.parse_args(argv)
    with stops_as_ctrl_c():
        facts = convert.import_hf(args.folder, args.output, args.ignore, not args.no_check)
    for left_out in facts["left_out"]:
        print(f"left out: {left_out['name']} ({left_out['reason']})")
    print(f"wrote {args.output}: {facts['architecture']}, {facts['parameters']:,} parameters")
    if facts["proof"]:
        print(convert.said(facts["proof"]))
    else:
        how = "leave out --no-check" if args.no_check else convert.INSTALL
        print(f"NOT compared with transformers: to do so, {how}, delete {args.output} and import again")


if __name__ == "__main__":
    run_tool(main, tells=True)
