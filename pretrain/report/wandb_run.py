"""One Weights & Biases run for the life of a run's folder, brought up to the journal at each start.

The only module that imports wandb. Trouble with W&B becomes an event and never reaches training.
"""

import contextlib
import json
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pretrain.config.schema import LogConfig

INIT_TIMEOUT_SECONDS = 20  # wandb's own defaults are 90 s to start, and no limit at all to finish
FINISH_TIMEOUT_SECONDS = 60
_BLOCK, _HEADER = 32768, struct.Struct("<IHB")  # of a .wandb file: LevelDB's log format; checksum, length, kind
_COMPLETE = (1, 4)  # kinds of a piece that ends a record


class WandbRun:
    """The W&B run. `wandb/state.json` holds its id, because `resume=` does nothing offline, and the last step that was
    handed over. Where a start was killed before it could close, W&B may have less: its own files and server say.
    """

    def __init__(
        self, config: LogConfig, run_dir: Path, resolved_config: dict[str, Any], report: Callable[..., None]
    ) -> None:
        self._report = report
        self._run = None
        self._state = run_dir / "wandb" / "state.json"
        self._state.parent.mkdir(exist_ok=True)
        self.id, self._sent_step, was_closed = self._load_state()
        self._mark = open(self._state, "r+b", buffering=0)
        # wandb announces credentials before it has read our settings, and reports errors over the network.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        for mode in ("online", "offline") if config.wandb == "online" else ("offline",):
            try:
                self._run = _start_wandb(mode, self.id, config.project, run_dir, resolved_config)
                if not was_closed:
                    self._sent_step = min(self._sent_step, self._known_step(run_dir, mode))
                return
            except Exception as error:  # whatever W&B does, training goes on
                instead = "offline" if mode == "online" else "no W&B"
                self._report("wandb", problem=f"{mode} failed: {error}", instead=instead)

    def _load_state(self) -> tuple[str, int, bool]:
        fresh = {"id": uuid.uuid4().hex[:12], "sent_step": 0}
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            return str(state["id"]), int(state["sent_step"]), state.get("closed") is True
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            self._report("wandb", problem=f"{self._state} is damaged: {error}", instead=f"new W&B run {fresh['id']}")
        tmp = self._state.with_suffix(".tmp")
        tmp.write_bytes(_state_bytes(**fresh))
        os.replace(tmp, self._state)
        return fresh["id"], 0, True

    def _known_step(self, run_dir: Path, mode: str) -> int:
        """The last step that the server has, or files that `wandb sync` brings there. Those of an online start may hold
        rows that were still on their way.
        """
        kind = "offline-run" if mode == "online" else "*run"
        files = sorted(run_dir.glob(f"wandb/{kind}-*-{self.id}/*.wandb"), key=os.path.getmtime, reverse=True)
        newest = next(filter(None, (max(_steps_in(file), default=0) for file in files)), 0)
        return max(newest, self._run.starting_step - 1)

    def catch_up(self, journal: Path, start_step: int) -> None:
        """Send the journal's rows that W&B has not seen: of a time when it was disabled, or of a start that was killed
        before they were on the disk.
        """
        if self._run is not None and self._sent_step < start_step:
            with open(journal, "rb") as lines:
                for line in lines:
                    self.send(json.loads(line))

    def send(self, row: dict[str, Any]) -> None:
        """Hand over the numbers of a row, once."""
        if self._run is None or row["step"] <= self._sent_step:
            return
        try:
            self._sent_step = row["step"]
            os.pwrite(self._mark.fileno(), _state_bytes(self.id, self._sent_step), 0)
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            # With step= wandb waits for the next step to commit this one, unless told.
            self._run.log(numbers, step=row["step"], commit=True)
        except Exception as error:
            self._run = None
            self._report("wandb", problem=f"log failed: {error}", instead="no W&B from here on")

    def finish(self, summary: dict[str, Any]) -> None:
        try:
            if self._run is not None:
                self._run.summary.update(summary)
                self._run.finish()
                os.pwrite(self._mark.fileno(), _state_bytes(self.id, self._sent_step, closed=True), 0)
        except Exception as error:
            self._report("wandb", problem=f"finish failed: {error}", instead="`wandb sync` sends what is left")
        self._mark.close()


def _start_wandb(mode: str, run_id: str, project: str, run_dir: Path, resolved_config: dict[str, Any]) -> Any:
    """Start W&B with nothing captured but what we send: no console, code, git, requirements, machine facts."""
    import wandb  # half a second that ranks without W&B need not wait

    wandb.teardown()  # a start that failed leaves its run id "in use"
    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_meta=True,
        x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
        init_timeout=INIT_TIMEOUT_SECONDS, finish_timeout=FINISH_TIMEOUT_SECONDS,
        finish_timeout_raises=True,
    )  # fmt: skip
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError("no API key: set WANDB_API_KEY or run `wandb login`")  # it would ask for one and wait
    resume = {"resume": "allow"} if mode == "online" else {}
    run = wandb.init(
        project=project, dir=str(run_dir), mode=mode, id=run_id, name=run_dir.name, config=resolved_config,
        settings=settings, **resume,
    )  # fmt: skip
    run.define_metric("step")
    run.define_metric("tokens")
    run.define_metric("*", step_metric="step")
    return run


def _state_bytes(id: str, sent_step: int, closed: bool = False) -> bytes:
    """Padded to one length, so that writing it in place leaves nothing of an older one."""
    return json.dumps({"id": id, "sent_step": sent_step, "closed": closed}).ljust(127).encode() + b"\n"


def _steps_in(file: Path) -> Iterator[int]:
    """The steps of the rows in a .wandb file, as far as it is whole."""
    from wandb.proto.wandb_internal_pb2 import Record

    with contextlib.suppress(OSError, struct.error, ValueError):
        for data in _records(file.read_bytes()):
            record = Record()
            with contextlib.suppress(Exception):  # protobuf's own kinds of it
                record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                yield record.history.step.num


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, after W&B's 7 bytes; `struct.error` where the file ends early."""
    at, parts = 7, []
    while at < len(content):
        if _BLOCK - at % _BLOCK < _HEADER.size:  # what is left of a block is filled up
            at += _BLOCK - at % _BLOCK
        _, length, kind = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        if len(content) < at + length or not kind:
            return
        parts.append(content[at : at + length])
        at += length
        if kind in _COMPLETE:
            yield b"".join(parts)
            parts = []
