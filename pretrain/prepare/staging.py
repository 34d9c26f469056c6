"""The staging folder of a preparation (see plan.py): locked, continued after any interruption, turned into the output.

The output is assembled in final/: shards are moved there under their final names, after the list of moves was written,
so the next run can move them back and go on from finished parts, whatever was under way and whatever it wants.
The output appears with one rename.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from pretrain.files import check_new_folder, lock, sync_folder, write_atomically, write_synced
from pretrain.prepare import duplicates
from pretrain.prepare.documents import Counts
from pretrain.prepare.filters import Report
from pretrain.prepare.finding import Found
from pretrain.prepare.plan import PARTS, RUN_NAME, SIGNED, Plan
from pretrain.shards.manifest import INDEX_NAME, Manifest, Shard, save
from pretrain.shards.remote import Store
from pretrain.shards.sidecar import sidecar_name
from pretrain.shards.writer import token_dtype
from pretrain.tokenizer.tokenizer import Tokenizer

FINAL, MOVES_NAME = "final", "moves.json"
INPUTS_NAME, REPORT_NAME = "inputs.json", "report.json"
INPUTS_FORMAT = 1


@contextlib.contextmanager
def staging_folder(output: Path, run: str) -> Iterator[Path]:
    """The folder beside `output`, locked, with what earlier runs finished in it. An error leaves it if there is any."""
    folder = output.with_name(f".{output.name}.write_shards-partial")
    if any((output / part / INDEX_NAME).exists() for part in (".", "train", "val")):
        _remove_leftovers(folder, output)
        raise ValueError(f"{output} holds a finished data set: delete it, or choose another --output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: choose another --output")
    check_new_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, output)
        write_atomically(folder / RUN_NAME, run.encode())
        _undo_moves(folder)
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):
                (folder / RUN_NAME).unlink()  # workers that still run stop
                if not finished(folder):
                    shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path, output: Path) -> None:
    """Finish what a run did that ended after its output had got its name."""
    if folder.is_dir():
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(ValueError):
            _lock(handle, output)
            shutil.rmtree(folder)
        os.close(handle)


def _lock(handle: int, output: Path) -> None:
    """Refuse to write beside another process that writes the same output."""
    lock(handle, f"another write_shards.py is writing {output} now: wait for it, or stop it")


def finished(folder: Path) -> int:
    """How many parts are finished, whatever for."""
    stages = [folder / stage for stage in (SIGNED, PARTS) if (folder / stage).is_dir()]
    return sum(name.isdigit() for stage in stages for name in os.listdir(stage))


def parts_to_do(plan: Plan, stage: str) -> tuple[list[int], int]:
    """The parts that are not finished, and how many were finished for other input or settings; these are deleted, and
    what was under way."""
    folder = plan.staging / stage
    folder.mkdir(exist_ok=True)
    wanted = {plan.folder(stage, number).name: number for number in range(len(plan.parts))}
    done, others = set(), 0
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        number = wanted.get(path.name)
        if number is not None and plan.done(stage, number):
            done.add(number)
        else:
            others += path.name.isdigit()
            shutil.rmtree(path)
    return [number for number in range(len(plan.parts)) if number not in done], others


def add_tokenizer(staging: Path, tokenizer: Tokenizer) -> None:
    """A copy of the tokenizer, for the workers."""
    write_atomically(staging / tokenizer.file_name, tokenizer.file_bytes)


def assemble(plan: Plan, tokenizer: Tokenizer, output: Path, found: Found) -> tuple[list[Manifest], Counts, Report]:
    """Turn the finished parts into the output: a manifest of each split, what was read, and what was left out."""
    # of the pieces of the input there may be millions: they are read again, a part at a time, when they are written
    done = [_without_pieces(plan.done(PARTS, number)) for number in range(len(plan.parts))]
    counts, report = Counts(), Report()
    for entry in done:
        counts.merge(Counts(**entry["counts"]))
        report.merge(Report.from_json(entry["report"]))
    if plan.settings.dedup != "none":
        duplicates.name_places(plan, report)
    moves, manifests = [], []
    for split in plan.settings.splits:
        shards = _final_shards(plan, split, done, moves)
        manifests.append(_manifest(output / split, shards, plan, tokenizer))
    _check(manifests, counts, report, plan)
    _move(plan.staging, moves)
    final = plan.staging / FINAL
    for split, manifest in zip(plan.settings.splits, manifests, strict=True):
        write_atomically(final / split / tokenizer.file_name, tokenizer.file_bytes)
        save(manifest, final / split)
    _write_inputs(final / INPUTS_NAME, plan, tokenizer, manifests, counts, report, found)
    if report.summary():
        write_synced(final / REPORT_NAME, (json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
    sync_folder(final)
    os.rename(final, output)
    sync_folder(output.parent)
    return manifests, counts, report


def _without_pieces(done: dict) -> dict:
    return {name: value for name, value in done.items() if name != "pieces"}


def _final_shards(plan: Plan, split: str, done: list[dict], moves: list[tuple[str, str]]) -> list[Shard]:
    """The shards of a split in the order of the parts, with their final names; the moves are added to `moves`."""
    shards: list[Shard] = []
    for number, entry in enumerate(done):
        folder = (plan.folder(PARTS, number) / split).relative_to(plan.staging)
        for facts in entry["shards"][split]:
            old, shard = facts["name"], replace(Shard(**facts), name=f"{len(shards):08d}.tar")
            for before, after in ((old, shard.name), (sidecar_name(old), sidecar_name(shard.name))):
                moves.append((str(folder / before), str(Path(FINAL) / split / after)))
            shards.append(shard)
    return shards


def _manifest(folder: Path, shards: list[Shard], plan: Plan, tokenizer: Tokenizer) -> Manifest:
    return Manifest(
        store=Store(str(folder)),
        dtype=token_dtype(tokenizer.vocab_size),
        chunk_tokens=plan.settings.chunk_tokens,
        full_chunks=True,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        shards=tuple(shards),
    )


def _check(manifests: list[Manifest], counts: Counts, report: Report, plan: Plan) -> None:
    """`ValueError` when there is nothing to learn from, or nothing held out; then no part is of use."""
    documents = sum(manifest.docs for manifest in manifests)
    if all(manifest.docs for manifest in manifests):
        return
    shutil.rmtree(plan.staging / PARTS)
    shutil.rmtree(plan.staging / SIGNED, ignore_errors=True)
    if counts.documents == 0:
        bad = f", {counts.bad} bad rows, the first: {counts.bad_rows[0]}" if counts.bad else ""
        raise ValueError(f"the input holds no text ({counts.empty} empty documents{bad}): check --input")
    if documents == 0:
        raise ValueError(f"nothing is left of {counts.documents} documents: {'; '.join(report.summary())}")
    train, val = (manifest.docs for manifest in manifests)
    raise ValueError(
        f"--val-fraction {plan.settings.val_fraction} of {documents} documents leaves {train} to train on and {val} "
        "held out: choose another fraction, or give more documents (a text file is one document)"
    )


def _move(staging: Path, moves: list[tuple[str, str]]) -> None:
    for folder in {(staging / after).parent for _, after in moves}:
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(staging / MOVES_NAME, json.dumps(moves).encode())
    for before, after in moves:
        os.rename(staging / before, staging / after)


def _undo_moves(staging: Path) -> None:
    """Take back what an interrupted `assemble` did."""
    if (staging / MOVES_NAME).exists():
        for before, after in json.loads((staging / MOVES_NAME).read_bytes()):
            if (staging / after).exists():
                os.rename(staging / after, staging / before)
        (staging / MOVES_NAME).unlink()
    if (staging / FINAL).exists():
        shutil.rmtree(staging / FINAL)


def _write_inputs(
    path: Path, plan: Plan, tokenizer: Tokenizer, manifests: list[Manifest], counts: Counts, report: Report,
    found: Found,
) -> None:  # fmt: skip
    """inputs.json, the manifest of what went in: the options, and each piece of the input with what became of it."""
    dropped = {reason: tally.documents for reason, tally in report.dropped.items() if tally.documents}
    facts = {
        "format": INPUTS_FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "options": asdict(plan.settings),
        "read": {"documents": counts.documents, "empty": counts.empty, "invalid": counts.invalid},
        "dropped": dropped,
        "written": {
            split: {"documents": manifest.docs, "bytes": manifest.text_bytes, "tokens": manifest.tokens}
            for split, manifest in zip(plan.settings.splits, manifests, strict=True)
        },
    }
    if counts.bad:
        facts["bad"] = {"count": counts.bad, "first": counts.bad_rows}
    facts |= found.facts()
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(facts, indent=1, ensure_ascii=False).removesuffix("\n}") + ',\n "inputs": [\n')
        for number in range(len(plan.parts)):
            pieces = plan.done(PARTS, number)["pieces"]
            file.write(",\n" * (number > 0) + ",\n".join(json.dumps(piece, ensure_ascii=False) for piece in pieces))
        file.write("\n ]\n}\n")
        file.flush()
        os.fsync(file.fileno())


def no_room(plan: Plan, error: OSError, output: Path) -> ValueError:
    """A full disk, with how much more it needs: by what the parts so far took, else by a guess."""
    done = {number: entry for number in range(len(plan.parts)) if (entry := plan.done(PARTS, number))}
    written = sum(shard["bytes"] for entry in done.values() for shards in entry["shards"].values() for shard in shards)
    read = sum(plan.parts[number].bytes for number in done)
    left = sum(part.bytes for part in plan.parts) - read
    needed = left * (written / read if read else 0.5)
    free = shutil.disk_usage(plan.staging).free
    more = max(needed - free, 0) if error.errno == errno.ENOSPC else needed
    kept = f"{len(done)} of {len(plan.parts)} parts are finished and stay" if done else "nothing is kept"
    return ValueError(
        f"no room for {output} ({error.strerror}): about {max(1, round(more / 1e6)):,} MB more are needed; {kept}: "
        "free some space and run the same command again, or choose another --output"
    )
