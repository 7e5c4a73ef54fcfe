"""What the table shows of a stage, read from its log and from the JSON files it wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path


def print_owners() -> None:
    """The owner of each op on CUDA; run in a process of its own, after the build."""
    from firp_kernels import ops, registry

    owners = {name: registry.owner(name, "cuda") for name in ops.SCHEMAS}
    print(
        "; ".join(
            f"{impl}: {', '.join(n for n in owners if owners[n] == impl)}" for impl in sorted(set(owners.values()))
        )
    )


def last_line(_parts: Path, log: str) -> str:
    return log.strip().splitlines()[-1][:300]


def tests(_parts: Path, log: str) -> str:
    pattern = r"^=*\s*(\d+ (?:passed|failed|skipped|error|deselected)[^=\n]*?)\s*=*$"
    return "; ".join(re.findall(pattern, log, re.MULTILINE)) or "no test ran"


def sanitizer(_parts: Path, log: str) -> str:
    parts = []
    for tool in dict.fromkeys(re.findall(r"^\$ .*--tool (\w+) ", log, re.MULTILINE)):
        own = log.partition(f"--tool {tool} ")[2].partition("\n$ ")[0]
        found = re.search(r"SUMMARY: (\d+) (?:error|hazard)", own)
        parts.append(f"{tool} {found[1] if found else 'no summary'}")
    return ", ".join(parts) or "no sanitizer ran"


def step_cost(parts: Path, _log: str) -> str:
    """Per shape and context: the plain step with its share of bandwidth, and what the widest trees cost beside it; in
    brackets what `benchmarks.gpu.roofline` computes."""
    from benchmarks.gpu.roofline import computed

    shown = []
    for document in _documents(parts):
        for context in sorted({entry["context"] for entry in document["steps"]}):
            plain, *drafted = (entry for entry in document["steps"] if entry["context"] == context)
            trees = sorted(drafted, key=lambda entry: entry["rows"])[-3:]
            least = computed(document, plain)
            time = f"plain {plain['step_ms']['median']:.2f} ms ({plain['bandwidth_share']:.0%} of bandwidth)"
            told = [time if least is None else f"{time} [{1e3 * least.total:.2f}]"]
            for entry in trees:
                ratio, own = f"{entry['break_even_tau']['median']:.2f}x", computed(document, entry)
                if least is not None and own is not None:
                    ratio += f" [{own.total / least.total:.2f}x]"
                told.append(f"{ratio} at {entry['rows']} rows")
            shown.append(f"{document['random_weights']} {context}: {', '.join(told)}")
    return "; ".join(shown) or "no figures"


def micro(parts: Path, _log: str) -> str:
    """Per op: share of the floor of our implementation and its speedup over the fastest alternative, worst to best."""
    from benchmarks.report import fastest_alternative

    entries = json.loads((parts / "micro.json").read_text())["entries"]
    shown = []
    for op in dict.fromkeys(entry["op"] for entry in entries):
        ours = [
            e for e in entries if e["op"] == op and e["kind"] == "implementation" and e["implementation"] != "reference"
        ]
        timed = [e for e in ours if "microseconds" in e]
        if len(timed) < len(ours):
            shown.append(f"{op} {next(e['status'] for e in ours if e not in timed)}")
        elif timed:
            shares = sorted(e["share_of_floor"] for e in timed)
            ratios = sorted(e["speedup"][fastest_alternative(e, entries)]["median"] for e in timed)
            shown.append(f"{op} {shares[0]:.0%}-{shares[-1]:.0%} of floor, {ratios[0]:.2f}-{ratios[-1]:.2f}x")
    return "; ".join(shown) or "no kernel of ours was timed"


def end_to_end(parts: Path, log: str) -> str:
    """Per tree: speedup over plain decoding and tau; tokens per second of every method."""
    shown = []
    for document in _documents(parts):
        methods, tree = document["methods"], document["settings"]["tree"]
        firp = next(entry for name, entry in methods.items() if name.startswith("firp"))
        speedup = f"{firp['speedup_vs_ar']['median']:.2f}x plain, " if "speedup_vs_ar" in firp else ""
        speeds = (f"{name} {entry['tokens_per_second']['median']:.0f} tokens/s" for name, entry in methods.items())
        shown.append(f"({tree['N']}, {tree['P']}) {speedup}tau {firp['tau']:.2f}, {', '.join(speeds)}")
    return "; ".join(shown) or next((line for line in log.splitlines() if line.startswith("error:")), "no figures")


def _documents(parts: Path) -> list[dict]:
    """The JSON files of the stage, in the order in which they were written."""
    paths = sorted(parts.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [json.loads(path.read_text()) for path in paths]
