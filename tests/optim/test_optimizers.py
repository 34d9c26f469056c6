"""Which parameters decay, and states that are made before the first step."""

import pytest
import torch

from pretrain.config import compose
from pretrain.model.heads import LanguageModel
from pretrain.optim import optimizers


def test_matrices_decay_and_vectors_and_position_tables_do_not():
    overrides = ["run.name=x", "model=gpt2_124m", "model.layers=1", "model.width=48", "model.vocab_size=32"]
    model = LanguageModel(compose.compose("pretrain", overrides).model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    config = compose.compose("pretrain", [*overrides, "optim.weight_decay=0.3"]).optim
    groups = optimizers.build(config, model.named_parameters()).param_groups
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert "trunk.embedding.weight" in decayed and "trunk.blocks.0.attention.q.weight" in decayed
    others = {names[id(p)] for p in groups[1]["params"]}
    undecayed = ("bias", "norm.weight", "positions.weight")
    assert "trunk.positions.weight" in others and all(n.endswith(undecayed) for n in others)


def test_each_part_has_its_learning_rate():
    overrides = ["run.name=x", "optim=muon", "optim.adamw_lr_scale=0.5", "optim.embedding_lr_scale=4",
                 "model.vocab_size=32", "model.value_embeddings=1"]  # fmt: skip
    cfg = compose.compose("pretrain", overrides)
    model = LanguageModel(cfg.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizers.build(cfg.optim, model.named_parameters(), lambda name: 0.1 if "blocks.1." in name else 1.0)
    scales = {names[id(p)]: group["lr_scale"] for group in groups.param_groups for p in group["params"]}
    assert scales["trunk.embedding.weight"] == 2 and scales[f"trunk.values.{cfg.model.layers - 1}.weight"] == 2
    assert scales["head.weight"] == scales["trunk.norm.weight"] == 0.5
    assert scales["trunk.blocks.0.ffn.up.weight"] == 1 and scales["trunk.blocks.1.ffn.up.weight"] == 0.1
    assert scales["trunk.blocks.1.ffn_norm.weight"] == 0.05


def test_rates_follow_the_width_of_what_they_were_found_at():
    """AdamW's by the ratio, Muon's by its root; tables and vectors not. What decays takes away as much as before."""
    found = {}
    for name, base in (("adamw", 0), ("adamw", 12), ("muon", 12)):
        overrides = ["run.name=x", f"optim={name}", f"optim.base_width={base}", "model=gpt2_124m", "model.layers=1",
                     "model.width=48", "model.vocab_size=32", "model.tied_embeddings=false",
                     "model.value_embeddings=1"]  # fmt: skip
        cfg = compose.compose("pretrain", overrides)
        model = LanguageModel(cfg.model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in optimizers.build(cfg.optim, model.named_parameters()).param_groups:
            assert group["weight_decay"] * group["lr_scale"] in (0, pytest.approx(cfg.optim.weight_decay))
            found |= {(name, base, names[id(p)]): group["lr_scale"] for p in group["params"]}
    for (name, base, parameter), scale in found.items():
        is_table = parameter.endswith(("embedding.weight", "positions.weight")) or ".values." in parameter
        if not base or is_table or "norm" in parameter or parameter.endswith("bias"):
            assert scale == 1, parameter
        else:
            assert scale == (1 / 2 if name == "muon" and parameter != "head.weight" else 1 / 4), parameter


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_state_made_early_changes_nothing(name):
    """Steps are the same whether the state was made by us before the first one or by the optimizer at it."""
    results = []
    for early in (False, True):
        parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
        cfg = compose.compose("pretrain", ["run.name=x", f"optim={name}"]).optim
        optimizer = optimizers.build(cfg, [("trunk.blocks.0.ffn.up.weight", parameter)])
        if early:
            optimizers.init_state(optimizer, name, parameter)
        for step in range(3):
            parameter.grad = torch.full((2, 3), 0.5 + step)
            optimizer.step()
        results.append(parameter.detach().clone())
        assert set(optimizer.state[parameter]) == {"step", *optimizers.STATE_KINDS[name]}
        assert optimizer.state[parameter]["step"] == 3
    assert torch.equal(*results)
