"""A SLURM of one node in a folder, of Debian's programs, that is reached from this machine alone.

It needs no accounts and no control groups. Jobs of the partition "urgent" pre-empt those of "main",
which have a grace time to save in.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
START_S = 60
SETTINGS = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmdPort={other_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes={host} PriorityTier=9 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs of SLURM that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


@contextmanager
def node(folder: Path) -> Iterator[dict[str, str]]:
    """A node that runs meanwhile; the environment variables by which its programs are found."""
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    (folder / "slurm.conf").write_text(
        SETTINGS.format(
            folder=folder, host=socket.gethostname().split(".")[0], user=getpass.getuser(),
            port=_free_port(), other_port=_free_port(), cpus=os.cpu_count() or 1,
        )
    )  # fmt: skip
    own = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
    munged = ["munged", "--foreground", "--force"]
    for option, place in (("key-file", "key"), ("seed-file", "seed"), ("pid-file", "pid"),
                          ("log-file", "log")):  # fmt: skip
        munged.append(f"--{option}={folder}/munge/{place}")
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in ([*munged, f"--socket={folder}/munge.sock"], ["slurmctld", "-D", "-c"],
                        ["slurmd", "-D"]):  # fmt: skip
            with (folder / f"{command[0]}.log").open("wb") as log:
                daemons.append(
                    subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
                )
            time.sleep(1)
        _wait_until_idle(own, folder)
        yield own
        subprocess.run(["scancel", "--user", getpass.getuser()], env=os.environ | own, check=True)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_until_idle(own: dict[str, str], folder: Path) -> None:
    command = ["sinfo", "--noheader", "--format=%T", "--partition=main"]
    for _ in range(START_S):
        answer = subprocess.run(
            command, env=os.environ | own, capture_output=True, text=True, check=False
        )
        if answer.stdout.strip() == "idle":
            return
        time.sleep(1)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    raise RuntimeError(f"SLURM does not start: {answer.stdout}{answer.stderr}\n{logs}")
