"""Hugging Face tokenizers: the ids of transformers, every byte counted or none, one file, text that stays text."""

import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

from pretrain.config import compose  # noqa: E402
from pretrain.inference import generate  # noqa: E402
from pretrain.shards import manifest as manifests  # noqa: E402
from pretrain.shards.remote import CacheSettings  # noqa: E402
from pretrain.stream.stream import Stream  # noqa: E402
from pretrain.tokenizer import huggingface  # noqa: E402
from pretrain.tokenizer.texts import TOKENIZER_NAMES  # noqa: E402
from pretrain.tokenizer.tokenizer import TRICKY_TEXTS, Tokenizer, load_tokenizer  # noqa: E402
from tests.data_helpers import spans_by_bytes  # noqa: E402
from tests.forked import ROOT  # noqa: E402
from tests.http_store import serve  # noqa: E402
from tests.models import filled_model  # noqa: E402
from tests.tools.test_write_shards import documents  # noqa: E402
from tools import show_batches, verify_shards, write_shards  # noqa: E402

FILES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
STDLIB = [path.read_text(errors="replace")[:20_000] for path in FILES]
SPACE = "\u2581"


def byte_level() -> tuple:
    """As GPT-2 and SmolLM2: BPE over bytes; one token begins and ends a text, and the tokenizer adds none."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special, letters = ["<|endoftext|>", "<|im_start|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, initial_alphabet=letters)
    made.train_from_iterator(STDLIB, trainer)
    return made, {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}


def word_piece() -> tuple:
    """As BERT: lowercase words and their parts, between [CLS] and [SEP]."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    roles = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    made.train_from_iterator(STDLIB, trainers.WordPieceTrainer(vocab_size=1200, special_tokens=list(roles.values())))
    around = [("[CLS]", made.token_to_id("[CLS]")), ("[SEP]", made.token_to_id("[SEP]"))]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return made, roles


def byte_fallback() -> tuple:
    """As Llama 2: BPE over characters with a space in front, bytes for unknown characters, <s> before a text."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # for the training only
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator([*STDLIB, f"{SPACE} \n"], trainers.BpeTrainer(vocab_size=1000, special_tokens=special))
    content = json.loads(made.to_str())
    vocab = content["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    content["pre_tokenizer"] = None
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


KINDS = {"bytes": byte_level, "words": word_piece, "pieces": byte_fallback}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind, as transformers' save_pretrained writes it."""
    root = tmp_path_factory.mktemp("hugging_face")
    for name, make in KINDS.items():
        made, roles = make()
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def changed(folder: Path, output: Path, change: Callable[[dict, dict], object]) -> Path:
    """A copy of a folder with its tokenizer.json and its config changed."""
    output.mkdir(parents=True)
    contents = [json.loads((folder / name).read_text()) for name in (huggingface.HF_NAME, huggingface.CONFIG_NAME)]
    change(*contents)
    for name, content in zip((huggingface.HF_NAME, huggingface.CONFIG_NAME), contents, strict=True):
        (output / name).write_text(json.dumps(content))
    return output


def test_the_ids_are_those_of_transformers(folders, kind):
    ours, theirs = load_tokenizer(folders[kind]), transformers.AutoTokenizer.from_pretrained(folders[kind])
    assert ours.vocab_size == len(theirs)
    texts = [*TRICKY_TEXTS, *STDLIB[:20]]
    for text in texts:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert not set(ids) & set(ours.special_ids.values()) - {ours.special_ids["unk"]}
    around = theirs("a text")["input_ids"]
    own_suffix = ours.suffix if kind == "words" else []
    assert around == [*ours.prefix, *ours.encode("a text"), *own_suffix]
    expected = ours.encode_batch(texts)
    assert expected == [ours.encode(text) for text in texts] == ours.encode_batch(texts, num_threads=3)
    arrays = ours.encode_arrays(texts)
    assert [array.tolist() for array in arrays] == expected and {array.dtype for array in arrays} == {np.dtype("i4")}


def test_roles_prefix_and_suffix(folders):
    of = {kind: load_tokenizer(folder) for kind, folder in folders.items()}
    assert (of["bytes"].prefix, of["bytes"].suffix, of["bytes"].eos, of["bytes"].mask) == ([], [0], 0, None)
    assert of["bytes"].special_ids == {"unk": 0, "bos": 0, "eos": 0}
    assert (of["words"].prefix, of["words"].suffix, of["words"].eos, of["words"].mask) == ([2], [3], None, 4)
    assert of["words"].special_ids == {"unk": 1, "pad": 0, "mask": 4, "cls": 2, "sep": 3}
    assert (of["pieces"].prefix, of["pieces"].suffix, of["pieces"].eos) == ([1], [2], 2)
    assert all(t.file_name == "hf_tokenizer.json" and t.file_name in TOKENIZER_NAMES for t in of.values())


def test_spans_are_those_of_transformers_and_the_characters_behind_the_ids(folders, kind):
    ours, theirs = load_tokenizer(folders[kind]), transformers.AutoTokenizer.from_pretrained(folders[kind])
    lengths = ours.byte_lengths()
    for text in [*TRICKY_TEXTS, *STDLIB[:10]]:
        ids, spans = ours.encode_spans(text)
        assert ids.dtype == spans.dtype == np.int32 and spans.shape == (len(ids), 2)
        assert ids.tolist() == ours.encode(text)
        settings = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        spans = [*map(tuple, spans.tolist())]
        assert spans == theirs(text, **settings)["offset_mapping"]
        if lengths is not None and text and SPACE not in text:
            behind = lengths[ids]
            behind[0] -= kind == "pieces"  # the space that it puts in front is not in the text
            if behind[0]:
                assert spans == spans_by_bytes(text, behind)


def test_spans_point_into_the_text_before_it_is_normalised(folders):
    words = load_tokenizer(folders["words"])
    ids, spans = words.encode_spans(text := "  DE\u0301F 中\tRETURN, \x00 S\u00c9LF")
    assert [text[start:end] for start, end in spans] == ["DE\u0301F", "中", "RETURN", ",", "S\u00c9LF"]
    assert [words.encode(word) for word in ("def", "中", "return", ",", "self")] == [[id_] for id_ in ids.tolist()]


PAIRS = {
    "[CLS] $A [SEP] $B:1 [SEP]:1": ("words", ["[SEP]"]),  # BERT
    "[CLS] $A [SEP] [SEP] $B [SEP]": ("words", ["[SEP]", "[SEP]"]),  # RoBERTa
    "<s> $A <s> $B": ("pieces", ["<s>"]),  # Llama
    "$A <|endoftext|> $B": ("bytes", ["<|endoftext|>"]),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_are_those_of_transformers(folders, tmp_path, pair):
    kind, between = PAIRS[pair]
    made = tokenizers.Tokenizer.from_file(str(folders[kind] / huggingface.HF_NAME))
    names = {token for token in pair.split() if "$" not in token}
    known = [(name, made.token_to_id(name)) for name in {name.partition(":")[0] for name in names}]
    single = {"words": "[CLS] $A [SEP]", "pieces": "<s> $A", "bytes": "$A"}[kind]
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=known)

    def change(content: dict, config: dict) -> None:
        content["post_processor"] = json.loads(made.to_str())["post_processor"]

    folder = changed(folders[kind], tmp_path / "pair", change)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.between == [made.token_to_id(token) for token in between]
    own_suffix = ours.suffix if kind == "words" else []
    for a, b in (("a text", "b"), (STDLIB[0][:500], STDLIB[1][:500]), ("é 中", "🎉")):
        expected = [*ours.prefix, *ours.encode(a), *ours.between, *ours.encode(b), *own_suffix]
        assert theirs(a, b)["input_ids"] == expected


def test_the_two_separators_of_roberta_and_none_of_gpt2(folders, tmp_path):
    def change(content: dict, config: dict) -> None:
        content["post_processor"] = {"type": "RobertaProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2],
                                     "trim_offsets": True, "add_prefix_space": False}  # fmt: skip

    roberta = load_tokenizer(changed(folders["words"], tmp_path / "roberta", change))
    assert (roberta.prefix, roberta.between, roberta.suffix) == ([2], [3, 3], [3])
    gpt2 = load_tokenizer(folders["bytes"])  # it puts nothing there: two texts would run together
    assert (gpt2.prefix, gpt2.between, gpt2.suffix) == ([], [0], [0])


def test_every_byte_is_counted(folders):
    for kind, more in (("bytes", 0), ("pieces", 1)):
        tokenizer = load_tokenizer(folders[kind])
        lengths = tokenizer.byte_lengths()
        assert tokenizer.is_exact == (kind == "bytes")
        assert lengths.shape == (tokenizer.vocab_size,) and not lengths[list(tokenizer.special_ids.values())].any()
        for text in [*TRICKY_TEXTS, *STDLIB]:
            if text and not (kind == "pieces" and SPACE in text):
                ids = tokenizer.encode(text)
                assert tokenizer.decode(ids) == text
                assert lengths[ids].sum() == len(text.encode()) + more
    words = load_tokenizer(folders["words"])
    assert words.byte_lengths() is None and not words.is_exact


def without(*chars: str) -> Callable:
    def change(content: dict, config: dict) -> None:
        model = content["model"]
        model["merges"] = [pair for pair in model["merges"] if not any(c in part for part in pair for c in chars)]
        kept = [token for token in model["vocab"] if "|" in token or not any(c in token for c in chars)]
        model["vocab"] = {token: i for i, token in enumerate(kept)}

    return change


def added(content: str, **flags) -> Callable:
    """A token that is no special one, after the others."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False) | flags
    return lambda tokenizer, config: tokenizer["added_tokens"].append({"id": 1200, "content": content, **flags})


LOSSES = {
    "lowercase": lambda content, config: content.update(normalizer={"type": "Lowercase"}),
    "nfkc": lambda content, config: content.update(normalizer={"type": "NFKC"}),
    "nfc": lambda content, config: content.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
    "spaces": lambda content, config: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
        content["pre_tokenizer"]]}),
    "stripped": added("<img>", lstrip=True),
    "accent": added("<\u00e9>"),  # of the alphabet of bytes, so the library decodes it as one
    "letter": without("z"),
    "decoder": lambda content, config: content.update(decoder=None),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_what_loses_text_has_no_byte_lengths(folders, tmp_path, loss):
    tokenizer = load_tokenizer(changed(folders["bytes"], tmp_path / "t", LOSSES[loss]))
    assert tokenizer.byte_lengths() is None and not tokenizer.is_exact


def test_control_characters_may_be_unknown_to_a_tokenizer(folders, tmp_path):
    """SmolLM2's vocabulary lacks some: its bits per byte still count all other text."""
    tokenizer = load_tokenizer(changed(folders["bytes"], tmp_path / "t", without("\u0104")))  # byte 4
    lengths, text = tokenizer.byte_lengths(), "a text 中文 🎉\n"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode()) and not tokenizer.is_exact
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"


def test_added_tokens_count_as_their_text(folders, tmp_path):
    """One that is no special token is found in a text, and stands for its own characters."""

    def add(content: dict, config: dict) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        content["model"]["vocab"]["<unused>"] = 1205  # ids of no token before it
        content["added_tokens"] += [{"id": 1201, "content": "<工具>", **flags}]

    tokenizer = load_tokenizer(changed(folders["bytes"], tmp_path / "t", add))
    ids = tokenizer.encode("a <工具> b")
    assert tokenizer.vocab_size == 1206 and 1201 in ids
    assert tokenizer.byte_lengths()[ids].sum() == len("a <工具> b".encode()) and tokenizer.byte_lengths()[1202] == 0
    assert tokenizer.decode([1202, *ids]) == "a <工具> b"


def test_which_tokens_continue_a_word(folders):
    for kind, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        continues = tokenizer.continues_word()
        assert continues.shape == (tokenizer.vocab_size,) and continues.dtype == bool
        assert not continues[list(tokenizer.special_ids.values())].any()
        token = {id_: text for text, id_ in tokenizer._vocab.items()}
        ids = tokenizer.encode("supercalifragilistic (Word) 12 \u4e2d\u6587")
        begins = [token[id_] for id_ in ids if not continues[id_]]
        first = {"bytes": "s", "words": "s", "pieces": SPACE}[kind]
        assert begins[0][0] == first or kind == "bytes"
        text = "".join(token[id_] for id_, goes_on in zip(ids, continues[ids], strict=True) if goes_on)
        assert text and not set(text) & set(f"() Ġ{SPACE}")
        assert any(begin.endswith("(") for begin in begins)
        if kind == "bytes":
            assert continues[tokenizer.encode("\u4e2d")].tolist() == [False, True, True]
        if kind == "words":
            assert text.startswith("##")


def test_it_is_one_file_that_says_who_it_is(folders, kind, tmp_path):
    tokenizer = load_tokenizer(folders[kind])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / tokenizer.file_name).write_bytes(tokenizer.file_bytes)
    reordered = changed(folders[kind], tmp_path / "reordered", lambda content, config: None)
    content = json.loads((reordered / huggingface.HF_NAME).read_text())
    turned = json.dumps(dict(reversed(content.items())), indent=7, ensure_ascii=True)
    (reordered / huggingface.HF_NAME).write_text(turned)
    exported = tmp_path / "exported"
    exported.mkdir()
    for name, data in tokenizer.hf_files(max_positions=64).items():
        (exported / name).write_bytes(data)
    run = tmp_path / "run"
    for path in (run, run / tokenizer.file_name, reordered, exported, exported / huggingface.HF_NAME):
        other = load_tokenizer(path)
        assert (other.sha256, other.file_bytes) == (tokenizer.sha256, tokenizer.file_bytes)
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for text in TRICKY_TEXTS:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text)

    def rename(content: dict, config: dict) -> None:
        vocab = content["model"]["vocab"]
        first, second = (text for text, id_ in vocab.items() if id_ in (500, 501))
        vocab[first], vocab[second] = vocab[second], vocab[first]

    assert load_tokenizer(changed(folders[kind], tmp_path / "other", rename)).sha256 != tokenizer.sha256


def test_special_tokens_map_and_chat_template_travel_along(folders, tmp_path):
    def strip(content: dict, config: dict) -> None:
        for key in [key for key in config if key.endswith("_token")]:
            del config[key]
        config["auto_map"] = {"AutoTokenizer": ["code.py", None]}

    folder = changed(folders["words"], tmp_path / "t", strip)
    named = {"mask_token": {"content": "[MASK]", "lstrip": True}, "sep_token": "[SEP]", "pad_token": "[NONE]"}
    (folder / huggingface.MAP_NAME).write_text(json.dumps(named))
    (folder / huggingface.TEMPLATE_NAME).write_text("{{ messages }}\n")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_ids == {"mask": 4, "sep": 3}
    files = tokenizer.hf_files(64)
    assert files[huggingface.TEMPLATE_NAME] == b"{{ messages }}\n" and b"auto_map" not in files[huggingface.CONFIG_NAME]


@pytest.mark.parametrize("named_by", ["tokenizer_class", "model_type"])
def test_old_folders_name_no_tokens_and_get_those_of_their_class(folders, tmp_path, named_by):
    def strip(content: dict, config: dict) -> None:
        config.clear()
        config.update({"tokenizer_class": "BertTokenizerFast"} if named_by == "tokenizer_class" else {})

    folder = changed(folders["words"], tmp_path / "t", strip)
    if named_by == "model_type":
        (folder / huggingface.CONFIG_NAME).unlink()
        (folder / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(folder).special_ids == load_tokenizer(folders["words"]).special_ids


def test_settings_of_the_file_that_would_change_the_ids_are_off(folders, tmp_path):
    def set_traps(content: dict, config: dict) -> None:
        content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        content["padding"] = {"strategy": {"Fixed": 9000}, "direction": "Right", "pad_to_multiple_of": None,
                              "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
        content["model"]["dropout"] = 0.5

    plain, tokenizer = map(load_tokenizer, (folders["bytes"], changed(folders["bytes"], tmp_path / "t", set_traps)))
    assert tokenizer.encode_batch(STDLIB[:9]) == plain.encode_batch(STDLIB[:9]) == tokenizer.encode_batch(STDLIB[:9])
    assert (tokenizer.prefix, tokenizer.suffix) == (plain.prefix, plain.suffix)


def test_a_special_token_that_only_the_config_calls_so_is_never_found_in_a_text(folders, tmp_path):
    def unmark(content: dict, config: dict) -> None:
        for token in content["added_tokens"]:
            token["special"] = False
        config["extra_special_tokens"] = ["<|im_start|>"]

    tokenizer = load_tokenizer(changed(folders["bytes"], tmp_path / "t", unmark))
    assert not {0, 1} & set(tokenizer.encode("<|endoftext|><|im_start|>"))
    assert tokenizer.decode([0, 1, *tokenizer.encode("text"), 0]) == "text"


def test_other_threads_of_python_run_while_it_encodes(folders):
    tokenizer, ticks = load_tokenizer(folders["bytes"]), []
    texts, done = [*STDLIB * 8], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    encoded = tokenizer._fast.encode_batch_fast(texts, add_special_tokens=False)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert len(encoded) == len(texts)
    assert sum(start + (end - start) * 0.1 < tick < start + (end - start) * 0.9 for tick in ticks) > 3
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(tokenizer.encode_arrays, [STDLIB[i::3] for i in range(3)]))
    expected = tokenizer.encode_batch(STDLIB)
    assert [[ids.tolist() for ids in part] for part in parts] == [expected[i::3] for i in range(3)]


BAD = {
    "slow": (lambda f: (f / "tokenizer.json").unlink(), "holds a slow tokenizer, without tokenizer.json: convert it in "
             "Python with transformers.AutoTokenizer.from_pretrained"),
    "cut": (lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:-100]),
            "is not valid JSON"),
    "list": (lambda f: (f / "tokenizer.json").write_text("[]"), "is not valid JSON .not an object."),
    "deep": (lambda f: (f / "tokenizer.json").write_text("[" * 100_000), "is not valid JSON"),
    "config": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is not valid JSON"),
    "other": (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "none"}}'), "not a tokenizer that the "
              "tokenizers library can read"),
    "half": (lambda f: (f / "tokenizer_config.json").write_text('{"note": "\\ud800"}'), "half characters"),
    "ours": (lambda f: (f / "hf_tokenizer.json").write_text("{}") and (f / "tokenizer.json").unlink(),
             "is not a tokenizer packed by this program"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_with_a_remedy(folders, tmp_path, name):
    folder = changed(folders["bytes"], tmp_path / "t", lambda content, config: None)
    spoil, message = BAD[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


def far(content: dict, config: dict) -> None:
    content["model"]["vocab"]["zzz"] = 10**9


def hole(content: dict, config: dict) -> None:
    content["added_tokens"] += [content["added_tokens"][0] | {"id": 1202, "content": "<late>"}]


def no_end(content: dict, config: dict) -> None:
    del config["eos_token"]


def words_only(content: dict, config: dict) -> None:
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    content["normalizer"] = None


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("bytes", far, r"ids up to 1,000,000,000: most ids have no token"),
        ("bytes", hole, r"has ids of no token: the tokenizers library gives '<late>' the id 1200, not 1202"),
        ("bytes", no_end, "no token that ends a document: name one of its tokens as eos_token"),
        ("words", words_only, r"takes the text '\[\w+\]' for its special token \d"),
        ("bytes", without("a"), "has no token for the letter a"),
    ],
)
def test_bad_vocabularies_are_refused(folders, tmp_path, kind, change, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(changed(folders[kind], tmp_path / "t", change))


def test_without_the_library_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the tokenizers library: .* else pip install 'pretrain\[hf\]'"):
        load_tokenizer(folders["bytes"])


def test_sentencepiece_needs_no_hugging_face_library():
    program = "import sys, pretrain.train; print(sorted({'tokenizers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory) -> dict[str, Path]:
    """Shards of the same texts with each kind, through the tool."""
    root = tmp_path_factory.mktemp("shards")
    (root / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TRICKY_TEXTS, *STDLIB[:12]]))
    for kind, folder in folders.items():
        write_shards.main(["--input", str(root / "in.jsonl"), "--tokenizer", str(folder), "--output", str(root / kind),
                           "--threads", "2", "--chunk-tokens", "3000"])  # fmt: skip
    return {kind: root / kind for kind in folders}


def test_shards_hold_the_documents_and_the_tokenizer(folders, written, kind, capsys):
    manifest, tokenizer = manifests.load(written[kind]), load_tokenizer(folders[kind])
    texts = [text for text in [*TRICKY_TEXTS, *STDLIB[:12]] if text]
    expected = [[*tokenizer.prefix, *tokenizer.encode(text), *tokenizer.suffix] for text in texts]
    assert documents(manifest) == expected
    assert manifest.tokenizer_sha256 == tokenizer.sha256 and manifest.special_ids == tokenizer.special_ids
    assert manifest.tokenizer_path == written[kind] / "hf_tokenizer.json"
    assert load_tokenizer(written[kind]).file_bytes == tokenizer.file_bytes
    verify_shards.main([str(written[kind]), "--deep"])
    assert "all good" in capsys.readouterr().out
    stream = Stream.in_order(manifest, 1000)
    rows = stream.rows(np.arange(3))
    shown = [tokenizer.decode(row[start:end].tolist()) for row in rows.tokens[:, :-1]
             for start, end in show_batches.documents(row, tokenizer)]  # fmt: skip
    assert [tokenizer.decode(ids) for ids in expected[:10]] == shown[:10]


def test_shards_of_it_are_read_from_a_server(written, kind, tmp_path, monkeypatch):
    with serve(written[kind]) as server:
        manifest = manifests.load(server.url, CacheSettings(tmp_path, 10**9))
        assert load_tokenizer(manifest.tokenizer_path).sha256 == manifest.tokenizer_sha256


def test_damage_is_named_and_the_index_is_written_anew(folders, written, kind, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in written[kind].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = manifests.load(folder)
    (folder / "index.json").unlink()
    (folder / "hf_tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.model is not there: name the tokenizer"):
        verify_shards.main([str(folder), "--rebuild"])
    verify_shards.main([str(folder), "--rebuild", "--tokenizer", str(folders[kind]), "--deep"])
    after, said = manifests.load(folder), capsys.readouterr().out
    assert after.tokens == before.tokens and after.tokenizer_sha256 == before.tokenizer_sha256
    assert ("how long the text was is not known" in said) == (kind == "words") == (after.text_bytes == 0)
    (folder / "hf_tokenizer.json").write_bytes(b"{}")
    with pytest.raises(SystemExit):
        verify_shards.main([str(folder)])
    assert "hf_tokenizer.json is damaged: sha256" in capsys.readouterr().out
    other = folders["words" if kind != "words" else "bytes"]
    with pytest.raises(ValueError, match="is not the tokenizer that .*index.json names"):
        verify_shards.main([str(folder), "--rebuild", "--tokenizer", str(other)])


def test_text_is_generated_from_nothing_and_spaces_survive(folders, kind):
    tokenizer: Tokenizer = load_tokenizer(folders[kind])
    overrides = ["run.name=x", "model=llama_tiny", f"model.vocab_size={tokenizer.vocab_size}", "train.seq_len=32"]
    model = filled_model(compose.compose("pretrain", overrides).model, 5).eval()
    prompt = "a word"
    ids = [*tokenizer.prefix, *tokenizer.encode(prompt)]
    sampling = generate.Sampling(temperature=1.0, seed=1)
    text = "".join(generate.continue_text(model, tokenizer, prompt, 20, sampling))
    stop = tokenizer.suffix[-1] if tokenizer.eos is None else tokenizer.eos
    (chosen,) = generate.generate_batch(model, [ids], 20, sampling, stop_ids=[stop])
    assert len(chosen) > 3 and prompt + text == tokenizer.decode([*ids, *chosen])
    from_nothing = "".join(generate.continue_text(model, tokenizer, "", 20, sampling))
    (chosen,) = generate.generate_batch(model, [tokenizer.prefix or [tokenizer.eos]], 20, sampling, stop_ids=[stop])
    assert from_nothing == tokenizer.decode(chosen)
