"""A real Slurm on this machine, for tests: two virtual nodes, `cn1` with CPUs and `gn1` with two GPUs that exist by name only.

It needs root, the Debian packages slurm-wlm and munge, and /etc/slurm without a configuration of its own: Slurm's programs look
there, whatever the environment of a job says. Jobs, limits, signals and schedules are Slurm's own.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
ETC = Path("/etc/slurm")
CONFIGURATION = """
ClusterName=testbed
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ctld_port}
SlurmctldPidFile={state}/run/slurmctld.pid
SlurmdPidFile={state}/run/slurmd-%n.pid
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/d-%n
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,batch_sched_delay=1,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
JobCompType=jobcomp/filetxt
JobCompLoc={state}/log/jobcomp.log
MinJobAge=3600
DefMemPerCPU=1000
KillWait=30
SlurmctldTimeout=120
SlurmdTimeout=120
OverTimeLimit=0
SlurmdParameters=config_overrides
NodeName=cn1 NodeHostname={host} NodeAddr=127.0.0.1 Port={cn1_port} CPUs=16 CoresPerSocket=16 RealMemory=64000 State=UNKNOWN
NodeName=gn1 NodeHostname={host} NodeAddr=127.0.0.1 Port={gn1_port} CPUs=8 CoresPerSocket=8 RealMemory=64000 Gres=gpu:h100:2 State=UNKNOWN
PartitionName=cpu Nodes=cn1 Default=YES MaxTime=60 DefaultTime=5 State=UP
PartitionName=gpu Nodes=gn1 MaxTime=60 DefaultTime=5 State=UP
"""


def missing() -> str | None:
    """Return why no cluster can be started here, or None."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"needs Slurm ({', '.join(absent)} not found): apt-get install -y --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "needs root, to start Slurm's daemons"
    if any((ETC / name).exists() for name in ("slurm.conf", "gres.conf")):
        return f"{ETC} has a configuration already: this machine belongs to a cluster"
    return None


class Cluster:
    """Slurm's daemons with all their files in one folder."""

    def __init__(self) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def __enter__(self) -> "Cluster":
        for name in ("run", "log", "ctld", "d-cn1", "d-gn1", "dev"):
            (self.state / name).mkdir()
        for number in (0, 1):  # Slurm counts character devices; these are /dev/null's
            os.mknod(self.state / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        ports = dict(zip(("ctld_port", "cn1_port", "gn1_port"), free_ports(3), strict=True))
        host = socket.gethostname().partition(".")[0]
        (self.state / "slurm.conf").write_text(CONFIGURATION.format(state=self.state, host=host, **ports))
        gpus = f"NodeName=gn1 Name=gpu Type=h100 File={self.state}/dev/nvidia[0-1] Flags=nvidia_gpu_env\n"
        (self.state / "gres.conf").write_text(f"AutoDetect=off\n{gpus}")
        ETC.mkdir(exist_ok=True)
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)  # missing() saw to it that nothing but a dangling link of ours is there
            (ETC / name).symlink_to(self.state / name)
        (self.state / "munge.key").write_bytes(os.urandom(128))
        (self.state / "munge.key").chmod(0o600)
        try:
            files = {"socket": "munge.socket", "key-file": "munge.key", "seed-file": "munge.seed", "pid-file": "run/munged.pid"}
            options = [f"--{option}={self.state / name}" for option, name in (files | {"log-file": "log/munged.log"}).items()]
            self.run("munged", "--force", *options)
            self.start_controller()
            for node in ("cn1", "gn1"):
                self.run("slurmd", "-N", node)
            self.wait(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user", "root", "--signal=KILL", "--full"], env=self.environment, capture_output=True, timeout=60)
        for name in ("slurmd-cn1", "slurmd-gn1", "slurmctld", "munged"):
            self.stop(name)
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def start_controller(self) -> None:
        """Start slurmctld, also again after a stop: it finds its jobs in its state folder."""
        self.run("slurmctld")

    def stop(self, name: str) -> None:
        """Stop a daemon by its pid file and wait until it is gone."""
        pid_file = self.state / "run" / f"{name}.pid"
        if not pid_file.is_file():
            return
        pid = int(pid_file.read_text())
        try:
            os.kill(pid, 15)
            self.wait(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {name}", seconds=30)
        except ProcessLookupError:
            pass

    def run(self, *words: str) -> str:
        """Run one of Slurm's commands; return its output."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self, *states: str) -> list[dict]:
        """Return the jobs that Slurm knows, also finished ones: id, state, node, name, comment (rule and wildcards), GPUs."""
        fields = {"id": "JobID", "state": "State", "node": "NodeList", "name": "Name", "comment": "Comment", "gpus": "tres-per-job"}
        form = ",".join(f"{field}:200" for field in fields.values())
        lines = self.run("squeue", "--noheader", "--states=all", f"--Format={form}").splitlines()
        rows = [dict(zip(fields, (line[i * 200 : (i + 1) * 200].strip() for i in range(len(fields))), strict=True)) for line in lines]
        return [row for row in rows if not states or row["state"] in states]

    @staticmethod
    def wait(condition, what: str, seconds: float = 60) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return TCP ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
