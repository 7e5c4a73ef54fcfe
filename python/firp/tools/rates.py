"""How fast a machine reads, computes and sends: of a datasheet, given, or measured here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from firp.tools.hardware import available_memory, copy_bandwidth, device_name, product_rate

MEASURED, DEFAULT_RATES = "measured", "h100"
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# No datasheet tells it. Small collectives between the GPUs of one machine take about this long.
ASSUMED_LATENCY = 10e-6


@dataclass(frozen=True)
class Rates:
    """What a roofline of one rank is made of.

    Attributes:
        device: its name.
        source: where the figures are from, in words.
        memory: bytes that it has.
        bandwidth: bytes a second read from its memory.
        operations: of dense products a second; None where none is known for the dtype.
        link: bytes a second that it sends to other ranks, in one direction; None where none is known.
        latency: seconds that a collective takes beside its bytes; None where none is known.
        kind: of torch's device.
    """

    device: str
    source: str
    memory: float
    bandwidth: float
    operations: float | None
    link: float | None
    latency: float | None
    kind: str = "cuda"

    def seconds(self, read: float, operations: float) -> float:
        """Of work that is bound by bytes or by operations, whichever takes longer."""
        assert self.operations is not None
        return max(read / self.bandwidth, operations / self.operations)

    def collective_seconds(self, kind: str, count: int, size: int, ranks: int) -> float:
        """Of `count` collectives whose results have `size` bytes in all, in a ring of `ranks`.

        A rank sends (n - 1) / n of a gathered result, twice that of a summed one, and all of a broadcast one.
        """
        assert self.link is not None and self.latency is not None
        share = {"all-reduce": 2 * (ranks - 1) / ranks, "all-gather": (ranks - 1) / ranks, "broadcast": 1.0}[kind]
        return count * self.latency + share * size / self.link


def _nvidia(name: str, memory: float, bandwidth: float, operations: float, link: float, how: str) -> Rates:
    source = f"NVIDIA's {name} datasheet; link: {how}, one direction; latency: assumed"
    return Rates(name, source, memory, bandwidth, operations, link, ASSUMED_LATENCY)


# Dense bfloat16 products, without sparsity.
DATASHEETS = {
    "a100": _nvidia("A100 80GB SXM", 80e9, 2.039e12, 312e12, 300e9, "NVLink"),
    "h100": _nvidia("H100 SXM", 80e9, 3.35e12, 989e12, 450e9, "NVLink"),
    "h200": _nvidia("H200 SXM", 141e9, 4.8e12, 989e12, 450e9, "NVLink"),
    "l40s": _nvidia("L40S", 48e9, 0.864e12, 362e12, 32e9, "PCIe 4.0 x16"),
}


# option -> what it replaces, and its unit.
OPTIONS = {
    "bandwidth": ("bandwidth", 1e9), "flops": ("operations", 1e12), "link_bandwidth": ("link", 1e9),
    "latency": ("latency", 1e-6),
}  # fmt: skip


def find_rates(name: str, dtype: torch.dtype, device: str, given: dict[str, float | None], ranks: int = 1) -> Rates:
    """Rates of a datasheet or of this machine, those that are `given` in their place.

    Args:
        name: a key of `DATASHEETS`, or "measured".
        device: where to measure.
        given: by the names of `OPTIONS`, in their units; None takes the named device's.
        ranks: that send to each other.

    Raises:
        ValueError: an unknown name, a rate that is neither known nor given, or one that is not above 0.
    """
    if name != MEASURED and name not in DATASHEETS:
        raise ValueError(f"device_rates: got {name!r}, expected {', '.join(DATASHEETS)} or {MEASURED}")
    own = {option: value for option, value in given.items() if value is not None}
    for option, value in own.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{option}: got {value:g}, expected a finite number above 0")
    known = {OPTIONS[option][0]: value * OPTIONS[option][1] for option, value in own.items()}
    between = [option for option in ("link_bandwidth", "latency") if option not in own]
    if name == MEASURED and ranks > 1 and between:
        raise ValueError(f"{', '.join(between)}: not measured, expected to be given where {ranks} ranks send")
    rates = _measured(torch.device(device), dtype, known) if name == MEASURED else DATASHEETS[name]
    if name != MEASURED and dtype not in SIXTEEN_BITS:
        rates = replace(rates, operations=None)
    rates = replace(rates, **known)  # type: ignore[arg-type]
    for option, (field, _) in OPTIONS.items():
        if getattr(rates, field) is None and (ranks > 1 or field == "operations"):
            raise ValueError(
                f"{option}: not known of the device rates {name!r} in {str(dtype).removeprefix('torch.')}, expected it "
                "to be given"
            )
    return replace(rates, source=f"{rates.source}; as given: {', '.join(own)}") if own else rates


def _measured(device: torch.device, dtype: torch.dtype, known: dict[str, float]) -> Rates:
    """Rates of this machine, those left out that are known. What ranks send to each other is not measured."""
    return Rates(
        device=device_name(device),
        source="measured on this machine: a large copy, a large product",
        memory=available_memory(device),
        bandwidth=known.get("bandwidth") or copy_bandwidth(device),
        operations=known.get("operations") or product_rate(device, dtype),
        link=None,
        latency=None,
        kind=device.type,
    )
