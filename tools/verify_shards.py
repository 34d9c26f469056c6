"""python tools/verify_shards.py DIR [--deep] [--rebuild] [--tokenizer FILE]

Checks shards byte by byte: every hash and size, index against sidecars; with --deep also index against tars, and every
number in them. With --rebuild writes the index anew, also for tars that stock webdataset wrote.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from pretrain.cli import run_tool
from pretrain.shards import manifest as manifests
from pretrain.shards.manifest import INDEX_NAME
from pretrain.shards.rebuild import rebuild, tar_names
from pretrain.shards.verify import faults


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folders = data_sets(args.folder)
    if args.rebuild:
        for folder in folders:
            with bar(sum((folder / name).stat().st_size for name in tar_names(folder))) as progress:
                rebuilt = rebuild(folder, args.tokenizer, progress.update)
            written = ", ".join(rebuilt.changed[-1:] + rebuilt.changed[:-1][:3]) if rebuilt.changed else "nothing"
            more = f" and {len(rebuilt.changed) - 4} more" if len(rebuilt.changed) > 4 else ""
            print(f"{folder}: {counts(rebuilt.manifest)}; wrote {written}{more}")
            for note in rebuilt.notes:
                print(f"note: {note}")
    if args.deep or not args.rebuild:
        found = [verify(folder, args.deep) for folder in folders]
        if any(found):
            sys.exit(1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check a folder of shards. Lists every fault; exit status 1 when there is one, 2 when the command "
        "itself was wrong.",
        epilog="examples: python tools/verify_shards.py data/ --deep; to train on shards that stock webdataset wrote "
        "(KEY.tokens.npy, uint16 or uint32; optional KEY.docs.npy, int32 starts of documents): "
        "python tools/verify_shards.py theirs/ --rebuild --tokenizer tokenizer.model",
    )
    parser.add_argument("folder", metavar="DIR", help="a data set, or a folder with train/ and val/")
    parser.add_argument("--deep", action="store_true", help="also walk the tars and look at every number")
    rebuild_help = "write index.json and sidecars anew from the tars, trusting what they hold"
    parser.add_argument("--rebuild", action="store_true", help=rebuild_help)
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="for --rebuild: what wrote the tokens")
    args = parser.parse_args(argv)
    if args.tokenizer and not args.rebuild:
        parser.error("--tokenizer goes with --rebuild: a data set has its own tokenizer")
    return args


def data_sets(location: str) -> list[Path]:
    """The folder, or those of its splits."""
    if "://" in location and not location.startswith("file://"):
        raise ValueError(f"{location} is remote: run this where the shards lie (training checks what it reads)")
    folder = Path(location.removeprefix("file://"))
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder of the shards")
    for choice in ([folder], [folder / "train", folder / "val"]):
        if found := [path for path in choice if (path / INDEX_NAME).exists() or (path.is_dir() and tar_names(path))]:
            return found
    raise ValueError(f"{folder}, and train/ and val/ in it, hold no {INDEX_NAME} and no .tar: unpack compressed ones")


def verify(folder: Path, deep: bool) -> int:
    """Print every fault of a data set, and a last line; returns how many there are."""
    if not (folder / INDEX_NAME).exists():
        raise ValueError(f"{folder} has no {INDEX_NAME}: write one with --rebuild")
    count = 0
    try:
        manifest = manifests.read_index(folder)
    except ValueError as error:
        print(error)
        count, summary = 1, ""
    else:
        with bar(sum(shard.bytes for shard in manifest.shards)) as progress:
            for fault in faults(manifest, deep, progress.update):
                count += 1
                progress.write(str(fault), file=sys.stdout)
        summary = counts(manifest)
        unlisted = sorted(set(tar_names(folder)) - {shard.name for shard in manifest.shards})
        if unlisted:
            print(f"note: {INDEX_NAME} does not list {', '.join(unlisted[:5])}: --rebuild takes them in")
    if count:
        remedy = f"copy these files again; where only {INDEX_NAME} or a .idx.npy is damaged, --rebuild mends it"
        print(f"{folder}: {count:,} fault{'s' * (count > 1)}: {remedy}")
    else:
        print(f"{folder}: {summary}, all good")
    return count


def counts(manifest: manifests.Manifest) -> str:
    shards = len(manifest.shards)
    return f"{shards:,} shard{'s' * (shards > 1)}, {manifest.tokens:,} tokens"


def bar(size: int) -> tqdm:
    return tqdm(total=size, desc="reading", unit="B", unit_scale=True)


if __name__ == "__main__":
    run_tool(main)
