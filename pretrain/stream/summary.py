"""What a run reads: of each phase and of each source the share, the epochs, and what is left behind unread."""

from collections.abc import Sequence

from pretrain.stream.mixture import Phase, consumed
from pretrain.stream.source import Source


def of_phases(phases: Sequence[Phase], sources: Sequence[Source], packing: str, seed: int, steps: int) -> list[dict]:
    """Of each phase that a run of `steps` steps comes to: its settings, and of each source the `samples` and `epochs`
    that are read of it, and the rows that are `left` behind when the phase begins, with the `reason`.
    """
    found, phases = [], [phase for phase in phases if phase.from_step < max(steps, 1)]
    for number, (phase, end) in enumerate(zip(phases, [*(p.from_step for p in phases[1:]), steps], strict=True)):
        ends = consumed(phase, max(end - phase.from_step, 0) * phase.global_batch_size, seed)
        samples = [end - start for end, start in zip(ends, phase.starts, strict=True)]
        sizes = [source.epoch_samples(phase.cut) for source in sources]
        found.append({
            "from_step": phase.from_step, "seq_len": phase.seq_len, "global_batch_size": phase.global_batch_size,
            "sources": [source.manifest.location for source in sources], "samples": samples,
            "epochs": [read / max(size, 1) for read, size in zip(samples, sizes, strict=True)],
            "left": list(phase.left),
            "reason": _why_left(phases[number - 1], phase, packing) if phase.left else None,
        })  # fmt: skip
    return found


def of_sources(phases: Sequence[Phase], sources: Sequence[Source], packing: str, seed: int, steps: int) -> list[dict]:
    """Of each source in a run of `steps` steps: its share of the tokens that are read and the epochs that are read of
    it, over all phases; in the last one its rows, how full they are, and the tokens that no row holds.
    """
    each = of_phases(phases, sources, packing, seed, steps)
    tokens = [[read * phase["seq_len"] for read in phase["samples"]] for phase in each]
    last, total = phases[len(each) - 1].cut, max(sum(map(sum, tokens)), 1)
    return [
        {
            "source": source.manifest.location, "share": sum(read[number] for read in tokens) / total,
            "rows": source.epoch_samples(last), "epochs": sum(phase["epochs"][number] for phase in each),
            "fill_rate": source.layout(last).fill_rate, "unused_tokens": source.layout(last).unused_tokens,
        }
        for number, source in enumerate(sources)
    ]  # fmt: skip


def _why_left(before: Phase, phase: Phase, packing: str) -> str:
    """Why a phase does not go on where the one before it was."""
    short, long = sorted((before.seq_len, phase.seq_len))
    if packing != "window":
        return f"{packing} packs the documents anew for each length"
    if before.cut.whole_len == phase.cut.whole_len:
        return f"the rows of {before.seq_len} tokens were planned to end at another step"
    if long % short:
        return f"rows of {long} tokens are not made of rows of {short}"
    return (f"rows of {phase.seq_len} tokens were not planned when those of {before.seq_len} began, or a source has no "
            "text that long in a piece")  # fmt: skip
