"""`kubectl ovsmesh COMMAND`: run a command of ovsmesh in the agent's pod of one node, with the caller's permissions.

Output and exit status are handed through. The pod names of `trace` are looked up here, as an agent may not read pods.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube import exec as remote
from ovsmesh.kube.client import Api, Forbidden, NotFound, Object, Unavailable, path_of
from ovsmesh.kube.config import find
from ovsmesh.mesh.meshslice import parse_slice
from ovsmesh.mesh.types import IPAddress
from ovsmesh.names import MESH_SLICES
from ovsmesh.state_dir import write_atomic
from ovsmesh.text import instead, listed, printable

COMMANDS = ("bundle", "check", "history", "matrix", "trace")
"""Commands that ask one node, or all nodes through one."""
NAMESPACE, CONTAINER = "ovsmesh", "agent"
_PODS = "/api/v1/namespaces"
_AGENTS = "app.kubernetes.io/name=ovsmesh,app.kubernetes.io/component=agent"
_MOST = 64 << 20
"""Bytes of an archive that is kept in memory: one has 20 MB at most."""


class AgentPod(NamedTuple):
    """The pod of a node's agent."""

    name: str
    node: str
    state: str
    """"ready", "running" (not ready), or why it does not run."""


def run(command: str, arguments: Sequence[str], names: Sequence[str], node: str, kubeconfig: str | None) -> int:
    """Run the command in an agent's pod and return its exit status. Raises OvsmeshError.

    `names` are those of the arguments that name ends of a path; `node` is whose agent, "" for one that fits.
    """
    api = Api(find(kubeconfig), "kubectl-ovsmesh")
    try:
        agents = _agents(api)
        for place, name in enumerate(names):
            address, where = _resolved(api, name, agents)
            arguments = [address if argument == name else argument for argument in arguments]
            if place == 0 and not node:
                node = where
        pod = _chosen(agents, node)
        if not node:
            print(f"asking the agent of node {pod.node}; --on NODE asks another", file=sys.stderr, flush=True)
        if command == "bundle":
            return _bundle(api, pod, arguments)
        return _exec(api, pod, ["ovsmesh", command, *arguments], _to(sys.stdout))
    finally:
        api.close()


def _exec(api: Api, pod: AgentPod, argv: Sequence[str], out: remote.Sink) -> int:
    try:
        return remote.run(api, NAMESPACE, pod.name, CONTAINER, argv, out, _to(sys.stderr))
    except Forbidden as error:
        raise OvsmeshError(
            f"{error}. This needs `get` and `create` on pods/exec in namespace {NAMESPACE} (docs/operations.md)"
        ) from error
    except NotFound as error:
        raise OvsmeshError(f"{error}. The agent's pod of node {pod.node} has just gone; try again") from error
    except Unavailable as error:
        if error.code != 500:
            raise
        raise OvsmeshError(
            f"{error}. Does the API server reach the kubelet of node {pod.node} (TCP port 10250)?"
            " On the node itself run the same command as root"
        ) from error


def _to(stream: Any) -> remote.Sink:
    """Return what writes bytes to a standard stream at once."""

    def write(data: bytes) -> None:
        stream.buffer.write(data)
        stream.buffer.flush()

    return write


def _bundle(api: Api, pod: AgentPod, arguments: Sequence[str]) -> int:
    """Fetch the archive into a local file; "-" is standard output."""
    output, rest = _output(arguments)
    if output == "-":
        if sys.stdout.isatty():
            raise OvsmeshError("-o -: standard output is a terminal; redirect it, or give -o FILE")
        return _exec(api, pod, ["ovsmesh", "bundle", *rest, "-o", "-"], _to(sys.stdout))
    target = Path(output or ".")
    if target.is_dir():
        target /= f"ovsmesh-{pod.node}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.gz"
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OvsmeshError(f"-o {output}: can't be written there; give -o FILE in a directory that exists")
    data = bytearray()

    def collect(more: bytes) -> None:
        data.extend(more)
        if len(data) > _MOST:
            raise OvsmeshError(f"the archive from node {pod.node} is larger than {_MOST} bytes")

    code = _exec(api, pod, ["ovsmesh", "bundle", *rest, "-o", "-"], collect)
    if code or not data:
        raise OvsmeshError(f"no archive came from node {pod.node}; nothing is written (exit status {code})")
    try:
        write_atomic(target, bytes(data))
    except OSError as error:
        raise OvsmeshError(f"{target}: can't be written: {error.strerror}") from error
    print(f"{target}: {len(data)} bytes", flush=True)
    return 0


def _output(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return what the option -o names, "" without it, and the other arguments."""
    output, rest, left = "", [], iter(arguments)
    for argument in left:
        if argument in ("-o", "--output"):
            output = next(left, "")
        elif argument.startswith("--output="):
            output = argument.partition("=")[2]
        elif argument.startswith("-o"):
            output = argument[2:].removeprefix("=")
        else:
            rest.append(argument)
    return output, rest


# The agents' pods


def _agents(api: Api) -> list[AgentPod]:
    """Return the agents' pods, sorted by node. Raises OvsmeshError where they can't be listed."""
    path = path_of(_PODS, NAMESPACE, "pods")
    try:
        found = [item for page in api.pages(path, labelSelector=_AGENTS) for item in page.items]
    except Forbidden as error:
        raise OvsmeshError(f"{error}. This needs `list` on pods in namespace {NAMESPACE}") from error
    pods = [AgentPod(item["metadata"]["name"], item["spec"].get("nodeName") or "", _state(item)) for item in found]
    if not pods:
        raise OvsmeshError(
            f"no agent runs in namespace {NAMESPACE} of {api.server}: is ovsmesh installed there?"
            f" `kubectl -n {NAMESPACE} get daemonsets` shows it"
        )
    return sorted((pod for pod in pods if pod.node), key=lambda pod: pod.node)


def _state(pod: Object) -> str:
    if pod["metadata"].get("deletionTimestamp"):
        return "being deleted"
    status = pod.get("status") or {}
    for container in status.get("containerStatuses") or ():
        if container.get("name") == CONTAINER:
            state = container.get("state") or {}
            if "running" in state:
                return "ready" if container.get("ready") else "running"
            for kind in ("waiting", "terminated"):
                if kind in state:
                    return printable(state[kind].get("reason") or kind, 80)
    return printable(status.get("phase") or "unknown", 80)


def _chosen(agents: Sequence[AgentPod], node: str) -> AgentPod:
    """Return the pod of this node, or a ready one. Raises OvsmeshError."""
    mine = [pod for pod in agents if pod.node == node] if node else list(agents)
    # an agent that is not ready is asked too: what is wrong with it is the question
    for state in ("ready", "running"):
        for pod in mine:
            if pod.state == state:
                return pod
    if not mine:
        raise OvsmeshError(f"no agent runs on node {node}: {instead(node, {pod.node for pod in agents})}")
    states = listed((f"{pod.name} on {pod.node} is {pod.state}" for pod in mine), 5)
    raise OvsmeshError(
        f"no agent's pod runs{f' on node {node}' if node else ''}: {states}."
        f" `kubectl -n {NAMESPACE} logs {mine[0].name} --previous` may say why"
    )


# The ends of a path


def _resolved(api: Api, name: str, agents: Iterable[AgentPod]) -> tuple[str, str]:
    """Return what to call an end of a path in the agent's pod, and its node, "" where that is not known.

    Raises OvsmeshError for a name that is neither an address nor a node nor a pod.
    """
    with contextlib.suppress(ValueError):
        return name, _node_of(api, ip_address(name))
    nodes = {pod.node for pod in agents}
    if name in nodes:
        return name, name
    namespace, _, pod = name.rpartition("/")
    namespace = namespace or api.namespace or "default"
    try:
        found = api.get(path_of(_PODS, namespace, "pods", pod))
    except NotFound:
        raise OvsmeshError(
            f"{name}: no pod in namespace {namespace} has this name (NAMESPACE/NAME names one of another), and no node:"
            f" {instead(name, nodes)}"
        ) from None
    except Forbidden as error:
        raise OvsmeshError(f"{error}. Give the pod's address instead of its name") from error
    status = found.get("status") or {}
    address = status.get("podIP") or ""
    if not address:
        raise OvsmeshError(f"pod {namespace}/{pod} has no address yet; its phase is {status.get('phase')}")
    return str(address), str((found.get("spec") or {}).get("nodeName") or "")


def _node_of(api: Api, address: IPAddress) -> str:
    """Return the node whose address, or one of whose ranges, this is; "" where none is known."""
    try:
        slices = [parse_slice(item) for page in api.pages(MESH_SLICES) for item in page.items]
    except Forbidden:
        return ""
    for node in (node for one in slices for node in one.members):
        if address == node.address or any(address in cidr for cidr in node.pod_cidrs):
            return node.name
    return ""
