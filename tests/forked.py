"""Programs of this project without the seconds of their imports: a process imports once and forks each launch.

    subprocess.run(forked.program("-m", "pretrain.train", "run.name=x"), env=forked.ENVIRONMENT)

A forked program has the arguments, environment, working directory, files, signals and exit code of its launch; with
`ranks=2` there are two of it, as under torchrun: when one fails the others are ended, and the exit code is 1. Whatever
ends the launch or the tests ends what was forked.

Another module or file is run by a Python of its own, and so is a launch whose environment differs in what is decided
while importing (`FIXED`). The seed of hashes is the same in all that is forked.

Three processes: the launch (`launch`, the command line that `program` gives), the server that imports (`serve`, one for
a test run, started at its first use), and between them one that starts the ranks and waits (`supervise`).
"""

import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXED = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
GRACE_SECONDS = 30  # between SIGTERM and SIGKILL for the ranks that are left, as torchrun's
MODULES = (
    "pretrain.train", "pretrain.finetune", "pretrain.hub.reference", "pretrain.evaluation.harness",
    "torch.distributed.run", "deepspeed.launcher.runner", "deepspeed.launcher.launch",
)  # fmt: skip
PRELOADED = (
    "deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "matplotlib.backends.backend_svg",
    "torch._dynamo", "torch._inductor.compile_fx", "transformers.models.auto.modeling_auto", "wandb",
    "pretrain.train", "pretrain.finetune", "pretrain.predict", "torch.distributed.run", "deepspeed.launcher.launch",
)  # fmt: skip
FAILED = 70  # the exit code where no program was started
# What training processes of tests run in: this checkout's code, one thread a rank, no GPU.
ENVIRONMENT = os.environ | FIXED | {
    "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
}  # fmt: skip


# In the process of the tests


def program(*argv: object, ranks: int = 1) -> list[str]:
    """The command line that does what `python *argv` would, or torchrun on some ranks, with this checkout's code."""
    several = [] if ranks == 1 else ["--ranks", str(ranks)]
    return [sys.executable, "-IS", __file__, server(), *several, *map(str, argv)]


@functools.cache
def server() -> str:
    """The path of the server's socket, when it has imported everything; started now where none was."""
    folder = Path(os.environ.get("FORKED") or start_server())
    while not (folder / "python").exists():
        assert (folder / "errors").exists() and not (folder / "failed").exists(), (folder / "errors").read_text()
        time.sleep(0.05)
    return str(folder / "socket")


def start_server(modules: tuple[str, ...] = PRELOADED) -> Path:
    """Start the server of this process and of those that it starts (by `FORKED`); returns its folder.

    It ends, and the folder with it, when this process ends.
    """
    import atexit
    import shutil
    import subprocess
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    os.environ["FORKED"] = str(folder)
    with open(folder / "errors", "wb") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(folder), *modules], cwd=ROOT, env=ENVIRONMENT, stderr=file,
            stdin=subprocess.PIPE,
        )  # fmt: skip

    def stop() -> None:
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    return folder


def python() -> Path:
    """A program to be found as `python`: it forks what `program` would."""
    return Path(server()).with_name("python")


def ranks_of(launch: int) -> list[int]:
    """The process ids of the ranks of a running launch, by the process id of its command line."""
    return [int(pid) for pid in (Path(server()).parent / str(launch)).read_text().split()]


# In the launch


def launch(path: str, argv: list[str]) -> None:
    """Hand everything to the server, pass signals on, end as the program ends."""
    ranks = 1
    if argv[:1] == ["--ranks"]:
        ranks, argv = int(argv[1]), argv[2:]
    if argv[:1] == ["-u"]:  # as torchrun starts its ranks
        os.environ["PYTHONUNBUFFERED"], argv = "1", argv[1:]
    if not is_ours(argv) or any(os.environ.get(name) != value for name, value in FIXED.items()):
        assert ranks == 1, f"{argv[:2]}, in this environment, is not forked"
        os.execv(sys.executable, [sys.executable, *argv])
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    facts = {"argv": argv, "env": dict(os.environ), "cwd": os.getcwd(), "ranks": ranks, "pid": os.getpid(),
             "ignored": ignored}  # fmt: skip
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    request = json.dumps(facts).encode()
    socket.send_fds(client, [len(request).to_bytes(8, "big")], [0, 1, 2])
    client.sendall(request)
    answers = client.makefile("rb")
    pids = json.loads(answers.readline() or b"[]")
    for number in set(FORWARDED) - set(ignored):
        signal.signal(number, lambda number, frame: [os.kill(pid, number) for pid in pids])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = json.loads(answers.readline() or str(FAILED))
    if code < 0:  # a signal ended the program: let it end this one too
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def is_ours(argv: list[str]) -> bool:
    """Whether Python is asked for one of `MODULES`, for code, for a tool or for a worker of the tests."""
    if argv[:1] == ["-m"]:
        return argv[1] in MODULES
    if argv[:1] == ["-c"]:
        return True
    path = Path(argv[0]).resolve() if argv else ROOT
    return path.suffix == ".py" and path.parent.name in ("tools", "dist") and path.is_file()


# In the server


def serve(folder: Path, modules: list[str]) -> None:
    """Import, then fork a supervisor for each launch, until the standard input is closed: the tests are over."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
    try:
        import_everything(modules)
    except BaseException:
        (folder / "failed").touch()
        raise
    gc.collect()
    gc.freeze()  # what is imported is garbage in no launch: DeepSpeed collects several times at its start
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket"))
    listening.listen(64)
    starting = folder / "starting"
    starting.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {folder}/socket "$@"\n')
    starting.chmod(0o755)
    starting.rename(folder / "python")  # now it can be used
    while True:
        ready, _, _ = select.select([listening, 0], [], [], 1.0)
        while reaped():
            pass
        if 0 in ready:
            os._exit(0)
        if listening in ready:
            client, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                supervise(client, folder)
            client.close()


def import_everything(modules: list[str]) -> None:
    """What the programs import, what comes in late, and nothing that starts a thread."""
    for name in modules:
        importlib.import_module(name)
    if compose := sys.modules.get("pretrain.config.compose"):
        compose.compose("pretrain", ["run.name=x"])  # Hydra finds its plugins
    if deepspeed := sys.modules.get("deepspeed"):
        assert deepspeed.ops.__compatible_ops__  # DeepSpeed finds out what it could build
    for name in MODULES:  # runpy wants to import them itself
        sys.modules.pop(name, None)


def reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def supervise(client: socket.socket, folder: Path) -> None:
    """Between the launch and its ranks: start them, wait, tell the exit code."""
    head, files, _, _ = socket.recv_fds(client, 8, 3)
    request = json.loads(client.makefile("rb").read(int.from_bytes(head, "big"))) | {"python": str(folder / "python")}
    port = free_port()
    pids = {start_rank(request, rank, files, port, client) for rank in range(request["ranks"])}
    for handle in files:
        os.close(handle)
    listed = folder / str(request["pid"])
    listed.write_text(" ".join(map(str, sorted(pids))))
    try:
        client.sendall(json.dumps(sorted(pids)).encode() + b"\n")
        code = wait_for(pids, client)
        listed.unlink()
        client.sendall(json.dumps(code).encode() + b"\n")
    except OSError:
        end(pids, signal.SIGKILL)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(pids: set[int], client: socket.socket) -> int:
    """The exit code of a launch; `pids` are those that still run. When the launch or the tests are gone, they end."""
    alone, code, patience = len(pids) == 1, 0, GRACE_SECONDS / 0.005
    while pids:
        if select.select([client, 0], [], [], 0.005)[0]:
            end(pids, signal.SIGKILL)
            os._exit(0)
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                pids.discard(pid)
                found = os.waitstatus_to_exitcode(status)
                if found and not code:
                    code = found if alone else 1
                    end(pids, signal.SIGTERM)
        patience -= bool(code)
        if patience < 0:
            end(pids, signal.SIGKILL)
    return code


def end(pids: set[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


# In a rank


def start_rank(request: dict, rank: int, files: list[int], port: int, client: socket.socket) -> int:
    """Fork one program; returns its process id to the supervisor."""
    pid = os.fork()
    if pid:
        return pid
    client.close()
    code = 1
    try:
        become(request, rank, files, port)
        code = run(request["argv"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def become(request: dict, rank: int, files: list[int], port: int) -> None:
    """Take on what a new process would have of its launch."""
    for number, handle in enumerate(files):
        os.dup2(handle, number)
        os.close(handle)
    os.environ.clear()
    os.environ.update(request["env"])
    if request["ranks"] > 1:
        world = str(request["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    os.chdir(request["cwd"])
    sys.executable = request["python"]  # what it starts is forked too
    for number in FORWARDED:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    sys.stdin = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")
    searched = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in searched if folder and folder not in sys.path]


def run(argv: list[str]) -> int:
    """Run a module or a file as `__main__` to its end; its exit code."""
    import atexit
    import runpy
    import threading

    code = 0
    try:
        if argv[0] == "-m":
            sys.argv, sys.path[0] = argv[1:], os.getcwd()
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *argv[2:]], ""
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = argv, str(Path(argv[0]).resolve().parent)
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = 1
        if isinstance(error, KeyboardInterrupt):
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.path[0] = str(ROOT)
        serve(Path(sys.argv[2]), sys.argv[3:])
    else:
        launch(sys.argv[1], sys.argv[2:])
