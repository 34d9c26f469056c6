"""Responses to prompts and conversations: what is learnt to the token, packing without a trace, what is written."""

import json
from dataclasses import replace

import pytest
import torch

from pretrain.inference.generate import generate_batch, prompt_ids
from pretrain.stream.objectives import IGNORE
from pretrain.tasks.instruct import Instruct
from pretrain.tokenizer.chat import ChatFormat
from pretrain.tokenizer.tokenizer import load_tokenizer
from tests.models import some_prompts, tiny_model
from tests.task_helpers import (
    batch_of,
    byte_level,
    judged,
    make,
    new_model,
    sentence_pieces,
    table_of,
    taught,
)

TEMPLATE = (  # ChatML
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Is <|im_end|> text?"),
        ("assistant", "Yes 🎉")]  # fmt: skip
NO_PACKING = "data.packing=none"


def talk(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def pair(prompt: str, response: str) -> dict:
    return {"prompt": prompt, "response": response}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("tokenizers")
    plain = byte_level(root / "bytes")
    content = json.loads((root / "bytes" / "tokenizer.json").read_text())
    config = json.loads((root / "bytes" / "tokenizer_config.json").read_text())
    for text in ("<|im_start|>", "<|im_end|>"):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": plain.vocab_size + len(content["added_tokens"]) - 1, "content": text,
                                        "special": True, **flags})  # fmt: skip
    (root / "chat").mkdir()
    (root / "chat" / "tokenizer.json").write_text(json.dumps(content))
    (root / "chat" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    pieces = sentence_pieces(root / "pieces", ["Hello Hallo Question: Answer: yes no\n"] * 9, 290)
    return {"bytes": plain, "chat": load_tokenizer(root / "chat"), "pieces": pieces}


def learnt(task, examples, number: int) -> tuple[list[int], list[int]]:
    """The ids that a row reads, and those that are learnt."""
    batch = batch_of(task, examples, number)
    labels = batch["labels"][0].tolist()
    return batch["inputs"][0].tolist(), [label for label in labels if label != IGNORE]


# What is learnt


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize(
    "prompt, response, before",
    [("Q: ", "Hallo", "Q:"), ("Q:", " Hallo", "Q:"), ("Q:\n", "Hallo ", "Q:\n"), ("Q:   ", "中 🎉", "Q:")],
)
def test_a_response_stands_right_after_its_prompt(tokenizers, tmp_path, kind, prompt, response, before):
    tokenizer = tokenizers[kind]
    task = make("instruct", tokenizer, NO_PACKING)
    inputs, targets = learnt(task, task.encode(table_of(tmp_path, pair(prompt, response))), 0)
    start = prompt_ids(tokenizer, before)
    assert inputs[: len(start)] == start == task._prompt([{"role": "user", "content": prompt}], is_chat=False)
    assert inputs[len(start) :] + targets[-1:] == targets, "every id of the response, and its end"
    assert targets[-1] == tokenizer.eos and tokenizer.decode(targets) == prompt[len(before) :] + response
    assert targets[:-1] == tokenizer.encode(prompt[len(before) :] + response)
    assert task.described()["chat"] is False, "an export of it gets no chat template"


def test_a_token_never_reaches_over_from_the_prompt_into_the_response(tokenizers, tmp_path):
    tokenizer = tokenizers["pieces"]
    assert len(tokenizer.encode("llo")) == 1, "else the case does not arise"
    task = make("instruct", tokenizer, NO_PACKING)
    inputs, targets = learnt(task, task.encode(table_of(tmp_path, pair("l", "lo"))), 0)
    assert inputs == [*tokenizer.prefix, *tokenizer.encode("l"), *tokenizer.encode("lo")]
    assert targets == [*tokenizer.encode("lo"), tokenizer.eos]


def test_a_template_makes_the_prompt_of_columns(tokenizers, tmp_path):
    rows = [{"en": "{yes}", "no.": 3, "response": "ja", "messages": "no conversation"}]
    task = make("instruct", tokenizers["bytes"], "task.template='{no.} {{of}} {en}, {en}: '")
    inputs, targets = learnt(task, task.encode(table_of(tmp_path, *rows)), 0)
    assert task.tokenizer.decode(inputs) == "3 {of} {yes}, {yes}: ja" and task.tokenizer.decode(targets) == " ja"

    def with_template(template: str) -> Instruct:
        config = replace(task.config, template=template)
        return Instruct(config, task.tokenizer, task.model, 32, "best_fit", 0, task.objective)

    with pytest.raises(ValueError, match=r"rows.jsonl has no column 'eng' \(did you mean 'en'\?\).*task.template"):
        with_template("{eng}").encode(table_of(tmp_path, *rows))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: column 'en' \(task.template\) is null"):
        with_template("{en}").encode(table_of(tmp_path, rows[0] | {"en": None}))
    for wrong in ("{en", "{}", "{en!r}", "{en:>9}", "no column", ""):
        with pytest.raises(ValueError, match=r"task.template=.*write it as .task.template='Translate: \{text\}'"):
            with_template(wrong)


def test_of_a_conversation_the_answers_are_learnt_and_what_ends_them(tokenizers, tmp_path):
    tokenizer = tokenizers["chat"]
    task = make("instruct", tokenizer, NO_PACKING, "train.seq_len=256")
    begin, end = 257, 258
    inputs, targets = learnt(task, task.encode(table_of(tmp_path, talk(*TALK))), 0)
    assert inputs.count(begin) == 5 and inputs.count(end) == 5, "and not one for what a message says"
    assert targets == [*tokenizer.encode("Hello!"), end, *tokenizer.encode("Yes 🎉"), end]
    expected, _ = ChatFormat(tokenizer).encode(talk(*TALK)["messages"])
    assert inputs == expected[:-1]


def test_a_prompt_is_a_turn_where_the_tokenizer_has_a_template(tokenizers, tmp_path):
    tokenizer = tokenizers["chat"]
    task = make("instruct", tokenizer, NO_PACKING, "train.seq_len=64")
    table = table_of(tmp_path, pair("Hi", "Hello!"), name="pairs.jsonl")
    same = table_of(tmp_path, talk(("user", "Hi"), ("assistant", "Hello!")))
    assert learnt(task, task.encode(table), 0) == learnt(task, task.encode(same), 0)
    assert learnt(task, task.encode(table), 0)[1] == [*tokenizer.encode("Hello!"), 258]


def test_a_conversation_without_a_template_is_written_by_ours(tokenizers, tmp_path):
    tokenizer = tokenizers["pieces"]
    task = make("instruct", tokenizer, NO_PACKING, "train.seq_len=256")
    inputs, targets = learnt(task, task.encode(table_of(tmp_path, talk(*TALK))), 0)
    assert inputs[0] == tokenizer.prefix[0] and targets.count(tokenizer.eos) == 2
    assert tokenizer.decode(targets) == " Hello! Yes 🎉" and task.described()["chat"] is True


# Packing


def some_rows() -> list[dict]:
    return [pair("p" * n, "r" * m) for n, m in [(3, 9), (1, 1), (20, 8), (2, 28), (6, 4), (5, 5), (12, 3), (1, 31)]]


def test_packing_changes_no_loss_and_no_gradient(tokenizers, tmp_path):
    table, found = table_of(tmp_path, *some_rows()), {}
    for packing in ("best_fit", "none"):
        task = make("instruct", tokenizers["bytes"], f"data.packing={packing}")
        examples = task.encode(table)
        model = new_model(task)
        batch = batch_of(task, examples)
        losses = task.loss_rows(model, **batch)
        losses.sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        scores = task.score_rows(model, **batch).detach()
        found[packing] = float(losses.detach().sum()), gradients, scores.sum(0)
        assert scores.shape[1] == 5 and examples.facts["rows"].tolist() == list(range(8))
        if packing == "best_fit":
            inputs, documents = examples.columns["inputs"], examples.columns["documents"]
            assert len(examples) == 5 and (examples.lengths <= 32).all() and inputs.lengths.max() == 33
            assert sum(int(documents[i].max()) + 1 for i in range(5)) == 8
            assert examples.rows.tolist() == [7, 3, 2, 6, 4], "of each row its longest conversation"
        else:
            assert len(examples) == 8 and "documents" not in batch, "padding behind a row needs no mask"
    assert found["best_fit"][0] == pytest.approx(found["none"][0], rel=1e-6)
    assert torch.allclose(found["best_fit"][2], found["none"][2], rtol=1e-6)
    for name, gradient in found["best_fit"][1].items():
        assert torch.allclose(gradient, found["none"][1][name], rtol=1e-4, atol=1e-5), name
    counts = [len(row["response"]) + 1 for row in some_rows()]
    assert found["none"][2][1] == sum(counts)


# What cannot be learnt from


def test_problems_are_named_counted_and_left_out(tokenizers, tmp_path):
    long = [pair("p" * 16, "r" * 16), pair("p" * 16, "r" * 17)]  # with its end 33 and 34 tokens
    table = table_of(tmp_path, *long, pair("p", " \n"))
    task = make("instruct", tokenizers["bytes"])
    with pytest.raises(ValueError) as caught:
        task.encode(table)
    assert "2 examples of" in str(caught.value) and "line 1" not in str(caught.value)
    assert "line 2: the conversation has 34 tokens, train.seq_len=32 takes 33;" in str(caught.value)
    assert "line 3: the conversation, message 2: the content is empty" in str(caught.value)
    dropping = make("instruct", tokenizers["bytes"], "task.drop_bad=true")
    examples = dropping.encode(table)
    assert len(examples) == 1 and len(examples.dropped) == 2 and examples.facts["rows"].tolist() == [0]
    for wrong, message in (
        ([("user", "Hi")], "line 1: the conversation has no answer"),
        ([("assistant", "Hi")], "line 1: the conversation has no answer"),
        ([("user", "Hi"), ("robot", "Hi")], "line 1: the conversation, message 2: the role is 'robot'"),
        ([], "line 1: the conversation has no messages"),
    ):
        with pytest.raises(ValueError, match=message):
            task.encode(table_of(tmp_path, talk(*wrong)))
    with pytest.raises(ValueError, match="line 1: column 'response' holds 5, not text"):
        task.encode(table_of(tmp_path, {"prompt": "a", "response": 5}))
    with pytest.raises(ValueError, match=r"has no column 'prompt'.*task.prompt"):
        task.encode(table_of(tmp_path, {"question": "a"}))
    with pytest.raises(ValueError, match="task=instruct: a model that looks ahead"):
        make("instruct", tokenizers["pieces"], "model.causal=false")


# What is written

QUESTIONS = ("a", "bb", "a b", "c", "ccc")


@pytest.fixture(scope="module")
def answering(tokenizers, tmp_path_factory):
    """A model that has learnt by heart to answer 1 to 5 to the questions, as a chat, and those rows."""
    rows = [pair(text, f"no. {number}") for number, text in enumerate(QUESTIONS, 1)]
    table = table_of(tmp_path_factory.mktemp("rows"), *rows)
    task = make("instruct", tokenizers["chat"], "train.seq_len=64")
    return taught(task, table, 90).eval(), table


def validate(task, table, model, micro_batch_size=2) -> tuple[dict, list[dict]]:
    calls: list = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    figures, validation = judged(task, table, model, micro_batch_size)
    hook.remove()
    return figures | {"calls": len(calls)}, validation.details


def test_responses_are_written_and_judged(tokenizers, answering, tmp_path):
    model, table = answering
    settings = ("train.seq_len=64", "task.max_new_tokens=12")
    task = make("instruct", tokenizers["chat"], *settings, "task.figures=answers")
    assert task.best == "val_f1" and task.figures == ("accuracy", "exact_match", "f1")
    figures, details = validate(task, table, model)
    assert figures.pop("calls") > 3 and figures.pop("val_loss") < 0.05
    assert figures == {"val_accuracy": 1.0, "val_exact_match": 1.0, "val_f1": 1.0}
    assert details[1] == {"prompt": "bb", "gold": "no. 2", "prediction": "no. 2", "right": True, "score": 1.0}
    assert [row["prompt"] for row in details] == list(QUESTIONS)

    other = table_of(tmp_path, *(pair(text, "no. 7" if text == "c" else f"no. {number}")
                                 for number, text in enumerate(QUESTIONS, 1)))  # fmt: skip
    some = make("instruct", tokenizers["chat"], *settings, "task.figures=answers", "task.generate_samples=2")
    assert [row["prompt"] for row in validate(some, other, model)[1]] == ["a", "a b"], "rows 0 and 5 / 2"
    figures, details = validate(task, other, model)
    assert figures["val_exact_match"] == 0.8 and details[3]["right"] is False
    assert details[3]["prediction"] == "no. 4" and details[3]["score"] == 0.5


def test_the_figures_of_each_kind_and_none(tokenizers, answering):
    model, table = answering
    settings = ("train.seq_len=64", "task.max_new_tokens=12")
    for kind, best, score in (("translation", "val_chrf", 100), ("summaries", "val_rouge_l", 1)):
        task = make("instruct", tokenizers["chat"], *settings, f"task.figures={kind}", "task.generate_samples=1")
        figures, details = validate(task, table, model)
        assert task.best == best
        assert set(figures) == {"calls", *(f"val_{name}" for name in task.figures_of(task.encode(table)))}
        assert figures[best] == pytest.approx(score) and details[0]["score"] == pytest.approx(score)
    task = make("instruct", tokenizers["chat"], *settings, "task.figures=none")
    figures, details = validate(task, table, model, micro_batch_size=5)
    assert figures.pop("calls") == 1 and set(figures) == {"val_loss", "val_accuracy"}
    assert task.best == "val_loss" and details == []


def test_ranks_write_together_what_one_writes_alone(worker):
    """Five prompts, so that one rank has a row more; some end at once; one prompt for two ranks."""
    first, second = worker("written_worker.py")
    assert first == second, "also in how often the model is called, as ZeRO-3 needs"
    model, prompts = tiny_model(), some_prompts()[:5]
    ended = generate_batch(model, prompts, 9, stop_ids=range(50))
    assert first["ids"] == [generate_batch(model, prompts, 9), ended, generate_batch(model, [[7]], 9)]
    assert len({len(ids) for ids in ended}) > 1


def test_a_response_for_every_row(tokenizers, answering, tmp_path):
    model, _ = answering
    task = make("instruct", tokenizers["chat"], "train.seq_len=64", "task.max_new_tokens=12")
    done = []
    table = table_of(tmp_path, *({"prompt": text} for text in QUESTIONS))
    expected = [{"response": f"no. {number}"} for number in range(1, 6)]
    assert task.respond(model, table, 2, done.append) == expected and sum(done) == 5
    talks = [talk(("user", "a")), talk(("user", "bb"), ("assistant", "the last answer is not looked at"))]
    assert task.respond(model, table_of(tmp_path, *talks), 8) == expected[:2]
    with pytest.raises(ValueError, match=r"line 2: the conversation, message 1: it must have a role and a content"):
        task.respond(model, table_of(tmp_path, talks[0], {"messages": ["a"]}), 8)
    long = table_of(tmp_path, {"prompt": "a"}, {"prompt": "a" * 5000})
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: the prompt has 50\d\d tokens, the model \d+ positions"):
        task.respond(model, long, 8)


def test_without_a_template_the_end_of_a_text_ends_a_response(tokenizers, tmp_path):
    tokenizer = tokenizers["pieces"]
    task = make("instruct", tokenizer, "task.max_new_tokens=9")
    model = new_model(task).eval().requires_grad_(False)
    told = task.respond(model, table_of(tmp_path, {"prompt": "Question: "}), 1)
    found = generate_batch(model, [prompt_ids(tokenizer, "Question:")], 9, stop_ids=(tokenizer.eos,))
    assert told == [{"response": tokenizer.decode(found[0]).strip()}] and found[0]
    model.head.weight[tokenizer.eos] = 0
    model.trunk.norm.weight.fill_(1)
    logits = model(torch.tensor([prompt_ids(tokenizer, "Question:")]))[0, -1]
    model.head.weight[tokenizer.eos] = 9 * model.head.weight[int(logits.argmax())]
    assert task.respond(model, table_of(tmp_path, {"prompt": "Question: "}), 1) == [{"response": ""}]
