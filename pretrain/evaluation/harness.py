"""The LM Evaluation Harness (Gao et al.) on a Hugging Face folder, in a process of its own that knows none of our code.

    python -m pretrain.evaluation.harness REQUEST.json

The request (a JSON object) names the `folder`, its `dtype`, the `tasks`, a folder of further ones (`include_path`) or
null, the `limit` of examples of each or null, and the file `output`, into which goes {task: {metric: value}}, or
{"error": what a user can do about it}.
"""

import difflib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pretrain.cli import child, how_to_install
from pretrain.files import read_object

INSTALL = how_to_install("eval")
UNREACHABLE = ("ConnectError", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError")
BOOTSTRAP = 1000  # resamplings for the standard error of metrics that are no means
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of the classes that the harness can use
BATCH_SIZE = 16
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # with these it would wait for others


def check() -> None:
    """`ValueError` when the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"--tasks needs the LM Evaluation Harness: {INSTALL}")


def evaluate(
    folder: Path, dtype: str, tasks: list[str], include_path: Path | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """{task: {metric: value}} of a Hugging Face folder. What the harness says meanwhile goes to stderr.

    `ValueError` for a model that writes no text: the harness would give it an output of random weights.
    """
    classes = read_object(Path(folder) / "config.json").get("architectures") or WRITERS
    if not any(name.endswith(WRITERS) for name in classes):
        raise ValueError(f"--tasks are for models that write text, and this is {', '.join(classes)}: tools/predict.py "
                         "--score judges what a fine-tuned model says")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        request, output = Path(scratch) / "request.json", Path(scratch) / "output.json"
        request.write_text(json.dumps({
            "folder": str(Path(folder).resolve()), "dtype": dtype, "tasks": tasks, "limit": limit,
            "include_path": str(include_path.resolve()) if include_path else None, "output": str(output),
        }), encoding="utf-8")  # fmt: skip
        package = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        environment = {**inherited, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "pretrain.evaluation.harness", str(request)]
        with child(command, env=environment, stdin=subprocess.DEVNULL, stdout=2) as process:
            process.wait()
        if process.returncode or not output.is_file():
            raise ValueError(f"the LM Evaluation Harness failed with exit code {process.returncode}: see above")
        found = json.loads(output.read_text(encoding="utf-8"))
    if "error" in found:
        raise ValueError(found["error"])
    return found


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        found = run(request)
    except Exception as error:
        if not (reason := explained(error, request)):
            raise
        found = {"error": reason}
    Path(request["output"]).write_text(json.dumps(found), encoding="utf-8")


def run(request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=request["include_path"], include_defaults=False)
    # to list the harness's own tasks takes seconds
    manager = own if set(request["tasks"]) <= set(own.all_tasks) else TaskManager(include_path=request["include_path"])
    if unknown := [name for name in request["tasks"] if name not in manager.all_tasks]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks)
        hint = f": did you mean {', '.join(near)}?" if near else "; name a folder of YAML tasks with --include-path"
        raise ValueError(f"--tasks: the LM Evaluation Harness has no task {unknown[0]!r}{hint}")
    results = simple_evaluate(
        model="hf", model_args={"pretrained": request["folder"], "dtype": request["dtype"]}, tasks=request["tasks"],
        limit=request["limit"], batch_size=BATCH_SIZE, task_manager=manager, bootstrap_iters=BOOTSTRAP,
        log_samples=False, device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    return {task: figures(found) for task, found in results["results"].items()}


def figures(found: dict[str, Any]) -> dict[str, float]:
    """{metric: value} without the harness's suffixes: `acc,none` is acc; a filter with a name keeps it."""
    named = {key.removesuffix(",none").replace(",", " "): value for key, value in found.items()}
    named["items"] = named.pop("sample_len", None)
    return {key: value for key, value in named.items() if isinstance(value, int | float)}


def explained(error: BaseException, request: dict[str, Any]) -> str | None:
    """What a user can do about an error that is no fault of the harness's; None for any other."""
    chain = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    if any(type(one).__name__ in UNREACHABLE for one in chain):
        return (f"--tasks {','.join(request['tasks'])}: their data could not be fetched ({error}). Give this machine a "
                "network or a filled cache (HF_HOME), or local tasks with --include-path")  # fmt: skip
    return str(error) if isinstance(error, ValueError) else None


if __name__ == "__main__":
    main()
