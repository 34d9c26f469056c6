"""The events of a run in words, for the console and the report: what each one says, its numbers rounded."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Event = dict[str, Any]
MARKS = {"resume": ("resume",), "phase": ("phase",), "fault": ("not_finite", "quarantined", "save_failed")}
LISTED = 8  # names and steps that a sentence lists


def told(event: Event) -> str:
    """What an event says besides its time and kind; of a kind that is not known here, its facts by their names."""
    try:
        return _SAYS[event.get("kind")](event)
    except (KeyError, TypeError, ValueError):  # of another version, or damaged
        facts = {name: value for name, value in event.items() if name not in ("time", "kind") and value is not None}
        return ", ".join(f"{name.replace('_', ' ')} {brief(value)}" for name, value in facts.items())


def folded(events: Iterable[Event]) -> Iterator[list[Event]]:
    """The events in their order, saves that follow each other together."""
    group: list[Event] = []
    for event in events:
        if group and not group[0].get("kind") == event.get("kind") == "saved":
            yield group
            group = []
        group.append(event)
    if group:
        yield group


def told_together(saves: list[Event]) -> str:
    """Several saves in a line: how many, of which steps, how large and how long; any event alone as `told`."""
    if len(saves) == 1:
        return told(saves[0])
    try:
        steps, megabytes, seconds = ([save[name] for save in saves] for name in ("step", "megabytes", "seconds"))
        return (f"{len(saves)} times until {clock(saves[-1])}, steps {steps[0]:,} to {steps[-1]:,}: "
                f"{_size(max(megabytes))} each, in {_range(seconds)} s")  # fmt: skip
    except (KeyError, TypeError, ValueError):  # damaged
        return f"{len(saves)} times"


def clock(event: Event) -> str:
    """When it was, to the second."""
    return str(event.get("time", ""))[:19].replace("T", " ")


def marks(events: Iterable[Event], last: float) -> dict[str, list[int]]:
    """The steps up to the `last` one at which a run was resumed, met a fault, or entered a phase as planned at last."""
    found: dict[str, set[int]] = {name: set() for name in MARKS}
    for event in events:
        if event.get("kind") in ("start", "resume"):
            found["phase"].clear()  # each start says all of them
        step = event.get("from_step", event.get("step"))
        for name, kinds in MARKS.items():
            if event.get("kind") in kinds and type(step) is int and 0 < step <= last:
                found[name].add(step)
    return {name: sorted(steps) for name, steps in found.items() if steps}


def listed(values: Iterable[Any]) -> str:
    """The first few values, and how many more there are."""
    values = [str(value) for value in values]
    more = len(values) - LISTED
    return ", ".join(values[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


def brief(value: Any) -> str:
    """A fact on one line: numbers to four digits."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return listed(map(brief, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _size(megabytes: float) -> str:
    return f"{megabytes / 1000:.3g} GB" if megabytes >= 1000 else f"{megabytes:.3g} MB"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def _rate(teraflops: float) -> str:
    return f"{teraflops / 1000:.3g} PFLOP/s" if teraflops >= 1000 else f"{teraflops:.2g} TFLOP/s"


def _started(event: Event) -> str:
    place = f"step {event['step']:,}" + (f", from {event['checkpoint']}" if event.get("checkpoint") else "")
    count = event.get("threads") if event["device"] == "cpu" else None
    threads = f" of {count} thread{'s' * (count > 1)}" if count else ""
    machine = f"{event['ranks']} x {event['device']}{threads}, {event['precision']}, ZeRO stage {event['zero_stage']}"
    return f"{place}; {machine}; peak {_rate(event['peak_tflops'])} ({event['peak_source']})"


def _saved(event: Event) -> str:
    return f"step {event['step']:,}: {_size(event['megabytes'])} in {event['seconds']:.2g} s"


def _source(event: Event) -> str:
    if "examples" in event:
        cut = f", {event['cut']:,} cut by {event['cut_tokens']:,} tokens in all" if event["cut"] else ""
        dropped = f", {event['dropped']:,} dropped" if event["dropped"] else ""
        return (f"{event['examples']:,} examples of {event['tokens']:,} tokens, {event['epochs']:.3g} epochs; the "
                f"longest has {event['longest']:,} tokens{cut}{dropped}")  # fmt: skip
    unused = f", {event['unused_tokens']:,} tokens in none" if event["unused_tokens"] else ""
    fill = f" {event['fill_rate']:.1%} full" if event["fill_rate"] < 1 else ""
    return (f"{event['source']}: {event['share']:.1%} of the tokens, {event['epochs']:.3g} epochs of "
            f"{event['rows']:,} rows{fill}{unused}")  # fmt: skip


def _phase(event: Event) -> str:
    batch = f"from step {event['from_step']:,} on {event['global_batch_size']:,} samples of {event['seq_len']:,} tokens"
    each, total = zip(event["sources"], event["samples"], event["epochs"], strict=True), max(sum(event["samples"]), 1)
    reads = "; ".join(f"{read / total:.1%} {source}, {epochs:.3g} epochs" for source, read, epochs in each)
    left = [f"{rows:,} rows of {source}" for source, rows in zip(event["sources"], event["left"], strict=False) if rows]
    behind = f"; left behind unread: {listed(left)} ({event['reason']})" if left else ""
    return f"{batch}: {reads}{behind}"


def _initialised(event: Event) -> str:
    anew = "; ".join(event.get("reasons") or [listed(event["anew"])])
    return f"from {event['init']}" + (f"; begins anew: {anew}" if anew else "")


def _journal(event: Event) -> str:
    did = {"rows_cut": "after it cut off", "rows_damaged": "damaged and dropped", "rows_missing": "before it missing"}
    rows = ", ".join(f"{event[name]:,} {words}" for name, words in did.items() if event.get(name))
    return f"rows of step {event['step']:,}: {rows}"


_SAYS: dict[Any, Callable[[Event], str]] = {
    "start": _started,
    "resume": _started,
    "compiled": lambda event: f"the blocks of the model, in {event['seconds']:.2g} s",
    "not_compiled": lambda event: f"the blocks of the model: {event['problem']}",
    "saved": _saved,
    "save_failed": lambda event: f"step {event['step']:,}, after {event['seconds']:.2g} s: {event['error']}",
    "source": _source,
    "phase": _phase,
    "initialised": _initialised,
    "journal": _journal,
    "checkpoint_rejected": lambda event: f"{event['checkpoint']} is now {event['renamed_to']}: {event['reason']}",
    "wandb": lambda event: f"{brief(event['problem'])}; instead: {event['instead']}",
    "stopped": lambda event: f"step {event['step']:,}: {event['reason']}",
    "not_written": lambda event: f"{event['what']}: {event['error']}",
    "quarantined": lambda event: f"step {event['step']:,}: {event['source']}, {event['shard']}, chunk {event['chunk']}",
    "end": lambda event: f"step {event['step']:,} of {event['of']:,}",
}
