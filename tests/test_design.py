"""The design holds: who imports whom, how long functions and files are, and what no file may contain."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "pretrain").rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))

LAYERS = {
    "config": 0, "dist": 0, "cli": 0, "files": 0, "hardware": 0, "page": 0, "reference": 0,
    "checks": 1, "curves": 1, "data": 1, "harness": 1, "metrics": 1, "model": 1, "optim": 1, "tensors": 1,
    "compose": 2, "engine": 2, "prepare": 2, "saved": 2, "source": 2, "tuning": 2,
    "checkpoint": 3, "guard": 3, "log": 3, "report": 3, "evaluate": 3, "generate": 3,
    "card": 3, "parity": 3, "suite": 3, "vectors": 3,
    "convert": 4, "memorization": 4, "tasks": 4,
    "predict": 5,
    "loop": 6,
    "entry": 7,
    "finetune": 8, "train": 8,
}  # fmt: skip
# Within data/, prepare/, model/ and tasks/: what each module may import of its own package.
INSIDE = {
    "data.fetch": set(), "data.cache": set(), "data.remote": {"data.cache", "data.fetch"},
    "data.sidecar": set(), "data.manifest": {"data.remote", "data.sidecar"},
    "data.tar": set(), "data.writer": {"data.manifest", "data.remote", "data.sidecar", "data.tar"},
    "data.shards": {"data.manifest", "data.sidecar"}, "data.order": set(), "data.mixture": {"data.order"},
    "data.packing": {"data.manifest", "data.order", "data.shards"},
    "data.source": {"data.manifest", "data.order", "data.packing", "data.shards"},
    "data.stream": {"data.manifest", "data.mixture", "data.order", "data.source"},
    "data.opening": {"data.manifest", "data.mixture", "data.remote", "data.source", "data.stream", "data.tokenizer"},
    "data.texts": set(), "data.pieces": {"data.texts"}, "data.fastspec": {"data.texts"},
    "data.fast": {"data.fastspec", "data.texts"},
    "data.tokenizer": {"data.fast", "data.manifest", "data.pieces", "data.texts"},
    "data.objectives": {"data.order", "data.tokenizer"}, "data.chat": {"data.texts", "data.tokenizer"},
    "data.decompress": set(), "data.parquet": set(), "data.tables": {"data.decompress", "data.table_formats"},
    "data.table_formats": {"data.decompress", "data.parquet", "data.tar"},
    "data.walk": {"data.manifest", "data.shards"},
    "data.npy": set(), "data.samples": {"data.npy", "data.sidecar", "data.tar"},
    "data.verify": {"data.manifest", "data.samples", "data.sidecar", "data.tokenizer"},
    "data.rebuild": {"data.manifest", "data.remote", "data.samples", "data.sidecar", "data.tokenizer", "data.verify"},
    "prepare.readers": set(), "prepare.documents": {"prepare.readers"},
    "prepare.pii": set(), "prepare.filters": {"prepare.documents", "prepare.pii"},
    "prepare.dedup": set(), "prepare.encode": set(), "prepare.workers": set(),
    "prepare.plan": {"prepare.documents", "prepare.filters"},
    "prepare.duplicates": {"prepare.dedup", "prepare.plan"},
    "prepare.parts": {"prepare.dedup", "prepare.documents", "prepare.duplicates", "prepare.encode", "prepare.filters",
                      "prepare.plan"},
    "prepare.staging": {"prepare.documents", "prepare.filters", "prepare.plan"},
    "model.attention": set(), "model.losses": set(), "model.lora": set(), "model.positions": set(),
    "model.initial": set(),
    "model.transformer": {"model.attention", "model.lora", "model.positions"},
    "model.heads": {"model.lora", "model.transformer"},
    "model.hf_parts": {"model.transformer"}, "model.hf_decoders": {"model.hf_parts"},
    "model.hf_encoders": {"model.hf_parts"},
    "data.tasks": {"data.order"},
    "tasks.embed": {"tasks.task"}, "tasks.contrast": set(), "tasks.embedding": {"tasks.contrast", "tasks.task"},
    "tasks.task": set(), "tasks.validation": {"tasks.task"}, "tasks.classification": {"tasks.task"},
    "tasks.language_model": {"tasks.task"}, "tasks.instruct": {"tasks.language_model", "tasks.task"},
    "tasks.extractive_qa": {"tasks.task"}, "tasks.token_classification": {"tasks.task"},
    "model.hf_sentences": set(),
    "model.hf": {"model.heads", "model.hf_decoders", "model.hf_encoders", "model.hf_parts"},
}  # fmt: skip
SOLE_USERS = {
    "deepspeed": {"engine"}, "wandb": {"log"}, "omegaconf": {"compose"}, "hydra": {"compose"},
    "tarfile": {"data.tar"}, "sentencepiece": {"data.pieces"}, "tokenizers": {"data.fast"}, "matplotlib": {"curves"},
    "safetensors": {"tensors"}, "transformers": {"reference"}, "fsspec": {"data.fetch"},
    "submitit": {"prepare.workers"}, "zstandard": {"data.decompress"}, "pyarrow": {"data.parquet"},
    "phonenumbers": {"prepare.pii"}, "datasketch": {"prepare.dedup"},
    "sacrebleu": {"metrics"}, "rouge_score": {"metrics"}, "lm_eval": {"harness"}, "faiss": {"vectors"},
    "jinja2": {"data.chat"},
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "pretrain").with_suffix("").parts)


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
    """The modules of ours that a file imports, as config, data.stream, ..."""
    known = {module_name(file) for file in PACKAGE}
    return {name.removeprefix("pretrain.") for name in imports(path)} & known - {"__init__"}


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name != "__init__.py"], ids=module_name)
def test_imports_go_down(path):
    name = module_name(path)
    top = name.partition(".")[0]
    for imported in own_imports(path):
        other = imported.partition(".")[0]
        if other == top:
            assert imported in INSIDE[name], f"{name} imports its sibling {imported}"
        else:
            assert LAYERS[other] < LAYERS[top], f"{name} imports {imported} of its own layer or above"


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_tools_use_layers_0_to_5(path):
    for imported in own_imports(path):
        assert LAYERS[imported.partition(".")[0]] <= 5
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
def test_nothing_unpickles_or_runs_what_it_reads(path):
    text = path.read_text()
    for name in ("pickle.load", "torch.load", "allow_pickle=True", "extractall", "trust_remote_code", "instantiate("):
        assert name not in text
    tree = ast.parse(text)
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"eval", "exec"}
