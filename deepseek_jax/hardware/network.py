"""Networks of GPU clusters: NVLink inside a node, InfiniBand between nodes.

A node is the GPUs that NVLink joins: 8 in most, 72 in the rack of a GB200 NVL72. Bandwidths are
bytes/s of one GPU in one direction, decimal. "Effective" bandwidth is the published measurement of
all-to-all traffic, which a plan should use. Sources of the numbers:

- [V3] DeepSeek-V3 report, sections 3.1 and 3.2.2: 8 GPUs per node, NVLink 160 GB/s and InfiniBand
  50 GB/s, a ratio of 3.2.
- [INS] "Insights into DeepSeek-V3" (ISCA 2025): NVLink 400 GB/s on the H800 and 900 GB/s on the
  H100, both directions together; one 400 Gb/s NIC per GPU, about 40 GB/s of it effective for the
  small messages of decoding; latencies of 64-byte messages.
- [EP1] DeepEP, docs/legacy.md (commit 0297fc8): 4,096 tokens of width 7168, experts of at most 4
  nodes, FP8 to the experts and BF16 back. The first release had 46 and 45 GB/s among 64 GPUs.
- [EP2] DeepEP, README.md (commit 0297fc8): 8,192 tokens, the second version's kernels.
- [HEP] DeepEP, docs/README_Hybrid-EP.md (commit 41cad94): 4,096 tokens, BF16 both ways, uniform
  router, the "torch API" columns.
- [NCCL] deepseek-ai/DeepEP issue 59 (March 2025), Megatron's MoE layers of V3 on 8 nodes of H100:
  an all-to-all of NCCL takes 13 ms, and DeepEP's combine of the same tokens 5 ms. Five milliseconds
  are 41 GB/s for 4,096 tokens, as [HEP] measured, so NCCL's 4,096 x 7 copies that leave the node
  travel at 31.6 GB/s.
- Datasheets of the A100, HGX B200, GB200 NVL72 and MI300X; 400 Gb/s NICs beside all of them but the
  A100, whose DGX has 200 Gb/s. NVIDIA's NIC is taken to reach as much as beside the H800.
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Published bandwidth of an exchange of tokens with experts, bytes/s of one GPU.

    All of these counts include the copies that a GPU sends to its own node or to itself, see
    `wire_bytes_per_s`.

    Attributes:
      gpus, nodes: GPUs of the exchange, and nodes that they fill.
      dispatch_bytes_per_s, combine_bytes_per_s: To the experts, and back; as published.
      sms: Multiprocessors that the kernels occupy.
      source: Where it was published.
    """

    gpus: int
    nodes: int
    dispatch_bytes_per_s: float
    combine_bytes_per_s: float
    sms: int
    source: str

    @property
    def wire_bytes_per_s(self) -> float:
        """The slower direction without the copies that stay, 1/nodes of them, or 1/gpus in a node.

        DeepEP's test counts a token once for each node with one of its experts, the sender's node
        too (`tests/test_internode.py`), and so reports more than a NIC can carry: 90 GB/s between
        two nodes with NICs of 50.
        """
        places = self.nodes if self.nodes > 1 else self.gpus
        return min(self.dispatch_bytes_per_s, self.combine_bytes_per_s) * (1 - 1 / places)


@dataclasses.dataclass(frozen=True)
class Network:
    """Links of a cluster, per GPU and direction.

    Attributes:
      name: Name of the chip.
      gpus_per_node: GPUs that NVLink joins (AMD: Infinity Fabric).
      nvlink_bytes_per_s: Rated bandwidth of NVLink.
      nvlink_effective_bytes_per_s: Measured with large messages; None if not published.
      infiniband_bytes_per_s: Rated bandwidth of InfiniBand.
      infiniband_effective_bytes_per_s: Measured with large messages; None if not published.
      infiniband_small_bytes_per_s: Measured with the few kilobytes per peer of decoding; None if
        not published.
      nvlink_latency_s: Latency of 64 bytes.
      infiniband_latency_s: Latency of 64 bytes under one leaf switch.
      infiniband_far_latency_s: Latency of 64 bytes between leaf switches.
      all_to_all: Published exchanges of tokens with experts; empty if there are none.
    """

    name: str
    gpus_per_node: int
    nvlink_bytes_per_s: float
    nvlink_effective_bytes_per_s: float | None
    infiniband_bytes_per_s: float
    infiniband_effective_bytes_per_s: float | None
    infiniband_small_bytes_per_s: float | None
    nvlink_latency_s: float
    infiniband_latency_s: float
    infiniband_far_latency_s: float
    all_to_all: tuple[AllToAll, ...] = ()

    @property
    def inside_bytes_per_s(self) -> float:
        """Effective bandwidth in a node; the H800's share of the rated one if not published."""
        share = 160 / 200  # [V3], [INS]
        return self.nvlink_effective_bytes_per_s or share * self.nvlink_bytes_per_s

    @property
    def between_bytes_per_s(self) -> float:
        """Effective bandwidth between nodes; the H800's share of the rated if not published."""
        share = 43.75 / 50  # [EP1], [INS]
        return self.infiniband_effective_bytes_per_s or share * self.infiniband_bytes_per_s


H800 = Network(
    name="h800",
    gpus_per_node=8,  # [V3] 3.1
    nvlink_bytes_per_s=200e9,  # [INS]: 400 GB/s both ways
    nvlink_effective_bytes_per_s=160e9,  # [V3] 3.2.2, [INS]
    infiniband_bytes_per_s=50e9,  # [INS]: 400 Gb/s per GPU
    infiniband_effective_bytes_per_s=43.75e9,  # [EP1]: 50 GB/s back from 64 GPUs, 7/8 on the wire
    infiniband_small_bytes_per_s=40e9,  # [INS]
    nvlink_latency_s=3.33e-6,  # [INS], taken for all networks: no others were read
    infiniband_latency_s=2.8e-6,  # [INS]
    infiniband_far_latency_s=3.7e-6,  # [INS]
    all_to_all=(
        AllToAll(8, 1, 153e9, 158e9, 24, "[EP1]"),
        AllToAll(16, 2, 43e9, 43e9, 24, "[EP1]"),
        AllToAll(32, 4, 58e9, 57e9, 24, "[EP1]"),
        AllToAll(64, 8, 51e9, 50e9, 24, "[EP1]"),
        AllToAll(16, 2, 90e9, 81e9, 12, "[EP2]"),  # there "SM90", which the H100 is as well
        AllToAll(32, 4, 61e9, 61e9, 6, "[EP2]"),
    ),
)

# The same node with NVLink uncut: 900 GB/s both ways [INS]. The H200 has the H100's links.
H100 = dataclasses.replace(
    H800,
    name="h100",
    nvlink_bytes_per_s=450e9,
    nvlink_effective_bytes_per_s=None,
    all_to_all=(
        AllToAll(16, 2, 54.5e9, 53.4e9, 16, "[HEP]"),
        AllToAll(32, 4, 47.4e9, 52.5e9, 16, "[HEP]"),
        AllToAll(64, 8, 41.2e9, 46.6e9, 16, "[HEP]"),
    ),
)
H200 = dataclasses.replace(H100, name="h200")

# The H100's links under NCCL's flat all-to-alls: 4,096 tokens x 8 copies x 7/8 x 14,336 B, 13 ms.
H100_NCCL = dataclasses.replace(
    H100, infiniband_effective_bytes_per_s=4096 * 7 * 14_336 / 13e-3, all_to_all=()
)

# NVLink 5: 1.8 TB/s both ways.
B200 = dataclasses.replace(
    H100,
    name="b200",
    nvlink_bytes_per_s=900e9,
    nvlink_effective_bytes_per_s=562.6e9,  # [EP2]: 643 GB/s to the experts, 7/8 on the wire
    all_to_all=(
        AllToAll(8, 1, 643e9, 675e9, 24, "[EP2]"),
        AllToAll(8, 1, 726e9, 740e9, 64, "[EP2]"),
        AllToAll(16, 2, 90e9, 91e9, 12, "[EP2]"),
        AllToAll(8, 1, 536e9, 531e9, 16, "[HEP]"),
    ),
)

GB200 = dataclasses.replace(
    B200,
    name="gb200",
    gpus_per_node=72,
    nvlink_effective_bytes_per_s=435.6e9,  # [HEP]: 448 GB/s back from 36 GPUs, 35/36 on the wire
    all_to_all=(
        AllToAll(8, 1, 546e9, 569e9, 32, "[HEP]"),
        AllToAll(32, 1, 484e9, 465e9, 32, "[HEP]"),
        AllToAll(36, 1, 479e9, 448e9, 32, "[HEP]"),
    ),
)

A100 = dataclasses.replace(
    H100,
    name="a100",
    nvlink_bytes_per_s=300e9,  # NVLink 3: 600 GB/s both ways
    infiniband_bytes_per_s=25e9,  # 200 Gb/s per GPU
    infiniband_effective_bytes_per_s=None,
    infiniband_small_bytes_per_s=None,
    all_to_all=(),
)

# Infinity Fabric in place of NVLink: 7 links of 128 GB/s both ways, one to each other GPU.
MI300X = dataclasses.replace(
    H100,
    name="mi300x",
    nvlink_bytes_per_s=448e9,
    infiniband_effective_bytes_per_s=None,
    infiniband_small_bytes_per_s=None,
    all_to_all=(),
)

NETWORKS = {network.name: network for network in (H100, H800, H200, B200, GB200, A100, MI300X)}


def network(name: str) -> Network:
    """Looks up the links of a cluster by the name of its chip.

    Raises:
      ValueError: An unknown name; the message has the closest one.
    """
    if name.lower() in NETWORKS:
        return NETWORKS[name.lower()]
    near = difflib.get_close_matches(name.lower(), NETWORKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(NETWORKS)}"
    raise ValueError(f"unknown network {name!r}; {hint}")
