"""The figures of docs/reliability.md, from what ``make reliability-long`` wrote into docs/results/reliability.json."""

from collections import Counter
from typing import Any

from fer.config import CONF
from fer.runs import read_json

RECORD = CONF.parent / "docs" / "results" / "reliability.json"


def section(way: str) -> str:
    """One way of killing or failing: what was done how often, and what it cost.

    Args:
        way: ``forked``, ``command``, ``workers`` or ``syscalls``.
    """
    record = read_json(RECORD) if RECORD.is_file() else {}
    parts = record.get(way, [])
    if not parts:
        return "Not measured yet."
    return _faults(parts[-1]) if way == "syscalls" else _kills(parts)


def _kills(parts: list[dict[str, Any]]) -> str:
    phases, lost = Counter[str](), Counter[int]()
    for part in parts:
        phases.update(part["phases"])
        lost.update({int(steps): count for steps, count in part["steps_lost"].items()})
    steps = sorted(lost.elements())
    kills, trainings, same = (sum(part[key] for part in parts) for key in ("kills", "trainings", "identical"))
    rows = [
        ("kills", f"{kills}, seeds {', '.join(str(part['seed']) for part in parts)}"),
        ("where they fell", ", ".join(f"{phase} {count}" for phase, count in phases.most_common())),
        (
            "trainings",
            f"{trainings}; both checkpoints' weights, curves and predictions the same bytes as uninterrupted: {same}",
        ),
        (
            "steps lost by a kill",
            f"median {steps[len(steps) // 2]}, at most {steps[-1]}, "
            f"with {parts[0]['steps_between_checkpoints']} steps from checkpoint to checkpoint",
        ),
        ("cost", f"{sum(part['core_minutes'] for part in parts):.1f} core-minutes"),
    ]
    if "unneeded" in parts[0]:
        middle, longest = parts[0]["seconds"][0], max(part["seconds"][1] for part in parts)
        said = "each with exit code 2 and the worker's sentence, none hung; "
        said += f"{middle:.1f} s after the kill in the median, {longest:.1f} s at most"
        rows.insert(2, ("the run ended", said))
        rows.insert(3, ("the worker was not needed any more", str(sum(part["unneeded"] for part in parts))))
    if "previous_taken" in parts[0]:
        taken = sum(part["previous_taken"] for part in parts)
        rows.insert(3, ("the checkpoint before the last one was taken", str(taken)))
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)])


def _faults(found: dict[str, Any]) -> str:
    calls: dict[str, dict[str, int]] = {}
    for name, count in found["faults"].items():
        call, fault = name.split()
        calls.setdefault(call, {})[fault] = count
    faults = list(next(iter(calls.values())))
    rows = [f"| `{call}` | {' | '.join(str(counts[fault]) for fault in faults)} |" for call, counts in calls.items()]
    taken = " and ".join(f"`{name}` {count} times" for name, count in found["taken"].items())
    return "\n".join(
        [
            f"| system call | {' | '.join(faults)} |",
            f"|---|{'---:|' * len(faults)}",
            *rows,
            "",
            f"{found['all']} faults, after {found['usable']} of which a checkpoint could be used: {taken}.",
        ]
    )
