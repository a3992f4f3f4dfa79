"""``haste doctor``: what a run would stumble over, before it starts.

It joins the cluster that ``haste train`` would use, looks at each of its machines, lets them connect to each other and sums a tensor
over all GPUs (over all machines where there is none). A line a finding; one that begins with FAIL or slow says what to do. Exit status 1
when one failed.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haste_dist.config import Config
from haste_dist.errors import HasteError
from haste_launch import doctor_node
from haste_launch.doctor_node import MIB, Facts
from haste_launch.ray_session import ray_session
from haste_launch.ray_train import absolute_paths

OK, SLOW, FAIL = "ok", "slow", "FAIL"
ANSWER_SECONDS = 60.0
SKEW_SECONDS = 1.0
LITTLE_DISK, LITTLE_SHARED = 2 * 2**30, 256 * MIB
OLD_LOCK_SECONDS = 600.0  # no extension takes so long to build
BUSY_MIB = 1024
MIB_ON_GPU, MIB_ON_CPU = 256, 8
LEAST_GB = 5.0  # an NCCL all-reduce below this many GB/s went by way of plain Ethernet


@dataclass(frozen=True)
class Finding:
    """One line of the answer; ``todo`` is empty where all is well."""

    level: str
    what: str
    where: str
    said: str
    todo: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<5}{self.what:<9}{self.where:<17}{self.said}"
        return f"{line}: {self.todo}" if self.todo else line


def doctor(config: Config) -> int:
    """Prints the findings as they come; returns the exit status. Raises HasteError where there is no cluster."""
    config = absolute_paths(config)
    failed = 0
    with ray_session(config):
        for finding in findings(config):
            print(finding, flush=True)
            failed += finding.level == FAIL
    print(f"{failed} of these would stop a run" if failed else "nothing here would stop a run")
    return 1 if failed else 0


def findings(config: Config) -> Iterator[Finding]:
    """Findings about the cluster that Ray has joined."""
    import ray

    nodes = sorted(
        (node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != ray.get_runtime_context().get_node_id()
    )
    run, mark = Path(config.run.folder), f".doctor-{uuid.uuid4().hex}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / mark).write_text(mark, encoding="utf-8")
    except OSError as error:
        yield Finding(FAIL, "storage", "here", f"{run} cannot be written ({error.strerror})", "name another folder by run.folder=")
        return
    try:
        seen: dict[str, Facts] = {}
        for node in nodes:
            host, before = node["NodeManagerAddress"], time.time()
            try:
                seen[host] = ask(node, doctor_node.look, str(run), config.data.prepared, mark)
            except HasteError as error:
                yield Finding(FAIL, "node", host, str(error), "install haste-dist there, or send it along by haste submit --task doctor")
                continue
            yield from judge(host, seen[host], next(iter(seen.values())), before, time.time(), config)
            if len(seen[host].gpus) < int(node["Resources"].get("GPU", 0)):
                said = f"Ray counts {int(node['Resources']['GPU'])} GPUs, torch sees {len(seen[host].gpus)}"
                yield Finding(FAIL, "gpus", host, said, "install a torch for this driver there, then restart Ray")
    finally:
        (run / mark).unlink(missing_ok=True)
    there = [node for node in nodes if node["NodeManagerAddress"] in seen]
    yield judge_tokens(there)
    yield from judge_ports(there)
    yield judge_sum(config, there)


def judge(host: str, facts: Facts, first: Facts, before: float, after: float, config: Config) -> Iterator[Finding]:
    """Findings about one machine, beside the first one; it was asked at ``before`` and had answered at ``after``."""

    def finding(what: str, bad: object, said: str, todo: str, level: str = FAIL) -> Finding:
        return Finding(level, what, host, said, todo) if bad else Finding(OK, what, host, said)

    other = {name: (one, first.versions[name]) for name, one in facts.versions.items() if one != first.versions[name]}
    versions = ", ".join(f"{name} {one} (not {there})" for name, (one, there) in other.items())
    usual = ", ".join(f"{name} {facts.versions[name]}" for name in ("python", "torch", "ray", "deepspeed"))
    yield finding("versions", other, versions or usual, "install the same pins (constraints-cpu.txt) and the same code on every node")

    if facts.gpus:
        names = ", ".join(f"{facts.gpus.count(name)} x {name}" for name in sorted(set(facts.gpus)))
        yield finding("gpus", not facts.compiler, names, "install a C compiler (gcc): Triton needs one for its kernels")
        for number, busy in enumerate(facts.busy):
            if busy > BUSY_MIB:
                yield Finding(SLOW, "gpus", host, f"GPU {number} has {busy / 1024:.1f} GiB in use", "nvidia-smi tells by whom; end it")
        if len(facts.gpus) > 1:
            far = [link for link in facts.links if not link.startswith(("NV", "PIX", "PXB"))]
            said = ", ".join(facts.links) or "unknown"
            yield finding(
                "links", far, said, "GPUs talk through the host; where there is NVLink, nvidia-smi nvlink -s tells its state", SLOW
            )
    elif config.launch.device == "cuda":
        yield Finding(FAIL, "gpus", host, "no GPU", "nvidia-smi must list one; else launch.device=cpu")

    reason = facts.no_write or facts.no_read
    said = reason and f"{config.run.folder}: {'not writable' if facts.no_write else 'not the same folder as on the first node'} ({reason})"
    yield finding("storage", reason, said or config.run.folder, "mount the same folder on every node, or name a shared one by run.folder=")
    if config.data.prepared:
        yield finding("data", facts.no_data, facts.no_data or config.data.prepared, "run haste prepare, or mount the folder on every node")

    for folder, free in sorted(facts.free.items()):
        little = free < (LITTLE_SHARED if folder == "/dev/shm" else LITTLE_DISK)
        todo = "start the container with --shm-size 8g" if folder == "/dev/shm" else "make room there"
        yield finding("disk", little, f"{free / 2**30:.1f} GiB free in {folder}", todo)

    skew = max(before - facts.time, facts.time - after, 0.0)
    yield finding(
        "clock", skew > SKEW_SECONDS, f"at most {skew:.1f} s from this machine's" if skew else "as here", "start chrony or ntpd there"
    )

    for lock, age in facts.locks.items():
        old = age > OLD_LOCK_SECONDS
        said = f"{lock} is {age / 60:.0f} minutes old"
        todo = (
            f"a build that was killed left it, and the next one waits for ever; rm {lock}" if old else "a build is at work, or was killed"
        )
        yield Finding(FAIL if old else SLOW, "lock", host, said, todo)


def judge_tokens(nodes: list[dict[str, Any]]) -> Finding:
    """Whether this cluster asks who is calling."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    beyond = sorted({node["NodeManagerAddress"] for node in nodes if not node["NodeManagerAddress"].startswith("127.")})
    if is_token_auth_enabled():
        return Finding(OK, "auth", "cluster", "Ray asks for a token")
    todo = "start Ray with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN_PATH on every node (docs/launch.md)"
    return Finding(FAIL if beyond else SLOW, "auth", "cluster", "whoever reaches Ray's ports can run code", todo)


def judge_ports(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    """Every machine connects to a port of every other."""
    import ray

    listeners: list[Any] = [ray.remote(doctor_node.Listener).options(**on(node)).remote(node["NodeManagerAddress"]) for node in nodes]
    ports = [answer(listener.port.remote()) for listener in listeners]
    addresses = [(node["NodeManagerAddress"], port) for node, port in zip(nodes, ports, strict=True)]
    for node in nodes:
        host = node["NodeManagerAddress"]
        missed = ask(node, doctor_node.reach, [address for address in addresses if address[0] != host or len(nodes) == 1])
        if missed:
            yield Finding(FAIL, "ports", host, f"no way to {', '.join(missed)}", "open all TCP ports between the nodes (docs/launch.md)")
        else:
            yield Finding(OK, "ports", host, f"reaches {len(nodes) - 1} other nodes")


def judge_sum(config: Config, nodes: list[dict[str, Any]]) -> Finding:
    """The rate of an all-reduce: over all GPUs, or over a rank a machine (two where there is one)."""
    import ray

    on_gpu = config.launch.device != "cpu" and any(node["Resources"].get("GPU") for node in nodes)
    if on_gpu:
        places = [{**on(node), "num_gpus": 1} for node in nodes for _ in range(int(node["Resources"].get("GPU", 0)))]
    else:
        places = [on(node) for node in nodes for _ in range(2 if len(nodes) == 1 else 1)]
    library, mib = ("NCCL", MIB_ON_GPU) if on_gpu else ("gloo", MIB_ON_CPU)
    what, where = library.lower(), f"{len(places)} ranks"
    named = "NCCL_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME"
    todo = f"set {named} to the network card between the nodes (docs/launch.md)" + ("; NCCL_DEBUG=INFO tells more" if on_gpu else "")
    ranks: list[Any] = [ray.remote(doctor_node.Rank).options(**place).remote() for place in places]
    try:
        meet = f"{nodes[0]['NodeManagerAddress']}:{answer(ranks[0].port.remote())}"
        calls = [rank.measure.remote(number, len(ranks), meet, on_gpu, mib) for number, rank in enumerate(ranks)]
        seconds = max(answer(call, doctor_node.JOIN_SECONDS + ANSWER_SECONDS) for call in calls)
    except HasteError as error:
        return Finding(FAIL, what, where, f"no all-reduce ({error})", todo)
    finally:
        for rank in ranks:
            ray.kill(rank)
    rate = 2 * (len(ranks) - 1) / len(ranks) * mib * MIB / seconds / 1e9
    said = f"all-reduce of {mib} MiB in {1000 * seconds:.3g} ms, {rate:.3g} GB/s a rank"
    return Finding(SLOW, what, where, said, todo) if on_gpu and len(ranks) > 1 and rate < LEAST_GB else Finding(OK, what, where, said)


def on(node: dict[str, Any]) -> dict[str, Any]:
    """Ray's words for: there and nowhere else, taking no CPU from anybody."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def ask(node: dict[str, Any], function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function answers on a machine. Raises HasteError."""
    import ray

    return answer(ray.remote(function).options(max_retries=0, **on(node)).remote(*arguments))


def answer(call: Any, seconds: float = ANSWER_SECONDS) -> Any:
    """What a call gives; whatever goes wrong there is a HasteError of one line here."""
    import ray

    try:
        return ray.get(call, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise HasteError(f"no answer in {seconds:g} s") from None
    except Exception as error:
        lines = str(getattr(error, "cause", error)).strip().splitlines() or [type(error).__name__]
        raise HasteError(lines[0][:300]) from None
