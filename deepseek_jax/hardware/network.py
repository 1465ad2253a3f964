"""Networks of GPU clusters: NVLink inside a node, InfiniBand between nodes.

Bandwidths are bytes/s of one GPU in one direction, decimal. "Effective" bandwidth is the published
measurement of all-to-all traffic, which a plan should use. Sources of the numbers:

- [V3] DeepSeek-V3 report, sections 3.1 and 3.2.2: 8 GPUs per node, NVLink 160 GB/s and InfiniBand
  50 GB/s, a ratio of 3.2.
- [INS] "Insights into DeepSeek-V3" (ISCA 2025): NVLink 400 GB/s on the H800 and 900 GB/s on the
  H100, both directions together; one 400 Gb/s NIC per GPU, about 40 GB/s of it effective for the
  small messages of decoding; latencies of 64-byte messages.
- DeepEP's published figures, first release: 153-158 GB/s over NVLink, and over InfiniBand among 64
  GPUs 46 GB/s for dispatch and 45 for combine.
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class Network:
    """Links of a cluster, per GPU and direction.

    Attributes:
      name: Name of the chip.
      gpus_per_node: GPUs that NVLink joins.
      nvlink_bytes_per_s: Rated bandwidth of NVLink.
      nvlink_effective_bytes_per_s: Measured with large messages; None if not published.
      infiniband_bytes_per_s: Rated bandwidth of InfiniBand.
      infiniband_effective_bytes_per_s: Measured with large messages.
      infiniband_small_bytes_per_s: Measured with the few kilobytes per peer of decoding.
      nvlink_latency_s: Latency of 64 bytes.
      infiniband_latency_s: Latency of 64 bytes under one leaf switch.
      infiniband_far_latency_s: Latency of 64 bytes between leaf switches.
    """

    name: str
    gpus_per_node: int
    nvlink_bytes_per_s: float
    nvlink_effective_bytes_per_s: float | None
    infiniband_bytes_per_s: float
    infiniband_effective_bytes_per_s: float
    infiniband_small_bytes_per_s: float
    nvlink_latency_s: float
    infiniband_latency_s: float
    infiniband_far_latency_s: float


H800 = Network(
    name="h800",
    gpus_per_node=8,  # [V3] 3.1
    nvlink_bytes_per_s=200e9,  # [INS]: 400 GB/s both ways
    nvlink_effective_bytes_per_s=160e9,  # [V3] 3.2.2, [INS]; DeepEP 153-158
    infiniband_bytes_per_s=50e9,  # [INS]: 400 Gb/s per GPU
    infiniband_effective_bytes_per_s=45e9,  # DeepEP, combine
    infiniband_small_bytes_per_s=40e9,  # [INS]
    nvlink_latency_s=3.33e-6,  # [INS]
    infiniband_latency_s=2.8e-6,  # [INS]
    infiniband_far_latency_s=3.7e-6,  # [INS]
)

# The same node with NVLink uncut: 900 GB/s both ways [INS]. The H200 has the H100's links.
H100 = dataclasses.replace(
    H800, name="h100", nvlink_bytes_per_s=450e9, nvlink_effective_bytes_per_s=None
)
H200 = dataclasses.replace(H100, name="h200")

NETWORKS = {network.name: network for network in (H100, H800, H200)}


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
