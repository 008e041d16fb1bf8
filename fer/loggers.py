"""The W&B logger: online with credentials and a reachable server, offline otherwise, decided before any wait."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger

from fer.reporting.aggregate import title
from fer.reporting.figures import confusion_figure
from fer.wandb_server import choose_mode

log = logging.getLogger(__name__)


def _mode(asked: str) -> Any:
    return choose_mode() if asked == "auto" else asked


class Wandb(WandbLogger):
    """Lightning's W&B logger inside the run folder.

    Args:
        project, entity: where the run goes on W&B.
        group: runs that belong together: a sweep, or all runs of one data set and model.
        job_type: ``train``, ``fold``, ``eval`` or ``summary``.
        tags: words to filter by.
        mode: ``auto`` (see `fer.wandb_server.choose_mode`), ``online`` or ``offline``.
        run_id: the run's id, the same again after a resume.
        name: the run's name.
        save_dir: the run folder.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        group: str | None,
        job_type: str,
        tags: list[str],
        mode: str,
        run_id: str,
        name: str,
        save_dir: str,
    ) -> None:
        chosen = _mode(mode)
        log.info("W&B: %s", chosen if chosen == "online" else f"{chosen}; `wandb sync` uploads the run later")
        options: dict[str, Any] = {"entity": entity, "group": group, "job_type": job_type, "tags": list(tags)}
        os.environ.setdefault("WANDB_SILENT", "true")
        super().__init__(
            project=project,
            name=name,
            save_dir=save_dir,
            id=run_id,
            resume="allow",
            mode=chosen,
            log_model=False,
            **options,
        )
        # Lightning passes this on although W&B no longer knows it and warns.
        self._wandb_init.pop("anonymous", None)


def log_summary(node: Any, folder: Path, run_id: str, kind: str, command: str, record: dict[str, Any]) -> None:
    """One run that says what a sweep amounts to, in the sweep's group beside its jobs' runs.

    Args:
        node: the logger's config (``conf/logger/wandb.yaml``).
        folder: the sweep's folder, whose name is the group.
        run_id: the summary's id, the same again when the sweep is repeated.
        kind: the option of ``sweep=``, a word to filter by.
        command: the sweep's command.
        record: what `fer.reporting.aggregate.aggregate` returned.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    names = {name for group in record["groups"] for name in (group["model"], group["data"], group["protocol"]) if name}
    run = wandb.init(
        project=node.project,
        entity=node.entity,
        group=folder.name,
        job_type="summary",
        name=f"{folder.name}-summary",
        tags=[*sorted(names), kind],
        id=run_id,
        resume="allow",
        mode=_mode(node.mode),
        dir=str(folder),
        config={"sweep": folder.name, "command": command, "jobs": record["jobs"]},
    )
    try:
        run.log(_summary_content(record, wandb))
        for group in record["groups"]:
            place = f"{title(group)}/" if len(record["groups"]) > 1 else ""
            for metric, mean in group["mean"].items():
                low, high = group["interval"][metric]
                run.summary[f"{place}{metric}"] = {"mean": mean, "std": group["std"][metric], "low": low, "high": high}
            run.summary[f"{place}n"] = group["n"]
    finally:
        run.finish()


def _summary_content(record: dict[str, Any], wandb: Any) -> dict[str, Any]:
    """The table of groups, the table of their runs, and each group's summed confusion matrix."""
    metrics = ("test/acc", "test/mean_acc", "test/macro_f1", "val/mean_acc")
    moments = [f"{metric} {what}" for metric in metrics for what in ("mean", "std", "low", "high")]
    groups = wandb.Table(columns=["group", "n", *moments, "confusion", "stamps"])
    runs = wandb.Table(columns=["group", "run", *metrics])
    content: dict[str, Any] = {"groups": groups, "runs": runs}
    for group in record["groups"]:
        if not group["mean"]:
            continue
        counts = np.asarray(group["confusion"])
        picture = confusion_figure(
            counts, group["classes"], f"{title(group)}: {counts.sum()} held-out predictions", group["stamps"]
        )
        four = ((group["mean"][m], group["std"][m], *group["interval"][m]) for m in metrics)
        figures = [value for of_metric in four for value in of_metric]
        groups.add_data(title(group), group["n"], *figures, wandb.Image(picture), "; ".join(group["stamps"]))
        for i, name in enumerate(group["runs"]):
            runs.add_data(title(group), name, *(group["values"][m][i] for m in metrics))
        place = f"{title(group)}/" if len(record["groups"]) > 1 else ""
        label, predicted = np.nonzero(counts)
        repeats = counts[label, predicted]
        content[f"{place}test/confusion_image"] = wandb.Image(picture)
        content[f"{place}test/confusion"] = wandb.plot.confusion_matrix(
            y_true=np.repeat(label, repeats).tolist(),
            preds=np.repeat(predicted, repeats).tolist(),
            class_names=group["classes"],
            title=f"{title(group)}, all held-out predictions",
        )
    return content
