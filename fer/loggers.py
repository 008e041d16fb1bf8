"""The W&B logger: recorded in the run folder, uploaded beside the run where there are credentials and a server.

Neither W&B's server nor its local process can hold a run up or end it: `fer.wandb_upload` waits for the one, and a run
whose record breaks off goes on without it, since everything is in the run folder's own files too.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger

from fer.reporting.aggregate import title
from fer.reporting.figures import confusion_figure
from fer.wandb_server import choose_way
from fer.wandb_upload import Upload

log = logging.getLogger(__name__)
# W&B would read the metadata of every package installed, most of a second; results.json has the versions that matter.
RECORDED = {"x_save_requirements": False}


class Wandb(WandbLogger):
    """Lightning's W&B logger inside the run folder.

    Args:
        project, entity: where the run goes on W&B.
        group: runs that belong together: a sweep, or all runs of one data set and model.
        job_type: ``train``, ``fold``, ``eval`` or ``summary``.
        tags: words to filter by.
        mode: ``auto`` (see `fer.wandb_server.choose_way`), ``online`` (W&B's own client, which may wait for its
            server) or ``offline``.
        upload_seconds: how long the run's end waits for an upload, which goes on without it then.
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
        upload_seconds: float,
        run_id: str,
        name: str,
        save_dir: str,
    ) -> None:
        way = choose_way(mode)
        log.info("W&B: %s", way.said)
        self.upload_seconds = upload_seconds
        self.uploads = way.upload
        self.upload: Upload | None = None
        options: dict[str, Any] = {"entity": entity, "group": group, "job_type": job_type, "tags": list(tags)}
        os.environ.setdefault("WANDB_SILENT", "true")
        options["settings"] = dict(RECORDED)
        super().__init__(
            project=project,
            name=name,
            save_dir=save_dir,
            id=run_id,
            resume="allow",
            mode=way.mode,
            log_model=False,
            **options,
        )
        # Lightning passes this on although W&B no longer knows it and warns.
        self._wandb_init.pop("anonymous", None)

    @property
    def experiment(self) -> Any:
        """As in Lightning; W&B's run."""
        if self._experiment is None:
            _set_up(self._wandb_init["mode"])
        return super().experiment

    def attempt(self, work: Callable[[Any], Any]) -> None:
        """Let W&B record something; without it the run goes on.

        Args:
            work: called with W&B's run.
        """
        import wandb

        try:
            work(self.experiment)
            if self.uploads and self.upload is None:
                self.upload = Upload(Path(self.experiment.settings.sync_file))
        except (OSError, wandb.errors.Error) as error:  # its local process was killed, or cannot write
            log.warning("W&B's record ends here, the run goes on and its own files hold everything: %s", error)
            _end_local_process()  # or this process's next run would look for the dead one
            self._experiment = wandb.init(mode="disabled")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As in Lightning."""
        self.attempt(lambda _: super(Wandb, self).log_metrics(metrics, step))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **options: Any) -> None:
        """As in Lightning."""
        self.attempt(lambda _: super(Wandb, self).log_image(key, images, step, **options))

    def finish(self, exit_code: int) -> None:
        """End W&B's run; 0 shows it as finished, anything else as failed."""
        self.attempt(lambda run: run.finish(exit_code=exit_code))
        _end_local_process()
        if self.upload is not None:
            self.upload.finish(self.upload_seconds)


def _set_up(mode: str) -> None:
    """Have W&B's telemetry offline too: it would talk to the server from this process, and wait for it at its end."""
    import wandb

    if mode == "offline":
        wandb.setup(wandb.Settings(mode="offline"))


def _end_local_process() -> None:
    """Wait until W&B's local process has written everything and ended: it keeps a file of each of its runs open."""
    import wandb

    with contextlib.suppress(OSError):
        wandb.teardown()


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
    way = choose_way(node.mode)
    _set_up(way.mode)
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
        mode=way.mode,
        dir=str(folder),
        config={"sweep": folder.name, "command": command, "jobs": record["jobs"]},
        settings=dict(RECORDED),
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
        _end_local_process()
    if way.upload:
        Upload(Path(run.settings.sync_file)).finish(node.upload_seconds)


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
