"""Which groups may stand in one table: those tested on the same images by the same protocol. Only they are ranked."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fer.reporting.groups import NAMED, Group, Key, differences

# Options of conf/data/_common.yaml: how images are shown to the network, not which images they are.
SHOWN = (
    *("image_size", "mean", "std", "batch_size", "eval_batch_size", "resident", "on_bad_image", "sampling", "tta"),
    *("augment", "store_size", "channels", "class_names"),
)


@dataclass
class Bench:
    """Groups tested on the same images by the same protocol."""

    data: str
    protocol: str
    differs: list[str]
    groups: list[Group]
    id: str = ""

    @property
    def title(self) -> str:
        """Data, protocol and what sets it apart from its like."""
        shown = ", ".join(self.differs[:NAMED])
        return f"{self.data} · {self.protocol}" + (f" ({shown})" if shown else "")

    @property
    def over(self) -> str:
        """``folds`` or ``seeds``, or both where groups differ in it: what the intervals are over."""
        return " or ".join(sorted({group.over for group in self.groups}))

    @property
    def shared_stamps(self) -> list[str]:
        """Stamps that all its groups carry, so that they do not set any apart from the others."""
        return [stamp for stamp in self.groups[0].stamps if all(stamp in group.stamps for group in self.groups)]

    def apart(self, group: Group) -> bool:
        """Whether a group carries a stamp that others do not: it is never ranked with them."""
        return set(group.stamps) != set(self.shared_stamps)

    @property
    def ranked(self) -> list[Group]:
        """The groups that may be ranked, best accuracy first, then those set apart."""
        return sorted(self.groups, key=lambda g: (self.apart(g), -g.interval("acc")[0], g.label))


def _bench_settings(group: Group) -> dict[str, Any]:
    """Protocol and the data set's own options: what decides which images are tested."""
    return {
        name: value
        for name, value in group.settings.items()
        if name.startswith("data.") and name.split(".")[1] not in SHOWN
    }


def make_benches(groups: Iterable[Group]) -> list[Bench]:
    """Put groups with finished runs into benches, those of one data set beside each other."""
    found: list[tuple[dict[str, Any], dict[int | None, str], Bench]] = []
    for group in groups:
        if not group.runs:
            continue
        settings = _bench_settings(group)
        splits = {run.fold: str(run.results["split_fingerprint"]) for run in group.runs}
        for have, prints, bench in found:
            same = bench.data == group.data and have == settings and bench.groups[0].classes == group.classes
            if same and all(prints.get(fold, print_) == print_ for fold, print_ in splits.items()):
                prints |= splits
                bench.groups.append(group)
                break
        else:
            found.append((settings, splits, Bench(group.data, group.protocol, [], [group])))
    alike: dict[Key, list[tuple[dict[str, Any], Bench]]] = defaultdict(list)
    for settings, _, bench in found:
        alike[bench.data, bench.protocol].append((settings, bench))
    for members in alike.values():
        for (_, bench), differs in zip(members, differences([s for s, _ in members]), strict=True):
            bench.differs = differs
            if len(members) > 1 and not differs:
                split = bench.groups[0].runs[0].results["split_fingerprint"]
                bench.differs = [f"{len(bench.groups[0].classes)} classes, split {split}"]
    benches = [bench for _, _, bench in found]
    for place, bench in enumerate(benches):
        bench.id = f"bench-{place + 1}"
    return benches
