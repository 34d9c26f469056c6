"""Learning rates that were found at one width are those of others (Yang et al., "Tensor Programs V", 2022)."""

import pytest
import torch

from pretrain.config import compose
from pretrain.model.heads import LanguageModel
from pretrain.model.initial import fill_initial
from pretrain.optim import optimizers
from tests.forked import ROOT

WIDTHS, STEPS, ROWS, LENGTH = (64, 128, 256), 60, 16, 64
RATES = {"adamw": [2.0**-power for power in range(11, 5, -1)], "muon": [2.0**-power for power in range(7, 1, -1)]}


def last_loss(text: torch.Tensor, *overrides: str, lr: float) -> float:
    """Of the last ten steps of a small run on bytes."""
    line = ["run.name=x", "model=llama_tiny", "model.layers=2", "model.vocab_size=256", "model.kv_heads=0",
            "model.ffn_width=0", "model.tied_embeddings=false", "model.qk_norm=true", *overrides]  # fmt: skip
    cfg = compose.compose("pretrain", line)
    model = LanguageModel(cfg.model)
    for name, parameter in model.named_parameters():
        fill_initial(parameter.data.view(-1), 0, name, tuple(parameter.shape), cfg.model, 0)
    optimizer = optimizers.build(cfg.optim, model.named_parameters())
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        starts = torch.randint(0, len(text) - LENGTH - 1, (ROWS,), generator=generator)
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        loss = model(rows[:, :-1], labels=rows[:, 1:].contiguous()).sum() / (ROWS * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"] * min(1, (step + 1) / 5) * (1 - step / STEPS)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_the_best_rate_is_the_same_at_each_width(name):
    """And with it a wider model learns more. Rates are twice one another."""
    text = torch.tensor(list(b"".join(path.read_bytes() for path in sorted((ROOT / "pretrain").rglob("*.py")))))
    found = {}
    for width in WIDTHS:
        overrides = [f"optim={name}", "optim.base_width=64", "model.init=fan_in", f"model.width={width}",
                     f"model.heads={width // 32}"]  # fmt: skip
        found[width] = {lr: last_loss(text, *overrides, lr=lr) for lr in RATES[name]}
    best = {width: min(losses, key=losses.get) for width, losses in found.items()}
    assert len(set(best.values())) == 1 and RATES[name][0] < best[64] < RATES[name][-1], found
    assert found[256][best[64]] < found[64][best[64]], found
