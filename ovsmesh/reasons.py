"""Every reason that a user may be shown: in `status`, conditions, Events, metrics and the log.

A reason is a stable CamelCase word. docs/troubleshooting.md lists them all; a test holds it to this module.
"""

from __future__ import annotations

from enum import StrEnum, auto


class Severity(StrEnum):
    """How much a reason matters."""

    OK = auto()
    """All is well, or goes on by itself."""
    WARNING = auto()
    """The node works; something beside it is not as it could be."""
    ERROR = auto()
    """A node, a peer or a setting is not as wanted."""


_OK, _WARNING, _ERROR = Severity.OK, Severity.WARNING, Severity.ERROR


class Reason(StrEnum):
    """A reason: its name, its severity, what it means and what to do.

    The names are a contract: users match them in alerts and scripts.
    """

    severity: Severity
    """The usual one; a Problem may say that it matters less where it stands (`fatal`)."""
    meaning: str
    remedy: str

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[str]) -> str:
        return name

    def __new__(cls, name: str, severity: Severity, meaning: str, remedy: str) -> Reason:
        """Make a member from its row."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.severity, member.meaning, member.remedy = severity, meaning, remedy
        return member

    # fmt: off
    # A node's entry in the mesh
    NameMissing = auto(), _ERROR, "A node has no name.", "Give it one."
    NameInvalid = auto(), _ERROR, "A node's name is not a valid name.", "Correct it as the message says."
    DuplicateName = auto(), _ERROR, "Two nodes have one name. The older one keeps it.", "Rename the other."
    NodeInvalid = auto(), _ERROR, "A field of a node has the wrong form.", "Correct the field that the message names."
    UnknownKey = auto(), _ERROR, "A node has a field that ovsmesh does not know.", "Correct its spelling, or remove it."
    AddressMissing = (auto(), _ERROR, "A node has no tunnel address.",
        "Set `address` in the file. On Kubernetes, give the Node an InternalIP or the annotation "
        "`ovsmesh.io/tunnel-address`.")
    AddressInvalid = auto(), _ERROR, "A tunnel address is not a usable IP address.", "Correct it."
    AddressConflict = (auto(), _ERROR,
        "Two nodes have one tunnel address. The one that has it in the mesh keeps it, else the older.",
        "Give the other node its own address.")
    AddressFamilyMismatch = (auto(), _ERROR,
        "A peer's tunnel address is IPv6 and this node's is IPv4, or the other way round.",
        "Use one IP version for all tunnel addresses.")
    PodCIDRMissing = (auto(), _ERROR, "A node has no pod CIDR.",
        "Set `podCIDRs` in the file. On Kubernetes, run kube-controller-manager with `--allocate-node-cidrs`, or "
        "set `allocatePodCIDRs` in the Mesh.")
    PodCIDRInvalid = auto(), _ERROR, "A pod CIDR is not a range, or has host bits set.", "Correct it."
    PodCIDROutside = (auto(), _ERROR, "A pod CIDR is outside the cluster CIDRs.",
        "Renumber the node, or widen `clusterCIDRs`.")
    PodCIDRConflict = (auto(), _ERROR,
        "The pod CIDRs of two nodes overlap. The one that has them in the mesh keeps them, else the older.",
        "Renumber the other node.")
    PodCIDRsExhausted = (auto(), _ERROR, "The controller has no free pod CIDR left.",
        "Widen `clusterCIDRs`, or raise `nodeSubnetLength`.")
    ClusterCIDRInvalid = auto(), _ERROR, "A cluster CIDR can't be used.", "Correct it as the message says."
    DerivedNameConflict = (auto(), _ERROR,
        "The MAC or the port name that is derived from a node is another node's too.",
        "Rename or renumber one of them.")
    SelfMissing = (auto(), _ERROR, "This node is not in the mesh. The last good mesh stays in use.",
        "Add it to the mesh, or correct `--node`.")
    Excluded = (auto(), _OK, "The Node is left out of the mesh by its label `ovsmesh.io/exclude`.",
        "Remove the label to let it in.")

    # Where the mesh comes from
    MeshFileUnreadable = (auto(), _ERROR, "The mesh file can't be read. The last good mesh stays in use.",
        "Correct the path or its permissions.")
    MeshFileEmpty = (auto(), _ERROR, "The mesh file is empty. The last good mesh stays in use.",
        "To take a host out of the mesh, run `ovsmesh cleanup` on it.")
    MeshFileInvalid = (auto(), _ERROR, "The mesh file can't be used. The last good mesh stays in use.",
        "Correct the line that the message names.")
    MeshFileUnwatched = (auto(), _WARNING,
        "The kernel does not report changes of the mesh file, so they are noticed late.",
        "Raise `fs.inotify.max_user_watches`.")
    MeshInvalid = (auto(), _ERROR, "The Mesh object can't be used. The slices stay as they are.",
        "Correct the field that the message names.")
    ServiceRangeCovered = (auto(), _WARNING,
        "A cluster CIDR overlaps the range of ClusterIPs. Processes of the hosts may not reach Services; pods do.",
        "Give the pods' range alone in `clusterCIDRs`.")
    MeshMissing = (auto(), _ERROR, "There is no Mesh `default`, and the controller can't derive one.",
        "Apply `manifests/mesh.yaml` with your `clusterCIDRs`.")
    MeshDerived = (auto(), _OK, "The controller made the Mesh `default` from the Nodes' pod CIDRs.",
        "Check its `clusterCIDRs`.")
    MeshWaiting = auto(), _WARNING, "The agent waits for the API server's first answer.", "Wait."
    ApiUnavailable = (auto(), _ERROR, "The API server does not answer. The last good mesh stays in use.",
        "Find out why it is away. Forwarding goes on.")
    MeshSlicesMissing = (auto(), _ERROR, "There are no MeshSlices.",
        "Check that there is a Mesh `default` and that the controller runs.")
    MeshSlicesIncomplete = (auto(), _ERROR, "The controller has not written all MeshSlices yet.",
        "Wait. If it lasts, read the controller's log.")
    MeshSlicesInvalid = (auto(), _ERROR,
        "The MeshSlices can't be used: something other than the controller wrote them.",
        "Read the controller's log.")
    NodesVanished = (auto(), _ERROR, "The API has no Nodes any more. The slices stay as they are.",
        "Look at the cluster.")
    LastGoodUnreadable = (auto(), _WARNING,
        "The copy of the last good mesh can't be read. A restart without the source would have no mesh.",
        "Restart the agent while its source is there.")
    StateUnreadable = (auto(), _WARNING, "A file in the state directory can't be read.",
        "Check the directory's permissions; remove the file if it is damaged.")
    StateUnwritable = (auto(), _WARNING,
        "The state directory can't be written. A restart without the source would have no mesh.",
        "Check for a full disk or a read-only file system.")
    NamespaceClaimed = (auto(), _WARNING, "A process of another user has the name that marks the agent of a node.",
        "End that process, then restart the agent.")
    MassRemovalHeld = (auto(), _ERROR,
        "More than a third of the peers left the mesh at once. Their removal is held for five minutes.",
        "Wait, or run `ovsmesh confirm DIGEST`.")

    # This host
    TunnelAddressMissing = (auto(), _ERROR, "This node's tunnel address is on no link.",
        "Assign it to a link, or correct the mesh.")
    DatapathMissing = (auto(), _WARNING,
        "The kernel has no openvswitch module, and no bridge of the userspace datapath has the tunnel address.",
        "Run `modprobe openvswitch`.")
    IPv6Missing = (auto(), _ERROR, "The node has IPv6 ranges and its kernel has no IPv6.",
        "Boot with IPv6, or leave those ranges out.")
    MTUTooHigh = (auto(), _WARNING, "`spec.mtu` does not fit the underlay. The largest MTU that fits is used.",
        "Lower `spec.mtu`, or raise the underlay's MTU.")
    MTUTooLow = auto(), _ERROR, "The MTU is too low for IPv6.", "Raise the underlay's MTU as the message says."
    DatabaseDown = auto(), _ERROR, "ovsdb-server does not answer. Forwarding goes on.", "Start it."
    SwitchDown = auto(), _ERROR, "ovs-vswitchd does not answer. The kernel forwards what it already knows.", "Start it."
    SwitchUnseen = (auto(), _ERROR, "The flows of obr0 can't be read.",
        "Check ovs-vswitchd and `ovs-ofctl`; the message has their words.")
    PortError = auto(), _ERROR, "ovs-vswitchd can't make a tunnel port.", "Act on its words in the message."
    FilterUnavailable = (auto(), _WARNING,
        "The kernel or the host has no support for some filter rules. The message says what is not kept.",
        "Load the module or install the tool that the message names.")
    FilterFailed = (auto(), _ERROR, "The filter rules could not be written. The agent tries again.",
        "Act on the kernel's words in the message.")
    ForwardRefused = (auto(), _ERROR,
        "A rule of others in the chain FORWARD refuses the mesh's packets before the accept rules of ovsmesh.",
        "Run the command in the message, which opens it; or take that rule away.")
    PacketsRefused = (auto(), _ERROR,
        "A rule or a policy in another program's table of the packet filter drops packets of the mesh.",
        "Run the command in the message, and keep it where that program has its rules.")
    ApplyFailed = (auto(), _ERROR, "A change failed. The agent tries again.",
        "Act on the kernel's or the switch's words in the message.")
    NotConverged = (auto(), _ERROR, "Changes were made and did not take effect. The agent tries again.",
        "Look for another program that changes the same setting.")
    TurnFailed = auto(), _ERROR, "A reconcile failed as a whole. The agent tries again.", "Act on the message."
    Foreign = (auto(), _WARNING, "An unmanaged object stands beside managed ones. It is never touched.",
        "Remove it if you do not need it.")

    RoutedElsewhere = (auto(), _ERROR,
        "A policy rule, a route or an IPsec policy of another program takes packets to peers elsewhere than to kbr0.",
        "Run the command that the message ends with, and see to it that the other program does not undo it.")

    # The agent of this host, as other commands find it
    AgentDown = (auto(), _ERROR, "No agent runs. Forwarding goes on; nothing is repaired, updated or probed.",
        "Start it: `systemctl start ovsmesh-agent`. `journalctl -u ovsmesh-agent` says why it ended.")
    AgentHung = (auto(), _ERROR,
        "The agent runs and does not answer, or its loop stands still. Nothing is repaired, updated or probed.",
        "Restart it: `systemctl restart ovsmesh-agent`. What is in place stays.")
    AgentOutdated = (auto(), _ERROR, "The agent runs another version than the one that is installed.",
        "Restart it: `systemctl restart ovsmesh-agent`. What is in place stays.")
    AgentNotListening = (auto(), _WARNING, "The agent can't listen at its address: no page, metrics or readiness.",
        "End what uses the port, or give the agent another `--listen`.")
    MeshNotTaken = (auto(), _ERROR, "The agent works with another mesh than its source holds.",
        "Wait two seconds. If it lasts, read the agent's log.")

    # Docker and CNI: the mesh itself works on
    DockerElsewhere = (auto(), _WARNING, "Docker's containers are on docker0, which no peer reaches.",
        "Run the agent with `--docker replace`, or with `--docker off` to hide this.")
    DockerRestart = (auto(), _WARNING, "A restart of Docker would stop the containers that the message names.",
        "Choose the moment. With live-restore, stop those containers first.")
    DockerSwitching = auto(), _ERROR, "Docker is being moved to kbr0.", "Wait. The move has a deadline."
    DockerStarting = auto(), _ERROR, "Docker is starting.", "Wait. The start has a deadline."
    DockerIsolates = (auto(), _ERROR,
        "Docker has `icc: false` on kbr0, and refuses the packets between this node's pods and its peers'.",
        "Take `icc` out of daemon.json and restart Docker, or move Docker off kbr0.")
    DockerStale = (auto(), _WARNING, "Docker runs with older settings than daemon.json has.",
        "Restart Docker when its containers may stop.")
    DockerGivesUp = (auto(), _WARNING, "The switch of Docker takes a setting of its owner's that can't stay.",
        "Act on the message before the switch if you need that setting.")
    DockerOrder = (auto(), _WARNING, "Docker may be started without kbr0, which some versions never recover from.",
        "Act on the message: let the agent write the drop-in of Docker's unit.")
    DockerPools = (auto(), _WARNING, "Docker's address pools overlap the mesh's ranges.",
        "Give Docker other `default-address-pools`.")
    DockerStopped = auto(), _WARNING, "Docker does not run.", "Start it when you need it."
    DockerRollbackFailed = (auto(), _ERROR, "Docker did not start on kbr0, nor with its old settings.",
        "Read `journalctl -u docker`.")
    DockerNotRestored = (auto(), _ERROR, "Docker did not go back to its old settings.",
        "Read `journalctl -u docker`, and correct daemon.json by hand.")
    DockerLeftover = (auto(), _WARNING, "docker0 stays because something that is not Docker's is plugged into it.",
        "Unplug it. The agent then removes docker0.")
    DockerMark = (auto(), _WARNING, "What is kept about the old daemon.json can't be written.",
        "Check the state directory.")
    Docker = auto(), _WARNING, "What was done to put Docker back.", "Act on the message if it asks for something."
    DockerNeedsIPv4 = (auto(), _WARNING,
        "The node has only IPv6 ranges. Docker needs an IPv4 range and stays where it is.",
        "Give the node an IPv4 range.")
    CNIPluginsMissing = (auto(), _ERROR, "CNI plugins are missing.",
        "Install `containernetworking-plugins`, or set `--cni-bin-dir`.")
    CNIPluginMissing = (auto(), _WARNING, "An optional CNI plugin is missing. The message says what does not work.",
        "Install it if you need that.")
    CNIVersionMissing = auto(), _ERROR, "The CNI plugins have no version in common.", "Upgrade them."
    CNIOverruled = (auto(), _ERROR, "The container runtime uses another network's file, which comes first by name.",
        "Remove that file when its network is gone.")
    CNILeftover = (auto(), _WARNING, "Files of other networks come after the managed one.",
        "Remove them when you do not need them.")
    CNIContested = (auto(), _ERROR,
        "Another program rewrites the managed conflist again and again. It is put back at growing intervals only.",
        "Find that program (Cilium with `cni.exclusive`, another CNI's installer) and stop it.")
    CNIRenamed = (auto(), _WARNING, "Another program renames the CNI files of other networks, as Cilium does.",
        "Set Cilium's Helm value `cni.exclusive` to false, then remove what was renamed.")
    CNIUnreadable = auto(), _ERROR, "The CNI directory can't be read.", "Act on the message."

    # Conditions of one node
    AsWanted = auto(), _OK, "The node is as wanted.", "Nothing."
    NoMesh = auto(), _ERROR, "No mesh was read yet, so nothing is touched.", "Look at the other problems of `status`."
    Pending = auto(), _ERROR, "Changes are still to be made.", "Wait. If it lasts, run `ovsmesh status`."
    Blocked = (auto(), _ERROR, "An unmanaged object stands where a managed one belongs.",
        "Move it. The agent then goes on by itself.")
    RemovalHeld = auto(), _ERROR, "Only held removals are left to do.", "See `MassRemovalHeld`."
    PeersUnreachable = (auto(), _ERROR, "Packets to some peers are lost, though the wiring is in place.",
        "Run `ovsmesh check` on that node: it names the peers and the likely cause.")
    PeersMissing = (auto(), _ERROR, "Some peers are not joined, or their state is unknown.",
        "Run `ovsmesh status` on that node.")
    Read = auto(), _OK, "The mesh in use is what its source says now.", "Nothing."
    LastKnownGood = (auto(), _WARNING, "The mesh's source can't be used now. The last good mesh is in use.",
        "Look at the other problems of `status`.")

    # Conditions that the controller writes
    AgentNotReported = (auto(), _ERROR, "The Node's agent has not reported yet.",
        "Check that an ovsmesh-agent pod runs on it, and read its log.")
    AgentSilent = (auto(), _WARNING, "The Node's agent has not reported for 15 minutes. What it set up stays in place.",
        "Check its pod, and whether it reaches the API server.")
    Isolated = (auto(), _ERROR, "Most other nodes can't reach the node, or it can't reach most of them.",
        "The message has the likely cause. Run `ovsmesh check` on the node, and look at its underlay.")
    MeshSplit = (auto(), _ERROR,
        "Most nodes can't reach most others, so none of them is to blame. No further node is marked as isolated.",
        "Look at the network between the hosts; `kubectl get meshnodes` shows who reaches how many.")
    PeersReachable = auto(), _OK, "Packets get through to the Node's peers again.", "Nothing."
    MeshConverged = auto(), _OK, "The Node's part of the mesh is as wanted.", "Nothing."
    Converging = auto(), _WARNING, "Some nodes have not converged yet.", "Wait, or run `ovsmesh status --cluster`."
    AllConverged = auto(), _OK, "All nodes have converged.", "Nothing."
    AllGood = auto(), _OK, "Every node can be joined.", "Nothing."
    # fmt: on


IN_THE_WAY = frozenset({Reason.PacketsRefused, Reason.ForwardRefused, Reason.RoutedElsewhere})
"""Reasons of problems with what others have on this host, by which packets of the mesh are lost though all is wired."""
