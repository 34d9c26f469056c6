"""The design holds: who imports whom, how long functions and files are, and what no file may contain."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "pretrain").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))

# Who may import whom: a module only from floors below its own.
FLOORS = (
    {"console"},
    {"cli", "network"},
    {"dist", "files", "hardware"},
    {"config", "threads", "tokenizer"},
    {"guard", "model", "optim", "report", "shards", "tuning"},
    {"stream"},
    {"engine", "examples", "inference"},
    {"checkpoint", "evaluation", "prepare"},
    {"hub", "loop", "plan", "run_folder", "tasks"},
    {"entry", "predict"},
    {"finetune", "train"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Within a folder: what each module may import of its own folder.
INSIDE = {
    "tokenizer": {
        "texts": set(), "huggingface_spec": {"texts"}, "sentencepiece": {"texts"},
        "huggingface": {"huggingface_spec", "texts"}, "tokenizer": {"huggingface", "sentencepiece", "texts"},
        "chat": {"texts", "tokenizer"},
    },
    "config": {
        "schema": set(), "held_out": set(), "steps": {"schema"}, "checks": {"schema", "steps"},
        "overrides": {"schema"}, "help": set(),
        "compose": {"checks", "held_out", "help", "overrides", "schema"},
    },
    "shards": {
        "cache": set(), "fetch": set(), "npy": set(), "sidecar": set(), "tar": set(), "remote": {"cache", "fetch"},
        "samples": {"npy", "sidecar", "tar"}, "manifest": {"remote", "sidecar"}, "reader": {"manifest", "sidecar"},
        "verify": {"manifest", "samples", "sidecar"}, "writer": {"manifest", "remote", "sidecar", "tar"},
        "documents": {"manifest", "reader"}, "rebuild": {"manifest", "remote", "samples", "sidecar", "verify"},
    },
    "model": {
        "attention": set(), "initial": set(), "lora": set(), "losses": set(), "positions": set(),
        "output": {"losses"}, "transformer": {"attention", "lora", "positions"},
        "heads": {"lora", "output", "transformer"},
    },
    "report": {
        "curves": set(), "events": set(), "wandb_run": set(), "theme": {"events"}, "log": {"events", "wandb_run"},
        "sets": {"theme"}, "page": {"curves", "events", "sets", "theme"},
    },
    "stream": {
        "order": set(), "pieces": {"order"}, "mixture": {"order", "pieces"}, "objectives": {"order"},
        "packing": {"order"}, "source": {"mixture", "order", "packing"}, "summary": {"mixture", "source"},
        "stream": {"mixture", "source", "summary"},
        "opening": {"mixture", "source", "stream"},
    },
    "examples": {
        "decompress": set(), "parquet": set(), "stream": set(), "formats": {"decompress", "parquet"},
        "tables": {"decompress", "formats"},
    },
    "inference": {
        "generate": set(), "vectors": set(),
    },
    "optim": {
        "matrices": set(), "schedule": set(), "muon": {"matrices"}, "optimizers": {"muon"},
    },
    "engine": {
        "fragments": set(), "settings": set(), "memory": {"settings"}, "sums": set(),
        "engine": {"fragments", "sums"},
        "compiling": {"engine"},
    },
    "checkpoint": {
        "sections": set(), "tensors": {"sections"}, "placement": {"tensors"}, "staging": {"placement", "tensors"},
        "manifest": {"placement", "sections", "tensors"}, "load": {"manifest"},
        "save": {"manifest", "placement", "sections", "staging", "tensors"},
    },
    "evaluation": {
        "harness": set(), "memorization": set(), "metrics": set(), "validation": set(), "suite": {"metrics"},
    },
    "prepare": {
        "dedup": set(), "encode": set(), "finding": set(), "pii": set(), "readers": set(), "workers": set(),
        "documents": {"finding", "readers"}, "filters": {"documents", "finding", "pii"},
        "plan": {"documents", "filters", "finding"}, "duplicates": {"dedup", "documents", "filters", "plan"},
        "staging": {"documents", "duplicates", "filters", "finding", "plan"},
        "parts": {"dedup", "documents", "duplicates", "encode", "filters", "plan"},
    },
    "hub": {
        "card": set(), "parts": set(), "reference": set(), "sentences": set(), "decoders": {"parts"},
        "encoders": {"parts"}, "families": {"decoders", "encoders", "parts"},
        "folder": {"families", "parts", "sentences"}, "parity": {"families"},
        "convert": {"card", "families", "folder", "parity", "parts", "sentences"},
    },
    "tasks": {
        "contrast": set(), "task": set(), "classification": {"task"}, "embedding": {"contrast", "task"},
        "extractive_qa": {"task"}, "language_model": {"task"}, "text_vectors": {"task"},
        "token_classification": {"task"}, "validation": {"task"}, "instruct": {"language_model", "task"},
    },
}  # fmt: skip
SOLE_USERS = {
    "deepspeed": {"engine.engine", "engine.fragments", "engine.sums"}, "wandb": {"report.wandb_run"},
    "omegaconf": {"config.compose"}, "hydra": {"config.compose"}, "tarfile": {"shards.tar"},
    "sentencepiece": {"tokenizer.sentencepiece"}, "tokenizers": {"tokenizer.huggingface"},
    "matplotlib": {"report.curves"}, "safetensors": {"checkpoint.tensors"}, "transformers": {"hub.reference"},
    "fsspec": {"shards.fetch"}, "submitit": {"prepare.workers"}, "zstandard": {"examples.decompress"},
    "pyarrow": {"examples.parquet"}, "phonenumbers": {"prepare.pii"}, "datasketch": {"prepare.dedup"},
    "sacrebleu": {"evaluation.metrics"}, "rouge_score": {"evaluation.metrics"}, "lm_eval": {"evaluation.harness"},
    "faiss": {"inference.vectors"}, "jinja2": {"tokenizer.chat"},
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "pretrain").with_suffix("").parts)


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in the file; `from pretrain import x` counts as pretrain.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, as config, stream.stream, ..."""
    known = {module_name(file) for file in PACKAGE}
    return {name.removeprefix("pretrain.") for name in imports(path)} & known - {"__init__"}


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name != "__init__.py"], ids=module_name)
def test_imports_go_down(path):
    name = module_name(path)
    room, _, module = name.partition(".")
    for imported in own_imports(path):
        other, _, sibling = imported.partition(".")
        if other == room:
            assert sibling in INSIDE[room][module], f"{name} imports its sibling {imported}"
        else:
            assert FLOOR[other] < FLOOR[room], f"{name} imports {imported} of its own floor or above"


def test_every_module_has_its_place():
    stated = {f"{folder}.{module}" for folder, modules in INSIDE.items() for module in modules}
    flat = set(FLOOR) - set(INSIDE)
    assert stated | flat == {module_name(path) for path in PACKAGE if path.name != "__init__.py"}


def test_tests_mirror_the_folders():
    mirrored = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert mirrored == set(INSIDE) | {"dist", "launch", "tools"}


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_tools_use_what_lies_below_the_entries(path):
    for imported in own_imports(path):
        assert FLOOR[imported.partition(".")[0]] <= FLOOR["predict"]
    assert not any(name.startswith("tools") for name in imports(path))


@pytest.mark.parametrize("library", SOLE_USERS)
def test_each_heavy_library_has_one_home(library):
    users = {module_name(p) for p in PACKAGE if any(name.partition(".")[0] == library for name in imports(p))}
    assert users == SOLE_USERS[library]


@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 350, f"{path} is too long"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 50, f"{path}: {node.name} is too long"


@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_its_purpose_and_every_tool_its_command(path):
    purpose = ast.get_docstring(ast.parse(path.read_text()))
    assert purpose
    if path.parent.name == "tools":
        assert purpose.startswith(f"python tools/{path.name}")


@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_has_an_encoding(path):
    """What the locale says is no reason to read or write other characters."""
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        said = {keyword.arg for keyword in call.keywords}
        if name == "open" and isinstance(call.func, ast.Name):
            mode = call.args[1].value if len(call.args) > 1 else "r"
            assert "b" in mode or "encoding" in said, f"{path}, line {call.lineno}"
        if name in ("read_text", "write_text"):
            assert "encoding" in said, f"{path}, line {call.lineno}"
        assert not said & {"text", "universal_newlines"}, f"{path}, line {call.lineno}: encoding= says which"


@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_what_it_reads(path):
    text = path.read_text()
    for name in ("pickle.load", "torch.load", "allow_pickle=True", "extractall", "trust_remote_code", "instantiate("):
        assert name not in text
    tree = ast.parse(text)
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"eval", "exec"}
