"""``python -m fer.dashboard``: a view of a W&B project in which everything stands ready, laid out by code.

python -m fer.dashboard entity=my-team                      every run of the project
python -m fer.dashboard entity=my-team group=cv5-1a2b3c4d   the runs of one sweep
"""

import hashlib
import importlib.util
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from fer.config import start
from fer.errors import UserError
from fer.labels import EXPRESSIONS
from fer.safety import refuse_unsafe
from fer.wandb_server import address, has_credentials, reachable

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

CONFIG = "dashboard"
COLUMNS = [  # of the table of runs
    *("config:data_name.value", "config:model_name.value", "config:protocol_name.value", "config:protocol.value.fold"),
    *("config:seed.value", "summary:best/val/mean_acc", "summary:test/acc", "summary:test/mean_acc"),
]


def run(config: DictConfig) -> None:
    """Save the view.

    Raises:
        UserError: a name is missing, the extra is not installed, no credentials, no answer, or no such project.
    """
    refuse_unsafe(config)
    if OmegaConf.is_missing(config, "entity") or not config.entity:
        raise UserError("entity is missing: set entity=<the team or user whose W&B project it is>")
    if not config.project:
        raise UserError("project is empty: set project=fer, or what logger.wandb.project was in training")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("wandb-workspaces is not installed; pip install 'fer-bench[dashboard]' brings it")
    host, port = address()
    if not has_credentials(host):
        raise UserError(f"no credentials for {host}: run `wandb login`, or set WANDB_API_KEY")
    if not reachable(host, port):
        raise UserError(f"{host}:{port} does not answer: the view is saved there, so this needs a network")
    print(f"dashboard: {save(layout(config.entity, config.project, config.group, config.name))}")


def layout(entity: str, project: str, group: str | None, name: str | None) -> "Workspace":
    """The view, not saved yet."""
    import wandb_workspaces.workspaces as ws

    workspace = ws.Workspace(entity=entity, project=project, name=name or group or "fer", sections=sections())
    workspace.settings = ws.WorkspaceSettings(x_axis="epoch", max_runs=100)  # a sweep's folds are all drawn
    workspace.runset_settings = ws.RunsetSettings(
        filters=[ws.Metric("Group") == group] if group else "", pinned_columns=list(COLUMNS)
    )
    return workspace


def sections() -> "list[Section]":
    """The panels, over what `fer.callbacks`, `fer.at_test` and `fer.loggers` log."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def bars(title: str, metrics: list[str], by: str) -> wr.BarPlot:
        grouped = {"groupby": wr.Config(by), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
        return wr.BarPlot(title=title, metrics=metrics, orientation="v", **grouped)

    def lines(title: str, metrics: list[str], by: str | None = None) -> wr.LinePlot:
        grouped = {"groupby": wr.Config(by), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"} if by else {}
        return wr.LinePlot(title=title, x="epoch", y=metrics, smoothing_type="none", max_runs_to_show=100, **grouped)

    def matrix(part: str) -> wr.CustomChart:
        names = {name: name for name in ("Actual", "Predicted", "nPredictions")}
        chart = wr.CustomChart.from_table(
            f"{part}/confusion_table", chart_fields=names, chart_strings={"title": f"{part} confusion matrix"}
        )
        chart.chart_name = "wandb/confusion_matrix/v1"  # what wandb.plot.confusion_matrix draws
        return chart

    comparison = [
        wr.WeavePanelSummaryTable(table_name="groups"),  # of the sweeps' summary runs
        wr.WeavePanelSummaryTable(table_name="runs"),
        bars("test accuracy by network: mean, deviation", ["test/acc"], "model_name"),
        bars("test mean class accuracy by network", ["test/mean_acc"], "model_name"),
        bars("test accuracy by fold", ["test/acc"], "protocol.fold"),
        bars("test accuracy by data set", ["test/acc"], "data_name"),
    ]
    confusion = [
        wr.MediaBrowser(title="test", media_keys=["test/confusion_image"], gallery_axis="run", num_columns=2),
        wr.MediaBrowser(title="validation", media_keys=["val/confusion_image"], gallery_axis="run", num_columns=2),
        matrix("test"),
        matrix("val"),
    ]
    curves = [
        lines("validation mean class accuracy, every run", ["val/mean_acc"]),
        lines("validation mean class accuracy by network", ["val/mean_acc"], "model_name"),
        lines("validation mean class accuracy by fold", ["val/mean_acc"], "protocol.fold"),
        lines("accuracy, train and validation", ["train/acc", "val/acc"]),
        lines("loss, train and validation", ["train/loss", "val/loss"]),
        lines("loss by network", ["train/loss", "val/loss"], "model_name"),
    ]
    classes = [bars(f"test accuracy: {name}", [f"test/acc_{name}"], "model_name") for name in EXPRESSIONS]
    calibration = [
        bars("expected calibration error by network", ["test/ece"], "model_name"),
        bars("negative log-likelihood by network", ["test/nll"], "model_name"),
    ]
    wrong = wr.WeavePanelSummaryTable(table_name="test/most_confidently_wrong")
    faces = [
        wr.MediaBrowser(title="found, beside the truth", media_keys=["test/detections"], gallery_axis="run"),
        wr.MediaBrowser(title="regions", media_keys=["test/regions"], gallery_axis="run"),
        bars("mAP@0.5 by network", ["test/map50"], "model_name"),
        bars("face AP@0.5 by network", ["test/face_ap50"], "model_name"),
    ]
    wide, pairs = ws.SectionLayoutSettings(columns=2, rows=3), ws.SectionLayoutSettings(columns=2, rows=2)
    return [
        ws.Section(name="Comparison", panels=comparison, is_open=True, pinned=True, layout_settings=wide),
        ws.Section(name="Confusion matrices", panels=confusion, is_open=True, layout_settings=pairs),
        ws.Section(name="Curves by fold and network", panels=curves, is_open=True, layout_settings=wide),
        ws.Section(name="Classes", panels=classes),
        ws.Section(name="Calibration", panels=calibration, layout_settings=pairs),
        ws.Section(name="Confidently wrong", panels=[wrong]),
        ws.Section(name="Faces and regions found", panels=faces, layout_settings=pairs),
    ]


def save(workspace: "Workspace") -> str:
    """Save a view, in place of an older one of the same name.

    Returns:
        Its address.

    Raises:
        UserError: W&B knows no such project, or refuses.
    """
    import wandb
    from wandb_workspaces.workspaces import internal
    from wandb_workspaces.workspaces.errors import SpecVersionError

    # W&B's own name of the view comes from ours, so that the same command finds it again.
    text = "/".join((workspace.entity, workspace.project, workspace.name))
    key = hashlib.sha256(text.encode()).hexdigest()[:11]
    workspace._internal_name = f"nw-{key}-v"
    try:
        try:
            workspace._internal_id = internal.get_view_dict(workspace.entity, workspace.project, key)["id"]
        except ValueError as error:
            if "not found in project" not in str(error):
                raise UserError(
                    f"W&B has no project {workspace.entity}/{workspace.project} that you may see: upload its runs "
                    "first (wandb sync), or set entity= and project="
                ) from None
        workspace.save()
    except SpecVersionError:
        raise UserError(f"W&B has changed the form of the view {workspace.name}: set another name=") from None
    except wandb.errors.Error as error:
        raise UserError(f"W&B refused to save the view {workspace.name}: {error}") from None
    return str(workspace.url)


def main() -> None:
    """The command."""
    start(CONFIG, run)


if __name__ == "__main__":
    main()
