"""What `data.val` names: one set or several, with names of their own or those of their folders and files."""

import pytest

from pretrain.config import compose
from pretrain.config.held_out import by_set, column, held_out_sets, parted, split_name


@pytest.mark.parametrize("val, expected", [
    (None, []),
    ([], []),
    ("/d/news", [("", "/d/news")]),
    ("news=/d/news", [("news", "/d/news")]),
    (["s3://b/my-web/", "x/val.jsonl"], [("my-web", "s3://b/my-web/"), ("val", "x/val.jsonl")]),
    (["x/v.2.csv.gz", "/d/folder.v2"], [("v.2", "x/v.2.csv.gz"), ("folder.v2", "/d/folder.v2")]),
    (["a.1=/d/x", "новости=/d/x"], [("a.1", "/d/x"), ("новости", "/d/x")]),
    (["/d/web"], [("web", "/d/web")]),
])  # fmt: skip
def test_a_set_is_called_by_its_name_or_by_its_place(val, expected):
    assert held_out_sets(val) == expected


def test_a_name_is_plain_and_nothing_is_there_under_the_whole_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_name("a=b") == ("a", "b") and split_name("a=b=c") == ("a", "b=c")
    (tmp_path / "a=b").mkdir()
    assert split_name("a=b") == ("", "a=b"), "what is there is a place"
    for place in ("./a=c", "/d/a=b", "a b=c", "=c", "a=", "https://x/?a=b", "a"):
        assert split_name(place) == ("", place)


@pytest.mark.parametrize("val, said", [
    ("[/a/val,/b/val]", r"data.val has two sets called val, /a/val and /b/val: .* as \[one=/a/val,other=/b/val\]"),
    ("[x=/a,x=/b]", r"two sets called x, /a and /b"),
    ("[/a/my news,/b]", r"data.val: /a/my news needs a name of letters, .*: write NAME=/a/my news"),
    ("[/a,'']", r"data.val=\['/a', ''\] must be a path or URL, or a list of them: .*\[news=a,web=b\]"),
])  # fmt: skip
@pytest.mark.parametrize("entry", ["pretrain", "finetune"])
def test_names_that_do_not_tell_sets_apart_are_refused(entry, val, said):
    with pytest.raises(ValueError, match=said):
        compose.compose(entry, ["run.name=x", f"data.val={val}"])


def test_figures_are_told_by_their_columns():
    assert column("", "loss") == "val_loss" and column("my_web", "macro_f1") == "val_my_web/macro_f1"
    assert parted("val_my_web/macro_f1") == ("my_web", "macro_f1") and parted("val_loss") == ("", "loss")
    columns = ["step", "val_a/loss", "val_loss", "val_b/loss", "val_a/f1"]
    assert by_set(columns) == {"a": {"loss": "val_a/loss", "f1": "val_a/f1"}, "": {"loss": "val_loss"},
                               "b": {"loss": "val_b/loss"}}  # fmt: skip
