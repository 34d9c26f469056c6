"""Who does the work: this process, several processes on this machine, or a cluster (by submitit).

`run` calls function(number) once for each number, anywhere; the function leaves its result in a folder that all share.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.cli import how_to_install

CLUSTERS = ("slurm", "local")
POLL_SECONDS = 0.5
QUEUE_SECONDS = 5.0  # between two looks at the queue of the cluster
LOST_SECONDS = 60.0  # a job that left the queue so long ago, and whose outcome is not there, was killed
LOG_LINES = 15
Outcome = tuple[str, int, str] | None  # what went wrong: the kind of error, errno, message

Function = Callable[[int], None]


@dataclass(frozen=True)
class Executor:
    """Where the work is done. `threads` are what a task of a cluster asks for; `options` are submitit's for Slurm."""

    workers: int = 1
    cluster: str | None = None
    threads: int = 1
    partition: str | None = None
    time_minutes: int = 24 * 60
    options: dict[str, str | int | float] = field(default_factory=dict)

    def run(self, function: Function, numbers: Sequence[int], describe: Callable[[int], str], logs: Path) -> None:
        """Do the work on all numbers. The first error ends it: `ValueError`, `OSError`, or `RuntimeError` for a bug."""
        workers = min(self.workers, len(numbers))
        if self.cluster and workers:
            _on_cluster(self, function, [numbers[worker::workers] for worker in range(workers)], logs)
        elif workers > 1:
            _in_processes(function, numbers, describe, workers)
        else:
            for number in numbers:
                function(number)


def _outcome(function: Function, number: int) -> Outcome:
    """Do one piece of work, and say what went wrong, in a form that travels."""
    try:
        function(number)
    except ValueError as error:
        return "value", 0, str(error)
    except OSError as error:
        return "os", error.errno or 0, f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except Exception:
        return "bug", 0, traceback.format_exc()
    return None


def _raise(outcome: Outcome) -> None:
    if outcome is None:
        return
    kind, number, message = outcome
    if kind == "value":
        raise ValueError(message)
    if kind == "os":
        raise OSError(number, message)
    raise RuntimeError(f"a worker failed:\n{message}")


def _in_processes(function: Function, numbers: Sequence[int], describe: Callable[[int], str], workers: int) -> None:
    """Hand the numbers out one by one, each to the process that is free first."""
    context = multiprocessing.get_context("spawn")
    todo = deque(numbers)
    processes = []
    busy = {}  # connection -> (process, number)
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs))
            process.start()
            processes.append(process)
            theirs.close()
            busy[ours] = (process, todo.popleft())
            ours.send(busy[ours][1])
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                process, number = busy.pop(connection)
                try:
                    outcome = connection.recv()
                    following = todo.popleft() if todo else None
                    connection.send(following)
                except (EOFError, ConnectionError):
                    raise _died(process, describe(number)) from None
                _raise(outcome)
                if following is not None:
                    busy[connection] = (process, following)
        for process in processes:
            process.join()
    finally:
        _end(processes)


def _serve(function: Function, connection: multiprocessing.connection.Connection) -> None:
    """A worker: does what it is given until there is no more, or the process that leads is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that leads ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while (number := connection.recv()) is not None:
            connection.send(_outcome(function, number))
    except (EOFError, ConnectionError):
        pass


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _died(process: multiprocessing.Process, what: str) -> ValueError:
    process.join(10)
    code = process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    memory = " (often: out of memory; use fewer --workers)" if code == -signal.SIGKILL else ""
    return ValueError(f"a worker {how}{memory} at {what}: run the same command again to go on")


def _end(processes: list[multiprocessing.Process]) -> None:
    """End what still runs."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


class _Task:
    """What one job of the cluster does: its numbers, one after the other, and then a file with the outcome."""

    def __init__(self, function: Function, numbers: Sequence[int], outcome: Path):
        self.function, self.numbers, self.outcome = function, list(numbers), outcome

    def __call__(self) -> None:
        result = None
        for number in self.numbers:
            result = _outcome(self.function, number)
            if result:
                break
        temporary = self.outcome.with_suffix(".tmp")
        temporary.write_text(json.dumps(result), encoding="utf-8")
        os.replace(temporary, self.outcome)

    def checkpoint(self):
        """submitit calls this before the time limit: the job is queued again, and goes on with what is not finished."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _on_cluster(executor: Executor, function: Function, shares: list[Sequence[int]], logs: Path) -> None:
    """An array of jobs, a share of the numbers each."""
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    tasks = [_Task(function, share, logs / f"outcome-{worker}.json") for worker, share in enumerate(shares)]
    waiting = dict(zip(tasks, _submit(executor, tasks, logs), strict=True))
    patience = LOST_SECONDS if executor.cluster == "slurm" else 2 * POLL_SECONDS
    gone_since: dict[_Task, float] = {}
    looked = time.monotonic()
    try:
        while waiting:
            time.sleep(POLL_SECONDS)
            logs.chmod(logs.stat().st_mode)  # a network disk forgets that a file was not there
            for task in [task for task in waiting if task.outcome.exists()]:
                del waiting[task]
                _raise(json.loads(task.outcome.read_text(encoding="utf-8")))
            now = time.monotonic()
            if executor.cluster == "local" or now - looked >= QUEUE_SECONDS:
                gone_since = {task: gone_since.get(task, now) for task in _gone(executor.cluster, waiting)}
                looked = now
            for task in [task for task, since in gone_since.items() if task in waiting and now - since >= patience]:
                raise _lost(waiting[task])
    except BaseException:
        _cancel(executor.cluster, list(waiting.values()))
        raise


def _submit(executor: Executor, tasks: list[_Task], logs: Path) -> list:
    try:
        import submitit
    except ImportError:
        raise ValueError(f"--cluster needs submitit: {how_to_install('prepare')}") from None
    if executor.cluster == "slurm" and (shutil.which("sbatch") is None or shutil.which("srun") is None):
        raise ValueError("--cluster slurm needs sbatch and srun: run this on a login node of the cluster")
    options = {"partition": executor.partition} if executor.partition else {}
    options |= executor.options
    try:
        queue = submitit.AutoExecutor(logs, cluster=executor.cluster)
        queue.update_parameters(
            name="write_shards", timeout_min=executor.time_minutes, cpus_per_task=executor.threads, nodes=1,
            tasks_per_node=1, stderr_to_stdout=False, **{f"slurm_{key}": value for key, value in options.items()},
        )  # fmt: skip
        with queue.batch():
            jobs = [queue.submit(task) for task in tasks]
    except (NameError, ValueError, TypeError) as error:
        raise ValueError(f"submitit does not take the options for the cluster: {error}") from None
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        message = f"Slurm does not take the job: {str(error).strip()}; see --partition and --cluster-option"
        raise ValueError(message) from None
    print(f"{len(jobs)} jobs of {executor.cluster}: {jobs[0].job_id} ...; logs in {logs}", flush=True)
    return jobs


def _gone(cluster: str, waiting: dict) -> set[_Task]:
    """The tasks whose job is neither running nor queued."""
    if cluster == "local" or not waiting:
        return {task for task, job in waiting.items() if job.done()}
    ids = ",".join(job.job_id for job in waiting.values())
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={ids}"]
    listed = subprocess.run(command, capture_output=True, encoding="utf-8")
    if listed.returncode and "Invalid job id" not in listed.stderr:
        return set()  # Slurm does not answer now
    there = set(listed.stdout.split())
    return {task for task, job in waiting.items() if job.job_id not in there}


def _lost(job) -> ValueError:
    logs = [path for path in (job.paths.stderr, job.paths.stdout) if path.exists() and path.stat().st_size]
    tail = logs[0].read_text(errors="replace", encoding="utf-8").splitlines()[-LOG_LINES:] if logs else []
    text = "\n".join(["", f"the end of {logs[0]}:", *tail]) if tail else f" (it left no log in {job.paths.folder})"
    return ValueError(
        f"job {job.job_id} ended before its work was done (killed, out of memory, or out of time: see --cluster-option "
        f"mem_gb=N, --time-minutes); run the same command again to go on{text}"
    )


def _cancel(cluster: str, jobs: list) -> None:
    if cluster == "slurm" and jobs:
        subprocess.run(["scancel", *{job.job_id.partition("_")[0] for job in jobs}], check=False)
        return
    for job in jobs:
        job.cancel(check=False)
    deadline = time.monotonic() + 10
    while any(not job.done() for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.1)
