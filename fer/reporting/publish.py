"""The report: from run folders to one page, Markdown, LaTeX, CSV and pictures."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fer.reporting import contents
from fer.reporting import measured as earlier
from fer.reporting.benches import Bench, make_benches
from fer.reporting.charts import curves, overview, reliability
from fer.reporting.claims import Beside, Claim, beside
from fer.reporting.collect import Run
from fer.reporting.comparisons import Verdict
from fer.reporting.groups import Group
from fer.reporting.pictures import Wrong, most_wrong, pictures_found
from fer.reporting.summaries import Result
from fer.reporting.tables import Table, markdown, writable, write_csv
from fer.runs import write_bytes, write_text

HERE = Path(__file__).parent
TITLE = "Facial expression recognition: report"
BELONGING = (
    "Averaged together: finished runs that differ in nothing but fold and seed (nor in where they ran), have the same "
    "classes in the same order and the same number of images, for one fold the same split, and for different folds "
    "test parts that share no image or are the same. Groups stand in one table when they were tested on the same "
    "images by the same protocol. A group with a stamp that others do not carry is set apart and never ranked."
)


@dataclass(frozen=True)
class Options:
    """What a report shows.

    Attributes:
        wrong_images: most confidently wrong images of each group.
        thumbnails: show those images, where a store has them.
        stores: folders of decoded images to look in besides those the runs name.
        root: folder that paths are shown relative to.
    """

    wrong_images: int
    thumbnails: bool
    stores: Sequence[Path]
    root: Path


@dataclass(frozen=True)
class GroupPart:
    """What the page shows of one group."""

    group: Group
    confusion: Table
    reliability: str
    curves: str
    wrong: list[Wrong]
    found: dict[str, bytes]
    runs: Table


@dataclass(frozen=True)
class BenchPart:
    """What the page shows of one bench."""

    bench: Bench
    facts: list[str]
    overview: str
    results: Table
    claims: Table
    not_run: Table
    measured: Table
    any_apart: bool
    per_class: Table
    detections: Table
    distribution: Table
    groups: list[GroupPart]

    @property
    def tables(self) -> tuple[Table, ...]:
        """Its tables, without those of its groups."""
        return (
            *(self.results, self.claims, self.not_run, self.measured),
            *(self.per_class, self.detections, self.distribution),
        )


def write_report(
    output: Path,
    runs: Sequence[Run],
    groups: Sequence[Group],
    claims: Sequence[Claim],
    measured: Sequence[Result],
    verdicts: Sequence[Verdict],
    planned: Sequence[tuple[Path, str, str]],
    options: Options,
) -> None:
    """Write ``report.html``, ``report.md``, ``report.tex``, CSV files and ``figures/`` into a folder.

    Args:
        output: the folder; made if need be, files of an older report replaced.
        runs: every run read.
        groups: the same in groups.
        claims: what papers claim.
        measured: the committed summaries of earlier runs, see `fer.reporting.summaries`.
        verdicts: comparisons asked for.
        planned: jobs of sweeps that were never started, see `fer.reporting.collect.never_started`.
        options: what to show.
    """
    benches = make_benches(groups)
    parts = [_bench_part(bench, beside(bench, claims), measured, options) for bench in benches]
    times, absent = contents.times(benches), contents.absent(groups, planned, options.root)
    comparisons = contents.compared(verdicts) if verdicts else None
    state = Counter(run.status for run in runs)
    summary = (
        f"{len(runs):,} runs in {len(groups):,} groups: "
        + ", ".join(f"{n:,} {status}" for status, n in sorted(state.items()))
        + f". From {options.root}."
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "figures").mkdir(exist_ok=True)
    for part in parts:
        write_text(output / "figures" / f"{part.bench.id}.svg", part.overview)
        for one in part.groups:
            write_text(output / "figures" / f"{one.group.id}-curves.svg", one.curves)
            write_text(output / "figures" / f"{one.group.id}-reliability.svg", one.reliability)
            for name, picture in one.found.items():
                write_bytes(output / "figures" / f"{one.group.id}-{name}.png", picture)
    notices = _notices(groups, len(planned))
    page = _environment().get_template("page.html")
    script = (HERE / "page.js").read_text()
    html = page.render(
        title=TITLE,
        summary=summary,
        notices=notices,
        benches=parts,
        comparisons=comparisons,
        times=times,
        absent=absent,
        belonging=BELONGING,
        style=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(output / "report.html", writable(html))
    write_text(output / "report.md", writable(_markdown(parts, summary, notices, [comparisons, times, absent])))
    tables = [table for part in parts for table in (*part.tables, *(one.confusion for one in part.groups))]
    latex = [table.latex() for table in (*tables, *([comparisons] if comparisons else []), times) if table.rows]
    write_text(output / "report.tex", r"% \usepackage{booktabs}; pictures are in figures/" + "\n\n" + "\n".join(latex))
    write_csv(output / "groups.csv", [part.results for part in parts])
    write_csv(output / "classes.csv", [part.per_class for part in parts])
    write_csv(output / "claims.csv", [table for part in parts for table in (part.claims, part.not_run)])
    write_csv(output / "measured.csv", [part.measured for part in parts])
    write_csv(output / "detections.csv", [part.detections for part in parts])
    write_csv(output / "confusion.csv", [one.confusion for part in parts for one in part.groups])
    write_csv(output / "images.csv", [part.distribution for part in parts])
    write_csv(output / "runs.csv", [one.runs for part in parts for one in part.groups])
    write_csv(output / "cost.csv", [times])
    write_csv(output / "absent.csv", [absent])
    if comparisons:
        write_csv(output / "comparisons.csv", [comparisons])


def _environment() -> Environment:
    """Jinja with everything escaped and no name undefined."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(
        content if isinstance(content, bytes) else content.encode()
    ).decode()
    return environment


def _bench_part(bench: Bench, claims: Sequence[Beside], measured: Sequence[Result], options: Options) -> BenchPart:
    return BenchPart(
        bench=bench,
        facts=_facts(bench),
        overview=overview(bench, claims),
        results=contents.results(bench),
        claims=contents.claimed(bench, claims),
        not_run=contents.not_run(bench, claims),
        measured=earlier.table([r for r in measured if r.data == bench.data], f"{bench.data}: measured earlier"),
        any_apart=any(bench.apart(group) for group in bench.groups),
        per_class=contents.per_class(bench, claims),
        detections=contents.detections(bench),
        distribution=contents.distribution(bench),
        groups=[_group_part(group, options) for group in bench.ranked],
    )


def _group_part(group: Group, options: Options) -> GroupPart:
    return GroupPart(
        group=group,
        confusion=contents.confusion(group),
        reliability=reliability(group.bins, group.stamps),
        curves=curves(
            [run.curves() for run in group.runs], [r.results["best_epoch"] for r in group.runs], group.stamps
        ),
        wrong=most_wrong(group, options.wrong_images, options.stores, options.thumbnails),
        found=pictures_found(group) if options.thumbnails else {},
        runs=contents.runs(group, options.root),
    )


def _facts(bench: Bench) -> list[str]:
    """What a reader must know of the data, from what its first run recorded."""
    group = bench.groups[0]
    facts, n = group.facts, group.runs[0].results["n"]
    out = [
        f"{facts.get('data', bench.data)} ({facts.get('form', '')}), {len(group.classes)} classes; "
        f"train {n['train']:,}, validation {n['val']:,}, test {n['test']:,} images"
    ]
    out += [f"split: {facts['split']}"] if facts.get("split") else []
    out += [f"differs from the official counts: {line}" for line in facts.get("count_differences") or []]
    out += [f"{what}: {count:,} (pixel-identical)" for what, count in (facts.get("copies") or {}).items() if count]
    out += [
        f"{count:,} people in both {where}" for where, count in (facts.get("shared_subjects") or {}).items() if count
    ]
    return out + [str(line) for line in facts.get("warnings") or []]


def _notices(groups: Sequence[Group], planned: int) -> list[str]:
    """What was not averaged, and other things nobody should overlook."""
    out = [
        f"Not averaged with its like: {group.id} ({len(group.runs)} runs of {group.model} on {group.data}) is a group "
        f"of its own, for {group.refused}."
        for group in groups
        if group.refused
    ]
    for group in groups:
        codes = {str(run.results.get("code_version")) for run in group.runs}
        if len(codes) > 1:
            out.append(f"{group.id}: its runs were made by {len(codes)} versions of the code.")
    count = planned + sum(len(group.unfinished) + len(group.missing) for group in groups)
    if count:
        out.append(f"{count:,} runs failed, did not finish or are missing; they are listed at the end.")
    repeated = sum(len(group.repeated) for group in groups)
    if repeated:
        out.append(f"{repeated:,} runs do not count, since a newer one has their fold and seed.")
    return out


def _markdown(parts: Sequence[BenchPart], summary: str, notices: Sequence[str], last: Sequence[Table | None]) -> str:
    lines = [f"# {TITLE}", "", markdown(summary), "", *_list(notices)]
    for part in parts:
        lines += [f"## {markdown(part.bench.title)}", "", *_bold(part.bench.shared_stamps), *_list(part.facts)]
        lines += [f"![accuracy](figures/{part.bench.id}.svg)", ""]
        lines += [table.markdown() for table in part.tables if table.rows]
        for one in part.groups:
            lines += [f"### {markdown(one.group.label)} ({one.group.id})", "", *_bold(one.group.stamps)]
            lines += [one.confusion.markdown(), f"![curves](figures/{one.group.id}-curves.svg)"]
            lines += [f"![reliability](figures/{one.group.id}-reliability.svg)", ""]
            lines += [f"![{name}](figures/{one.group.id}-{name}.png)\n" for name in one.found]
            wrong = [(w, f"{w.label} taken for {w.predicted}, {w.confidence:.2f}") for w in one.wrong]
            lines += _list([f"{w.item}: {what}, wrong in {w.wrong} of {w.tested} runs" for w, what in wrong])
    lines += [f"## {table.title}\n\n{table.markdown()}" for table in last if table is not None and table.rows]
    return "\n".join([*lines, BELONGING, ""])


def _list(points: Sequence[str]) -> list[str]:
    return [*(f"- {markdown(point)}" for point in points), ""]


def _bold(stamps: Sequence[str]) -> list[str]:
    return [line for stamp in stamps for line in (f"**{markdown(stamp)}**", "")]
