"""python tools/bench_train_table.py FILE

The tables of tools/bench_train.py, out of what its --json wrote.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any


def in_words(facts: dict[str, Any]) -> str:
    machine, model, train = facts["environment"], facts["model"], facts["train"]
    tokens = train["global_batch_size"] * train["seq_len"]
    lines = [
        f"{machine['cpu']}, {counted(machine['cores'], 'core')}, {machine['memory_gib']} GiB, torch "
        f"{machine['torch']}, DeepSpeed {machine['deepspeed']}, commit {str(machine['git_commit'])[:10]}",
        f"{facts['parameters']:,} parameters, {model['layers']} layers of {model['width']}, vocabulary "
        f"{model['vocab_size']:,}; {train['global_batch_size']} x {train['seq_len']} = {tokens:,} tokens a step, "
        f"{train['micro_batch_size']} rows at a time, {facts['precision']}, ZeRO {facts['zero_stage']}, "
        f"{facts['data']}",
        f"{counted(facts['rounds'], 'round')} of {counted(facts['steps'], 'step')}, in turn", "",
        f"{'tokens/s':34}{'median':>10}{'lowest':>10}{'highest':>10}{'CPU s/step':>12}{'GB a rank':>11}",
    ]  # fmt: skip
    for row in facts["contestants"]:
        speeds, cpu = row["tokens_per_second"], statistics.median(row["cpu_seconds_per_step"])
        lines.append(f"{row['name']:34}{statistics.median(speeds):>10,.0f}{min(speeds):>10,.0f}{max(speeds):>10,.0f}"
                     f"{cpu:>12.3f}{row['peak_bytes'] / 1e9:>11.2f}")  # fmt: skip
    lines += [f"{name:34}{reason}" for name, reason in facts["absent"].items()]
    lines += [f"{name:34}FAILED; the end of what it said:\n{log}" for name, log in facts["failed"].items()]
    lines += ["", f"{'ratio of':34}{'to':28}{'median':>10}{'minimum':>10}"]
    lines += [f"{each['of']:34}{each['to']:28}{each['median']:>10.3f}{each['minimum']:>10.3f}"
              for each in facts["ratios"]]  # fmt: skip
    lines += [f"losses of {each['name']} and of the bare loop differ by {each['largest']:.2g} at most in "
              f"{counted(each['steps'], 'step')}" for each in facts["losses"]]  # fmt: skip
    return "\n".join([*lines, *itertools.chain.from_iterable(map(profile_in_words, facts["profiles"]))])


def profile_in_words(profile: dict[str, Any]) -> list[str]:
    lines = ["", f"{'a step of ' + profile['name']:44}{'ms':>9}{'%':>8}{'CPU ms':>9}"]
    by_cost = sorted(profile["sections"].items(), key=lambda item: -item[1]["seconds"])
    for name, found in by_cost:
        lines.append(f"{name:44}{1e3 * found['seconds']:>9.1f}{100 * found['share']:>8.2f}"
                     f"{1e3 * found['cpu_seconds']:>9.1f}")  # fmt: skip
    total = [sum(found[key] for _, found in by_cost) for key in ("seconds", "share", "cpu_seconds")]
    lines.append(f"{'together':44}{1e3 * total[0]:>9.1f}{100 * total[1]:>8.2f}{1e3 * total[2]:>9.1f}")
    threads = sorted(profile["threads"].items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in threads if seconds > 1e-4)
    lines += [f"CPU ms by thread: {told}", f"{'torch operators, by themselves, traced':54}{'calls':>9}{'ms':>9}"]
    lines += [f"{each['name'].removeprefix('aten::'):54}{each['calls']:>9.0f}{1e3 * each['seconds']:>9.1f}"
              for each in profile["operators"][:15]]  # fmt: skip
    return lines


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", type=Path)
    print(in_words(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))
