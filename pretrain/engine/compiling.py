"""The blocks of a model compiled: torch.compile (Ansel et al., "PyTorch 2", 2024), one graph for all blocks of a kind.

Compiled is what a block computes while it trains: its module keeps its names and its hooks.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch._functorch.config
import torch.fx.experimental._config
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from pretrain.dist import all_gather_objects
from pretrain.engine.engine import Engine, MicroBatch
from pretrain.files import private_folder
from pretrain.model.attention import Spans
from pretrain.model.transformer import Block

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # the environment variable for another folder
HOME_CACHE = "~/.cache/pretrain/inductor"
GRAPHS = 64  # at most: kinds of blocks times kinds of inputs are a few, and lengths that were planned have their own
OF_COMPILING = (TorchDynamoException, FailOnRecompileLimitHit)
Tell = Callable[[str], None]


def is_chosen(setting: str, device: torch.device, stage: int, is_whole: bool) -> bool:
    """What `train.compile` means: on a CPU compiling takes longer than it saves in a short run. `is_whole`: all weights
    learn. `ValueError` where compiled blocks would fail.
    """
    if stage == 3 and not is_whole:  # DeepSpeed frees the weights of a block before its backward pass is over
        if setting == "blocks":
            raise ValueError("train.compile=blocks at deepspeed=zero3 is for a model all of whose weights learn: take "
                             "deepspeed=zero2, or train.compile=none")  # fmt: skip
        return False
    return setting == "blocks" or (setting == "auto" and device.type == "cuda")


def compile_blocks(
    engine: Engine, micro_batches: list[MicroBatch], varies: bool, tell: Tell, backend: str = "inductor"
) -> str | None:
    """Compile the blocks for training by the forward pass of a step; None, or why they stay plain, on all ranks.

    `varies`: see `CompiledBlocks`. What a block meets later for the first time is compiled then: where that fails, this
    rank goes on with plain blocks, and `tell` is told why.
    """
    blocks = CompiledBlocks((part for part in engine.engine.modules() if isinstance(part, Block)), varies, backend)
    blocks.forgives = (Exception,)  # whatever compilers and caches raise: what is not theirs, plain blocks raise too
    engine.rehearse(micro_batches)
    blocks.problem = next(filter(None, all_gather_objects(blocks.problem)), None)
    blocks.forgives, blocks.tell = OF_COMPILING, tell
    return blocks.problem


class CompiledBlocks:
    """Blocks, each compiled in place at its first inputs of a kind; plain in evaluation, and all of them plain for good
    once one cannot be compiled: `problem` says what, and `tell` is told.
    """

    def __init__(self, blocks: Iterable[Block], varies: bool, backend: str | Callable = "inductor"):
        """`varies`: rows have any length, and micro-batches any number of them, which one graph takes; else a shape has
        a graph of its own, which is faster.
        """
        self.problem: str | None = None
        self.tell: Tell = lambda problem: None
        self.forgives: tuple[type[Exception], ...] = OF_COMPILING
        self._varies = varies
        try:
            prepare()
        except Exception as error:
            self.problem = in_a_line(error)
        # Dropout draws as in a plain block, and as in a pass without gradients before it (`loss_rows.across`).
        options = {"fallback_random": True} if backend == "inductor" else None
        for block in blocks:
            # Numbers, and sizes that are not said to be static, are variables of a graph: of spans they always change.
            compiled = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=backend, options=options)
            block.forward = self._forward(block, block.forward, compiled)  # called by the module, between its hooks

    def _forward(self, block: Block, plain: Callable, compiled: Callable) -> Callable[..., torch.Tensor]:
        def forward(*given: torch.Tensor | Spans | None) -> torch.Tensor:
            if self.problem is not None or not block.training:
                return plain(*given)
            for tensor in () if self._varies else given:
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_static(tensor)
            try:
                return compiled(*given)
            except self.forgives as error:
                self.problem = in_a_line(error)
            result = plain(*given)
            self.tell(self.problem)
            return result

        return forward


def prepare() -> None:
    """What torch.compile is to know beforehand; an error where there is no folder for what it makes: code that is
    loaded, and pickles, which torch would keep where others may write.
    """
    if os.environ.get(CACHE) in (None, default_cache_dir()):  # torch itself sets it to its own
        try:
            os.environ[CACHE] = str(private_folder(Path(HOME_CACHE).expanduser()))
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{error}: name a folder of your own in {CACHE}") from None
    inductor, dynamo, functorch = torch._inductor.config, torch._dynamo.config, torch._functorch.config
    inductor.cpp_cache_precompile_headers = False  # they would lie there whatever is set
    inductor.fx_graph_remote_cache = inductor.autotune_remote_cache = inductor.bundled_autotune_remote_cache = False
    functorch.enable_remote_autograd_cache = dynamo.automatic_dynamic_remote_pgo = False
    dynamo.automatic_dynamic_local_pgo = False  # what an earlier run met would decide how this one rounds
    functorch.force_non_lazy_backward_lowering = True  # the backward pass too is compiled, or fails, at the forward one
    dynamo.recompile_limit = GRAPHS
    torch.fx.experimental._config.use_duck_shape = False  # sizes that happen to be equal are not one variable


def in_a_line(error: Exception) -> str:
    """What went wrong, and what to do."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""
    if isinstance(error, FailOnRecompileLimitHit):
        said = f"more than {GRAPHS} graphs were needed"
    remedy = "install g++, or name a C++ compiler in CXX; " if "c++" in text.lower() else ""
    return f"{type(error).__name__}: {said} ({remedy}train.compile=none does not try)"
