"""Text from a model: a row is the same alone and in any batch, reproducible, within its limits; also by the tool."""

import io
import json

import pytest
import torch

from pretrain.checkpoint.load import load_model
from pretrain.cli import run_tool
from pretrain.inference import generate
from pretrain.inference.generate import Sampling, Writer, generate_all, generate_batch, generate_texts
from pretrain.tokenizer.chat import ChatFormat
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests.models import some_prompts, tiny_model
from tools import generate as generate_tool

PARTS = {
    "rope and grouped heads": [],
    "learned positions": ["model.positions=learned", "model.norm=layernorm", "model.activation=gelu_tanh"],
    "sinusoids": ["model.positions=sinusoidal", "model.norm_position=post"],
    "no positions": ["model.positions=none", "model.attention=plain"],
    "one key head": ["model.kv_heads=1", "model.qk_norm=true"],
    "windows": ["model.sliding_window=6", "model.global_every=2", "model.local_rope_theta=100"],
    "yarn and windows": ["model.rope_scaling=yarn", "model.rope_factor=4", "model.rope_original_positions=16",
                         "model.sliding_window=5", "model.attention=plain"],
}  # fmt: skip


@pytest.fixture(scope="module", params=PARTS)
def model(request) -> torch.nn.Module:
    return tiny_model(*PARTS[request.param])


@pytest.fixture(scope="module")
def plain_model() -> torch.nn.Module:
    return tiny_model()


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """By the definition: the likeliest id after the whole sequence, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_ids_of_every_row_are_those_of_the_whole_sequence(model):
    prompts = some_prompts()
    expected = [greedy(model, prompt, 16) for prompt in prompts]
    assert generate_batch(model, prompts, 16) == expected
    assert [generate_batch(model, [prompt], 16)[0] for prompt in prompts] == expected
    assert len({id_ for ids in expected for id_ in ids}) > 10, "they must differ for the comparison to say anything"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, 0.9, 20, seed=5), Sampling(1.0)])
def test_batches_and_their_order_leave_no_trace(model, sampling):
    prompts = some_prompts() * 2
    expected = generate_batch(model, prompts, 10, sampling)
    for batch_size in (1, 5, 12):
        assert generate_all(model, prompts, 10, batch_size, sampling) == expected
    backward = range(len(prompts))[::-1]
    chosen = [prompts[row] for row in backward]
    assert generate_batch(model, chosen, 10, sampling, rows=backward) == expected[::-1]


def test_the_seed_the_row_and_the_step_decide(plain_model):
    prompt = some_prompts()[0]
    ids = generate_batch(plain_model, [prompt] * 40, 20, Sampling(2.0, seed=1))
    assert len(set(map(tuple, ids))) == 40 and all(len(set(row)) > 5 for row in ids)
    assert ids == generate_batch(plain_model, [prompt] * 40, 20, Sampling(2.0, seed=1))
    assert ids != generate_batch(plain_model, [prompt] * 40, 20, Sampling(2.0, seed=2))


def test_each_row_stops_by_itself_and_changes_no_other(model):
    prompts = some_prompts()
    expected = generate_batch(model, prompts, 16)
    stop_ids = {expected[1][4], expected[3][9]}
    cut = [next((i for i, id_ in enumerate(ids) if id_ in stop_ids), 16) for ids in expected]
    stopped = [ids[:count] for ids, count in zip(expected, cut, strict=True)]
    assert generate_batch(model, prompts, 16, stop_ids=stop_ids) == stopped
    assert len(set(cut)) > 1
    seen = []

    def is_over(row: int, ids: list[int]) -> bool:
        seen.append((row, len(ids)))
        return len(ids) == row % 10

    rows = [13, 5, 1, 8, 7, 2]
    found = generate_batch(model, prompts, 16, is_over=is_over, rows=rows)
    assert found == [ids[: row % 10] for ids, row in zip(expected, rows, strict=True)]
    assert sorted(seen) == sorted((row, n) for row in rows for n in range(1, row % 10 + 1))


def test_each_row_ends_at_the_models_last_position(model):
    prompts = [[5] * 45, [7, 8], [3] * 47]
    found = generate_batch(model, prompts, 100)
    assert [len(ids) for ids in found] == [3, 46, 1]
    assert found == [greedy(model, prompt, len(ids)) for prompt, ids in zip(prompts, found, strict=True)]


def test_a_rank_that_is_done_calls_the_model_as_often_as_the_others(plain_model):
    prompts, calls = some_prompts(), []
    plain_model.register_forward_hook(lambda *_: calls.append(1))
    expected = generate_batch(plain_model, prompts, 9)
    assert len(calls) == 9
    for mine in (prompts, prompts[:1], []):
        calls.clear()
        asked = []

        def all_done(is_done: bool) -> bool:
            asked.append(is_done)  # noqa: B023
            return len(asked) > 12  # noqa: B023

        assert generate_batch(plain_model, mine, 9, all_done=all_done) == expected[: len(mine)]
        own = 9 if mine else 0
        assert len(calls) == 12 and asked == [False] * own + [True] * (13 - own)


def test_under_deepspeed_each_rank_has_its_own_rows_at_every_stage_between_steps(worker):
    found = worker("generate_worker.py")
    for stage in (0, 1, 3):
        (before, others, after), (before_1, none, after_1) = found[f"stage {stage}"]["ids"]
        model = tiny_model()
        assert before == generate_batch(model, [[5, 6, 7], [8] * 20, [9, 10]], 12)
        assert before_1 == others == generate_batch(model, [[11] * 46], 12) and none == []
        assert after == found["stage 0"]["ids"][0][2] != before
        assert after_1 == found["stage 0"]["ids"][1][2] != before_1
        assert found[f"stage {stage}"]["losses"] == pytest.approx(found["stage 0"]["losses"], rel=1e-5)


def test_the_nucleus_is_the_smallest_set_of_that_probability():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().expand(300, 4)
    for top_p, top_k, kept in (
        (0.4, 0, {1}), (0.5, 0, {1}), (0.7, 0, {1, 3}), (0.85, 0, {1, 2, 3}), (1.0, 0, {0, 1, 2, 3}),
        (1.0, 1, {1}), (1.0, 3, {1, 2, 3}), (0.65, 2, {1}), (0.7, 2, {1, 3}),
    ):  # fmt: skip
        chosen = Sampling(1.0, top_p, top_k).choose(logits, range(300), 0)
        assert set(chosen.tolist()) == kept, (top_p, top_k)


def test_ids_are_drawn_as_often_as_their_probability_says():
    shares = torch.tensor([0.1, 0.5, 0.15, 0.25])
    for temperature in (1.0, 0.5):
        expected = (shares.log() / temperature).softmax(0)
        for sampling in (Sampling(temperature), Sampling(temperature, top_k=4)):
            rows = sampling.choose(shares.log().expand(20_000, 4), range(20_000), 3)
            steps = torch.cat([sampling.choose(shares.log()[None], [7], step) for step in range(2_000)])
            for chosen, tolerance in ((rows, 0.01), (steps, 0.04)):
                assert torch.allclose(chosen.bincount(minlength=4) / len(chosen), expected, atol=tolerance)


@pytest.mark.parametrize("value", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_values_that_cannot_be_sampled_with_are_refused(value):
    with pytest.raises(ValueError, match="temperature must be at least 0, top-p in"):
        Sampling(**value)


def test_models_and_prompts_that_cannot_be_continued_are_refused(plain_model):
    for part, message in (("model.causal=false", "bidirectional"), ("model.head=none", "no language model's output")):
        with pytest.raises(ValueError, match=message):
            generate_batch(tiny_model(part), [[1]], 5)
    with pytest.raises(ValueError, match="prompt 2 has 48 tokens, the model 48 positions"):
        generate_batch(plain_model, [[1], [1] * 48], 5)
    with pytest.raises(ValueError, match="max-tokens is 0"):
        generate_batch(plain_model, [[1]], 0)


# Text


@pytest.fixture(scope="module")
def loaded(undisturbed):
    return load_model(undisturbed), load_tokenizer(undisturbed)


def test_pieces_join_to_the_decoded_ids_also_inside_characters(loaded):
    model, tokenizer = loaded
    sampling = Sampling(3.0, seed=3)
    pieces = list(generate.continue_text(model, tokenizer, "é漢🙂", 40, sampling))
    prompt = generate.prompt_ids(tokenizer, "é漢🙂")
    [whole] = generate_batch(model, [prompt], 40, sampling, stop_ids=[tokenizer.eos])
    assert "".join(pieces) == tokenizer.decode(whole) and len(pieces) > 5


def test_whole_characters_and_no_part_of_a_stop_string_are_said(loaded):
    tokenizer = loaded[1]
    text = "ab🙂 STO STOP é漢 end"
    ids = tokenizer.encode(text)
    for stops, expected in (((), text), (("STOP",), "ab🙂 STO "), (("nothing", "é", "STOP\n"), "ab🙂 STO STOP "),
                            (("OP é", "TOP é漢"), "ab🙂 STO ST"), (("end.",), text), (("ab",), "")):  # fmt: skip
        writer, said, over = Writer(tokenizer, tokenizer.encode("a prompt with STOP"), stops), [], False
        for id_ in ids:
            if not over:
                said.append(writer.add(id_))
                over = writer.is_over
            so_far = "".join(said)
            assert expected.startswith(so_far) and "\ufffd" not in so_far
        assert "".join(said) + writer.rest() == expected and writer.is_over == over == (expected != text)


def test_texts_of_a_batch_are_those_of_each_alone(loaded):
    model, tokenizer = loaded
    prompts = [generate.prompt_ids(tokenizer, text) for text in ("import ", "def f(", "", "class A:\n    def é")]
    sampling = Sampling(1.0, 0.95, seed=4)
    for stops in ((), ("e", "\n")):
        found = generate_texts(model, tokenizer, prompts, 20, 3, sampling, stops=stops)
        alone = [generate.continue_text(model, tokenizer, prompt, 20, sampling, stops=stops, row=row)
                 for row, prompt in enumerate(prompts)]  # fmt: skip
        assert [text for text, _ in found] == ["".join(pieces) for pieces in alone]
        assert all(stop not in text for text, _ in found for stop in stops)
        assert (max(count for _, count in found) == 20) == (not stops)


def ran(capsys, *arguments: object) -> str:
    """What the tool prints."""
    generate_tool.main([*map(str, arguments)])
    return capsys.readouterr().out


def test_the_tool_writes_the_prompt_and_the_same_text_for_the_same_seed(tool, undisturbed, capsys):
    few = ("--prompt", "import ", "--max-tokens", 20, "--seed")
    lines = [tool("generate.py", undisturbed, *few, 1).stdout, *(ran(capsys, undisturbed, *few, n) for n in (1, 2))]
    assert lines[0].startswith("import ") and len(lines[0]) > len("import \n")
    assert lines[0] == lines[1] != lines[2]
    step_15 = undisturbed / "checkpoints" / "step-000000015"
    assert ran(capsys, step_15, *few, 1) != lines[0]


def test_the_tool_continues_a_file_of_prompts_as_it_does_each_alone(undisturbed, tmp_path, capsys):
    prompts = ["import ", "class A:", "é 漢🙂", "def f(x,\x0cy):"]
    settings = ("--max-tokens", 12, "--seed", 3, "--top-k", 50, "--stop", "e", "--stop", "(")
    single = ran(capsys, undisturbed, *settings, *(part for prompt in prompts for part in ("--prompt", prompt)))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"q": prompt}) + "\n" for prompt in prompts))
    shown = ran(capsys, undisturbed, *settings, "--input", tmp_path / "prompts.txt", "--batch-size", 3)
    output = tmp_path / "out.jsonl"
    jsonl = ("--input", tmp_path / "prompts.jsonl", "--text-key", "q", "--output", output)
    assert ran(capsys, undisturbed, *settings, *jsonl) == ""
    assert output.read_text() == shown and list(tmp_path.glob("out*")) == [output]
    rows = [json.loads(line) for line in shown.splitlines()]
    assert "".join(f"{row['prompt']}{row['text']}\n" for row in rows) == single
    assert not any(stop in row["text"] for row in rows for stop in "e(")
    assert [row["prompt"] for row in rows] == prompts and all(1 <= row["tokens"] <= 12 for row in rows)


def test_the_tool_talks_and_remembers_what_was_said(undisturbed, capsys, monkeypatch):
    model, tokenizer = load_model(undisturbed), load_tokenizer(undisturbed)
    chat, sampling = ChatFormat(tokenizer), Sampling(0.8, 0.95, seed=5)
    messages = [{"role": "system", "content": "Be brief."}]
    expected = []
    for row, question in enumerate(("import what?", "And then?", "é漢🙂?")):
        messages.append({"role": "user", "content": question})
        ids = chat.encode(messages, add_generation_prompt=True)[0]
        pieces = generate.continue_text(model, tokenizer, ids, 9, sampling, row=row, stop_ids=chat.stop_ids)
        expected.append("".join(pieces).lstrip())
        messages.append({"role": "assistant", "content": expected[-1].strip()})
    settings = ("--chat", "--system", "Be brief.", "--max-tokens", 9, "--seed", 5)
    monkeypatch.setattr("sys.stdin", io.StringIO("import what?\nAnd then?\né漢🙂?\n"))
    assert ran(capsys, undisturbed, *settings) == "".join(f"{answer}\n" for answer in expected)
    assert ran(capsys, undisturbed, *settings, "--prompt", "import what?") == f"{expected[0]}\n"


def test_text_is_written_as_it_comes(undisturbed, monkeypatch):
    """Each piece is out before the next one is computed."""
    told, computed = [], []

    class Terminal(io.StringIO):
        def flush(self):
            told.append((len(computed), self.getvalue()))

    inner = generate.continue_text

    def counted(*arguments, **options):
        for piece in inner(*arguments, **options):
            computed.append(piece)
            yield piece

    monkeypatch.setattr(generate, "continue_text", counted)
    monkeypatch.setattr("sys.stdout", Terminal())
    generate_tool.main([str(undisturbed), "--prompt", "import ", "--max-tokens", "30"])
    assert len(computed) > 15
    assert [text for _, text in told[: len(computed)]] == ["import " + "".join(computed[: number + 1])
                                                           for number in range(len(computed))]  # fmt: skip
    assert [count for count, _ in told[: len(computed)]] == list(range(1, len(computed) + 1))


def test_a_conversation_that_is_too_long_loses_its_beginning(undisturbed, loaded, capsys, monkeypatch):
    model, tokenizer = loaded
    words = 60 * model.trunk.config.max_positions // len(tokenizer.encode("word " * 100))
    lines = [f"{'word ' * words}{number}" for number in range(4)]  # 0.6 of the positions each
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n\n"))
    generate_tool.main([str(undisturbed), "--chat", "--max-tokens", "9"])
    printed = capsys.readouterr()
    assert printed.err.count("the oldest question and its answer are forgotten") == 3 and printed.out
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'word ' * 4 * words}\nimport what?\n"))
    generate_tool.main([str(undisturbed), "--chat", "--max-tokens", "9"])
    printed = capsys.readouterr()
    assert "positions" in printed.err and printed.out, "what is too long by itself ends no conversation"


def test_the_tool_takes_a_hugging_face_folder(tmp_path, capsys, loaded):
    transformers = pytest.importorskip("transformers")
    tokenizer = loaded[1]
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    for name, file in tokenizer.hf_files(64).items():
        (tmp_path / name).write_bytes(file)
    prompt = torch.tensor([generate.prompt_ids(tokenizer, "import ")])
    made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False,
                           eos_token_id=tokenizer.eos, pad_token_id=0)  # fmt: skip
    said = ran(capsys, tmp_path, "--prompt", "import ", "--max-tokens", 10, "--temperature", 0)
    text = load_tokenizer(tmp_path).decode(made[0, prompt.shape[1] :].tolist())
    assert said == f"import {text}\n" and len(text) > 5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--top-p", "0"], "top-p"),
        (["--temperature", "-1"], "temperature"),
        (["--top-k", "-1"], "top-k"),
        (["--max-tokens", "0"], "max-tokens"),
        (["--prompt", "word " * 2000], "positions"),
        (["--input", "none.txt"], "none.txt"),
        (["--input", "none.txt", "--output", "gone/out.jsonl"], "there is no folder gone"),
        (["--chat", "--prompt", " "], "content is empty"),
    ],
)
def test_mistakes_are_one_message(undisturbed, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("sys.argv", ["generate.py", str(undisturbed), *arguments])
    with pytest.raises(SystemExit) as left:
        run_tool(generate_tool.main)
    printed = capsys.readouterr()
    assert left.value.code == 2 and printed.err.startswith("error: ") and words in printed.err and not printed.out


def test_a_folder_without_checkpoints_is_named(tool, tmp_path):
    done = tool("generate.py", tmp_path, check=False)
    assert done.returncode == 2 and f"no checkpoint in {tmp_path}" in done.stderr
