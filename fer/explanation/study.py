"""The figures of one or several runs, drawn and written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fer.data.base import ExpressionDataModule
from fer.errors import UserError
from fer.explanation.attention import attention
from fer.explanation.cam import cam
from fer.explanation.crops import inputs, opened
from fer.explanation.embedding import Seen, look, perplexity, pick, plane
from fer.explanation.pictures import (
    Panel,
    Shown,
    attention_figure,
    confusion_figure,
    distribution_figure,
    embedding_figure,
    save,
)
from fer.metrics import Array
from fer.runs import write_json
from fer.trained import TrainedRun, open_run


@dataclass(frozen=True)
class Options:
    """The values of ``conf/explain.yaml``, where they are explained."""

    figures: list[str]
    points: int
    pictures: int
    maps: int
    seed: int
    device: str
    root: str | None


def explain(folders: Sequence[Path], output: Path, options: Options) -> list[Path]:
    """Write the figures of runs, and ``explain.json`` with what is in them.

    Args:
        folders: run folders; t-SNE has a panel for each, the other figures are drawn for each alone.
        output: the folder to write to.
        options: what to draw.

    Returns:
        The files written.

    Raises:
        UserError: a folder that cannot be opened or made, or data that is not where it was.
    """
    runs = [open_run(folder, options.device) for folder in folders]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be made ({error.strerror}): choose another folder") from None
    written: list[Path] = []
    record: dict[str, Any] = {"seed": options.seed, "runs": [_identity(run) for run in runs]}
    panels = []
    for number, run in enumerate(runs, 1):
        end = f"-{number}" if len(runs) > 1 else ""
        record_of_run, stamps = record["runs"][number - 1], list(run.results["stamps"])
        if "classes" in options.figures:
            figure = distribution_figure(run.results["data_facts"]["counts"], f"Classes of {_data(run)}")
            written += save(figure, output / f"classes{end}", stamps)
        if "confusion" in options.figures:
            title = f"{run.results['model']} on {_data(run)}, test part, n = {run.results['n']['test']:,}"
            figure = confusion_figure(run.results["confusion"]["test"], run.results["classes"], title)
            written += save(figure, output / f"confusion{end}", stamps)
        if {"tsne", "attention"} & set(options.figures):
            data = opened(run, options.root)
            seen = look(run, data, options.points, options.seed)
            record_of_run |= {"images": len(seen.rows), "acc": float((seen.label == seen.predicted).mean())}
            if "tsne" in options.figures:
                panels.append(_panel(run, seen, options.seed))
            if "attention" in options.figures:
                shown, told = _shown(run, data, seen, options)
                n = f"{len(shown)} of {len(data.split.test):,}"
                title = f"Where {run.results['model']} looks, {_data(run)}, test part, n = {n}; "
                title += "each map from its least (dark) to its greatest value (bright)"
                right, wrong = ([one for one in shown if (one.label == one.predicted) == so] for so in (True, False))
                written += save(attention_figure(right, wrong, title), output / f"attention{end}", stamps)
                record_of_run["attention"] = told
    if panels:
        record["perplexity"] = [perplexity(len(panel.points)) for panel in panels]
        stamps = list(dict.fromkeys(stamp for run in runs for stamp in run.results["stamps"]))
        written += save(embedding_figure(panels, _embedding_title(runs, panels)), output / "tsne", stamps)
    write_json(output / "explain.json", record)
    return [*written, output / "explain.json"]


def _identity(run: TrainedRun) -> dict[str, Any]:
    names = ("name", "model", "data", "seed", "fold", "code_version", "stamps")
    return {"run": str(run.folder.path)} | {name: run.results[name] for name in names}


def _data(run: TrainedRun) -> str:
    return str(run.results["data_facts"]["data"])


def _panel(run: TrainedRun, seen: Seen, seed: int) -> Panel:
    acc = 100 * float((seen.label == seen.predicted).mean())
    title = f"{run.results['model']}, {acc:.1f} % right"
    return Panel(title, plane(seen.features, seed), seen.label, run.module.class_names)


def _embedding_title(runs: Sequence[TrainedRun], panels: Sequence[Panel]) -> str:
    def joined(values: list[str]) -> str:
        return " | ".join(dict.fromkeys(values))

    counts = joined(
        [f"{len(panel.points):,} of {run.results['n']['test']:,}" for run, panel in zip(runs, panels, strict=True)]
    )
    return f"t-SNE of features: {joined([_data(run) for run in runs])}, test part, n = {counts}"


def _shown(
    run: TrainedRun, data: ExpressionDataModule, seen: Seen, options: Options
) -> tuple[list[Shown], list[dict[str, str]]]:
    """The rows of the attention figure, and what each is."""
    places = np.concatenate([pick(seen, right, options.pictures, options.seed) for right in (True, False)])
    image = inputs(run, data, seen.rows[places])
    own = [one for one in attention(run.module, image) if one.map is not None][-options.maps :] if options.maps else []
    maps: dict[str, Array] = {"Grad-CAM": cam(run, image)}
    maps |= {one.name: one.map.float().cpu().numpy() for one in own if one.map is not None}
    mean, std = (np.array(values) for values in (run.module.mean, run.module.std))
    pixels = np.clip(image.permute(0, 2, 3, 1).cpu().numpy() * std + mean, 0, 1)
    names = run.module.class_names
    shown, told = [], []
    for i, place in enumerate(places):
        label, predicted = names[seen.label[place]], names[seen.predicted[place]]
        shown.append(Shown(pixels[i], label, predicted, {name: values[i] for name, values in maps.items()}))
        item = str(data.store.manifest.item[seen.rows[place]])
        told.append({"item": item, "label": label, "predicted": predicted})
    return shown, told
