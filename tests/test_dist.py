"""Rank and world from the environment: what no launcher sets is refused in words, and so is a port that is taken."""

import importlib
import os
import socket
import subprocess

import pytest
import torch

import pretrain.engine
from pretrain import dist
from tests.conftest import command

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.fixture
def setting(monkeypatch):
    def set_all(said: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in said.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_what_launchers_say_is_taken(setting):
    setting({})
    assert dist.from_environment(is_launched=True) == dist.ALONE
    setting(WHOLE)
    assert dist.from_environment(is_launched=True) == dist.Ranks(1, 4, 0)
    setting({"WORLD_SIZE": "4"})
    assert dist.from_environment() == dist.Ranks(0, 4, 0), "a check for four ranks, before there are any"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"RANK": "0"}, "RANK=0 in the environment, without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 in the environment, without RANK, LOCAL_RANK"),
        ({**WHOLE, "RANK": "node-3"}, "RANK=node-3 in the environment is no whole number: start the run with"),
        ({**WHOLE, "WORLD_SIZE": "1"}, "RANK=1 and WORLD_SIZE=1 in the environment do not fit"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK= in the environment is no whole number"),
    ],
)
def test_what_was_left_over_is_named(setting, said, message):
    setting(said)
    with pytest.raises(ValueError, match=message) as refused:
        dist.from_environment(is_launched=True)
    assert "unset RANK WORLD_SIZE LOCAL_RANK" in str(refused.value)


@pytest.mark.parametrize("said", ["0", "ten", "1.5", ""])
def test_a_step_timeout_is_a_number_of_seconds(monkeypatch, said):
    monkeypatch.setenv("PRETRAIN_STEP_TIMEOUT", said)
    with pytest.raises(ValueError, match=f"PRETRAIN_STEP_TIMEOUT={said} in the environment is no number of seconds"):
        dist.from_environment()


@pytest.mark.parametrize(("seen", "local_rank", "index"), [(1, 0, 0), (1, 7, 0), (8, 3, 3), (8, 7, 7)])
def test_a_rank_has_the_gpu_that_it_sees(monkeypatch, seen, local_rank, index):
    """srun --gpus-per-task=1 shows each rank one GPU, and counts LOCAL_RANK on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert dist.device_of(dist.Ranks(local_rank, 8, local_rank)) == torch.device("cuda", index)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"LOCAL_RANK=5, and this rank sees 4 GPUs: start at most 4 ranks .*NPROC=4"):
        dist.device_of(dist.Ranks(5, 8, 5))
    apart = [["n1", "GPU-a"], ["n1", "GPU-b"], ["n2", "GPU-a"]]
    assert dist.shared_gpus(apart) is None
    assert dist.shared_gpus([*apart, ["n1", "GPU-b"]]).startswith("ranks 1, 3 have the same GPU on n1: start one rank")


@pytest.mark.parametrize("there", [True, False])
def test_the_accelerator_is_where_torch_puts_tensors(monkeypatch, there):
    """Whatever devices files there are, and however they are called."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    importlib.reload(pretrain.engine)
    assert os.environ["DS_ACCELERATOR"] == ("cuda" if there else "cpu")


def test_deepspeed_takes_the_device_that_was_chosen(monkeypatch):
    """It would take LOCAL_RANK as it is; the process group needs the card, so its start is left out."""
    for name, value in {**WHOLE, "LOCAL_RANK": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist.torch_dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "gpu_id", lambda device: "GPU-a")
    assert dist.start(dist.Ranks(7, 8, 7)) == torch.device("cuda", 0) and os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize("said", [None, "ib0"])
def test_gloo_takes_the_interface_that_leads_to_the_master(monkeypatch, said):
    for name, value in {**WHOLE, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", said or "")
    if said is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(dist.torch_dist, "init_process_group", lambda *_, **__: None)
    dist.start(dist.Ranks(1, 4, 0))
    assert os.environ["GLOO_SOCKET_IFNAME"] == (said or "lo")


def test_the_trainer_refuses_in_one_line(environment):
    for said in ({"RANK": "0"}, {"RANK": "node-3"}):
        done = subprocess.run(command(1, "run.name=x"), env=environment | said, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: RANK=") and done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_named(train, environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        line = command(1, f"run.root={train.root}", "run.name=port", f"data.train={train.shards}")
        env = environment | launched | {"MASTER_PORT": str(port)}
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: MASTER_PORT={port} is in use on this host, perhaps by another run" in done.stderr
    assert not (train.root / "port").exists()


def test_sockets_do_not_grow_as_ranks_times_groups(worker):
    """A rank speaks with its neighbours in a ring and, in trees, with one rank more at twice as many."""
    found = {ranks: worker("sockets_worker.py", ranks=ranks) for ranks in (2, 4, 8)}
    assert all(rank["raised"] and rank["groups"] == 2 for ranks in found.values() for rank in ranks)
    most = {ranks: max(rank["sockets"] for rank in each[1:]) for ranks, each in found.items()}
    assert most[8] - most[4] <= 2 + 2 and most[8] < 2 * 8, most
    assert found[8][0]["sockets"] <= most[8] + 8 + 2, "rank 0 has a connection of the store with each"
