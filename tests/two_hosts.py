"""Two hosts on one machine: `python tests/two_hosts.py FOLDER` trains across two network namespaces.

Each host is a process in a network namespace of its own with one end of a veth pair; nothing else connects them, and
they share no output folder. On each runs the engine of `torchrun --nnodes=2 --rdzv_backend=c10d` with one trainer.
The namespaces are anonymous: they, and the pair, vanish with their processes, whatever happens. Without root rights
they are made inside a user namespace, where the system allows that.

Prints one JSON object: how each start ended. Exit code 77: the rights or tools for it are not there (the last line
says which).
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.fault_injection import Fault
from bench.faults import Ended, Sandbox, fork, make_shards, rank_of_agent, wait

NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
SKIP = 77


def unshare(flags: int) -> None:
    """Leave this process's namespaces for new ones. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def allow_namespaces() -> None:
    """Make it possible to make network namespaces: as root it is, else inside a user namespace. Raises OSError."""
    if os.geteuid() == 0:
        return
    uid, gid = os.getuid(), os.getgid()
    unshare(NEW_USER | NEW_NETWORK)
    for name, text in {"setgroups": "deny", "uid_map": f"0 {uid} 1", "gid_map": f"0 {gid} 1"}.items():
        Path(f"/proc/self/{name}").write_text(text)


def ip(*words: str) -> None:
    """The `ip` command. Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def host(number: int, ready: int, go: int, box: Sandbox, more: list[str], fault: Fault | None) -> int:
    """In a child: a host that waits for its cable, then starts its share of the run."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    unshare(NEW_NETWORK)
    os.write(ready, b"x")
    os.read(go, 1)
    for words in (f"addr add {ADDRESSES[number]}/24 dev veth", "link set veth up", "link set lo up"):
        ip(*words.split())
    os.environ["GLOO_SOCKET_IFNAME"] = "veth"
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{ADDRESSES[0]}:{PORT}",
        run_id="two-hosts",
        local_addr=ADDRESSES[number],
        rdzv_configs={"is_host": number == 0},
    )
    try:
        elastic_launch(config, rank_of_agent)(box.arguments(*more), fault, box.folder)
    except ChildFailedError as error:
        return max(failure.exitcode for failure in error.failures.values()) or 1
    return 0


def two_hosts(boxes: list[Sandbox], *more: str, fault: Fault | None = None) -> list[Ended]:
    """One start of the run on both hosts, each with a folder of its own."""
    ready, go, held = os.pipe(), os.pipe(), []
    outputs = [box.folder / f"output-{time.monotonic_ns()}" for box in boxes]
    work = [lambda n=n: host(n, ready[1], go[0], boxes[n], list(more), fault) for n in (0, 1)]
    children = [fork(job, output) for job, output in zip(work, outputs)]
    try:
        for _ in children:
            os.read(ready[0], 1)
        # Hold both namespaces until both hosts have ended. The pair vanishes with the first of them, and with it the
        # other host's own address, on which that host may still be talking to itself: no real host loses its network
        # card because another one is done.
        held = [os.open(f"/proc/{child}/ns/net", os.O_RDONLY) for child in children]
        ip(*f"link add veth netns {children[0]} type veth peer name veth netns {children[1]}".split())
        os.write(go[1], b"xx")
        return [wait(child, output) for child, output in zip(children, outputs)]
    finally:
        for end in (*ready, *go, *held):
            os.close(end)


def main(folder: Path) -> int:
    """Two hosts undisturbed; stopped by a signal to the second one and resumed; one host; more ranks than sequences."""
    if shutil.which("ip") is None:
        print("the `ip` command is not installed")
        return SKIP
    try:
        allow_namespaces()
        probe = fork(lambda: unshare(NEW_NETWORK) or 0, folder / "probe")
        if wait(probe, folder / "probe").code != 0:
            raise PermissionError("network namespaces cannot be made here (root or user namespaces are needed)")
    except OSError as error:
        print(error)
        return SKIP
    import train_gpt  # before the forks, and the program's files are parsed before them, too
    from trainer.program import program_files

    program_files(train_gpt.__file__)

    starts = {}
    boxes = {name: Sandbox(folder / name) for name in ("whole-0", "whole-1", "stopped-0", "stopped-1", "one", "cut")}
    for box in boxes.values():
        make_shards(box.folder / "shards")
    boxes["one"].nproc = boxes["cut"].nproc = 2
    starts["one host"] = [boxes["one"].start()]
    starts["more processes than sequences"] = [boxes["cut"].start("--train_seq_len=256")]
    starts["two hosts"] = two_hosts([boxes["whole-0"], boxes["whole-1"]])
    stopped = [boxes["stopped-0"], boxes["stopped-1"]]
    fault = Fault("SIGTERM", "in a step, before the update", call=5, rank=1)
    starts["stopped"] = two_hosts(stopped, "--resume=auto", fault=fault)
    starts["resumed"] = two_hosts(stopped, "--resume=auto")
    told = {name: [(end.code, end.output[-3000:]) for end in ends] for name, ends in starts.items()}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main(Path(sys.argv[1])))
