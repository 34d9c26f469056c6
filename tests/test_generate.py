"""Text from a run's checkpoint: exact, reproducible, within its limits, and through the tool as a user calls it."""

import pytest
import torch

from pretrain import checkpoint, generate
from pretrain.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def loaded(undisturbed):
    return checkpoint.load_model(undisturbed), load_tokenizer(undisturbed)


def test_greedy_text_is_the_likeliest_token_of_the_whole_sequence_each_time(loaded):
    model, tokenizer = loaded
    ids = [*tokenizer.prefix, *tokenizer.encode("def f(x):")]
    found = list(generate.sample_ids(model, ids, 12, 0.0, 1.0, 0, stop=-1))
    for chosen in found:
        assert chosen == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(chosen)
    assert len(found) == 12


def test_the_nucleus_is_the_smallest_set_of_that_probability():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for top_p, kept in ((0.4, {1}), (0.5, {1}), (0.7, {1, 3}), (0.85, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        generator = torch.Generator().manual_seed(0)
        assert {generate._draw(logits, top_p, generator) for _ in range(300)} == kept


def test_it_stops_at_the_stop_token_and_at_the_last_position(loaded):
    model, tokenizer = loaded
    ids = tokenizer.prefix
    first = next(generate.sample_ids(model, ids, 1, 0.0, 1.0, 0, stop=-1))
    assert list(generate.sample_ids(model, ids, 5, 0.0, 1.0, 0, stop=first)) == []
    limit = model.trunk.config.max_positions
    near_the_end = [5] * (limit - 3)
    assert len(list(generate.sample_ids(model, near_the_end, 50, 0.0, 1.0, 0, stop=-1))) == 3


def test_pieces_join_to_the_decoded_ids_also_inside_characters(loaded):
    model, tokenizer = loaded
    pieces = list(generate.continue_text(model, tokenizer, "é漢🙂", 40, temperature=3.0, top_p=1.0, seed=3))
    ids = [*tokenizer.prefix, *tokenizer.encode("é漢🙂")]
    whole = list(generate.sample_ids(model, ids, 40, 3.0, 1.0, 3, tokenizer.eos))
    assert "".join(pieces) == tokenizer.decode(whole) and len(pieces) > 5


def test_the_tool_writes_the_prompt_and_the_same_text_for_the_same_seed(tool, undisturbed):
    lines = [tool("generate.py", undisturbed, "--prompt", "import ", "--max-tokens", 20, "--seed", seed).stdout
             for seed in (1, 1, 2)]  # fmt: skip
    assert lines[0].startswith("import ") and len(lines[0]) > len("import \n")
    assert lines[0] == lines[1] != lines[2]
    step_5 = undisturbed / "checkpoints" / "step-000000015"
    assert tool("generate.py", step_5, "--prompt", "import ", "--max-tokens", 20, "--seed", 1).stdout != lines[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--top-p", "0"], "top-p"),
        (["--temperature", "-1"], "temperature"),
        (["--max-tokens", "0"], "max-tokens"),
        (["--prompt", "word " * 2000], "positions"),
    ],
)
def test_mistakes_are_one_message(tool, undisturbed, arguments, words):
    done = tool("generate.py", undisturbed, *arguments, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr


def test_a_folder_without_checkpoints_is_named(tool, tmp_path):
    done = tool("generate.py", tmp_path, check=False)
    assert done.returncode == 2 and f"no checkpoint in {tmp_path}" in done.stderr
