"""A real Slurm on this host for tests: munge, one controller and two nodes of one folder, stopped by process id."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
INSTALL = "apt-get install slurm-wlm munge slurmctld slurmd"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=10
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def why_not() -> str | None:
    """The reason why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if program(name) is None]
    if missing:
        return f"Slurm is not installed (no {', '.join(missing)}): {INSTALL}"
    return None if os.geteuid() == 0 else "a cluster of its own needs root"


def free_ports() -> tuple[int, int, int]:
    """The controller's port, and two adjacent ones for the nodes (the configuration names them as a range)."""
    while True:
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            try:
                a.bind(("127.0.0.1", 0))
                b.bind(("127.0.0.1", 0))
                c.bind(("127.0.0.1", b.getsockname()[1] + 1))
            except (OSError, OverflowError):
                continue
            return a.getsockname()[1], b.getsockname()[1], c.getsockname()[1]


class SlurmCluster:
    """`with SlurmCluster(folder) as cluster:` two nodes, n1 and n2, of two CPUs each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = dict(os.environ, SLURM_CONF=str(folder / "slurm.conf"))
        self.daemons: list[tuple[str, subprocess.Popen]] = []

    def __enter__(self) -> "SlurmCluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        host = socket.gethostname().partition(".")[0]
        ports = free_ports()
        (self.folder / "slurm.conf").write_text(CONF.format(host=host, ports=ports, folder=self.folder))
        (munge / "key").write_bytes(secrets.token_bytes(64))
        (munge / "key").chmod(0o400)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={munge / v}" for k, v in files.items()))
        self._until(lambda: (munge / "socket").exists(), "munge's socket")
        conf = ("-D", "-f", self.env["SLURM_CONF"])
        self._daemon("slurmctld", "-c", *conf)
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-N", node, *conf)
        self._until(lambda: self._idle_nodes() == 2, "two idle nodes")

    def __exit__(self, *_) -> None:
        """Cancel what still runs (its processes are not the daemons' children), then stop the daemons, newest first."""
        try:
            if len(self.daemons) > 1:
                self.run("scancel", "--user=root")
                self._until(lambda: not self.run("squeue", "--noheader"), "the end of all jobs", 60)
        except (AssertionError, subprocess.SubprocessError):
            self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        finally:
            for _, daemon in reversed(self.daemons):
                daemon.terminate()
                try:
                    daemon.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            self.daemons.clear()

    def run(self, *command: str, check: bool = True, **options) -> str:
        """A Slurm command on this cluster; its standard output."""
        done = subprocess.run(
            command, env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, **options
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """sbatch; returns the number of the job."""
        variables = ",".join(["ALL", *(f"{key}={value}" for key, value in (env or {}).items())])
        return self.run("sbatch", "--parsable", f"--export={variables}", *arguments, cwd=cwd)

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by name: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str) -> dict[str, str]:
        """Wait for the end of a job."""
        self._until(lambda: self.show(job)["JobState"] in ENDED, f"the end of job {job}")
        return self.show(job)

    def start_requeued_now(self, job: str, restarts: int = 1) -> None:
        """Wait until a job is queued again and has left its nodes; then start it without Slurm's two minutes' wait."""

        def queued() -> bool:
            shown = self.show(job)
            assert shown["JobState"] not in ENDED, shown
            return int(shown["Restarts"]) == restarts and shown["JobState"] == "PENDING" and self._idle_nodes() == 2

        self._until(queued, f"job {job} to be queued again")
        time.sleep(1)  # a late message of the ended batch script would fail the new one
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}-{len(self.daemons)}.out").open("wb") as output:
            command = [program(name), *arguments]
            daemon = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.daemons.append((name, daemon))

    def _idle_nodes(self) -> int:
        return self.run("sinfo", "--noheader", "--Node", "--format=%t", check=False).split().count("idle")

    def _until(self, done, what: str, timeout: float = 600) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            for name, daemon in self.daemons:
                assert daemon.poll() is None, f"{name} ended: {self._logs()}"
            assert time.monotonic() < deadline, f"waited {timeout} s for {what}: {self._logs()}"
            time.sleep(0.2)

    def _logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out"), *self.folder.glob("munge/log")]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)
