"""Where copies and plans are kept, also for a user without a home."""

import os
import pwd
from pathlib import Path

import pytest

from pretrain.config import compose
from pretrain.stream import opening, packing


def data(*overrides: str):
    return compose.compose("pretrain", ["run.name=x", *overrides]).data


def test_a_user_without_a_home_needs_none_for_local_windows(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert opening.cache_folder(data()) == Path("/home/me/.cache/pretrain")

    def nobody(uid: int):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert opening.cache_folder(data()) is None and opening.cache_settings(data()) is None
    assert opening.cache_folder(data("data.cache=/there")) == Path("/there")
    with pytest.raises(ValueError, match="set data.cache to one with room"):
        packing.BestFit(None, 8, False, opening.cache_folder(data()))


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder in which nobody can make one")
def test_a_cache_that_cannot_be_made_names_its_key():
    plans = packing.Plans.__new__(packing.Plans)
    plans._folder = Path("/proc/cache")
    with (
        pytest.raises(ValueError, match="cannot make the cache folder /proc/cache .*: set data.cache"),
        plans._locked(),
    ):
        pass
