"""The W&B dashboard: its panels are over what runs really log, and the same command renews it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import composed
from fake_wandb import wandb_records
from wandb_workspaces.workspaces import Workspace, internal

from fer.dashboard import COLUMNS, layout, run
from fer.errors import UserError
from fer.labels import BASIC_7
from fer.loggers import log_summary

# What a run logs only with a detector, and a summary only in a sweep.
DETECTION = {"test/detections", "test/regions", "test/map50", "test/face_ap50"}
SUMMARY = {"groups", "runs"}


class Server:
    """W&B's side of the two requests: views by their name, as the service keeps them."""

    app_url = "https://wandb.example"

    def __init__(self) -> None:
        self.projects = {("team", "fer")}
        self.views: dict[str, dict[str, str]] = {}

    def execute_graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if (variables["entityName"], variables["projectName"]) not in self.projects:
            return {"project": None}
        if "mutation" in query:
            known = self.views.get(variables["name"], {"id": f"V{len(self.views)}"})
            # The service makes a second view of a name, unless it is told which one to change.
            assert (variables["name"] in self.views) == ("id" in variables)
            assert variables.get("id", known["id"]) == known["id"]
            self.views[variables["name"]] = {**variables, "id": known["id"]}
            return {"upsertView": {"view": {"id": known["id"], "name": variables["name"]}}}
        found = [view for name, view in self.views.items() if name == variables["viewName"]]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    here = Server()

    class Api:
        def __init__(self) -> None:
            self._service_api = here

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr("fer.dashboard.reachable", lambda *_: True)
    return here


def saved(server: Server, name: str) -> Workspace:
    """A view as W&B's own client reads it back."""
    (view,) = [view for view in server.views.values() if view["displayName"] == name]
    spec = internal.WorkspaceViewspec.model_validate_json(view["spec"])
    parts = {"entity": "team", "project": "fer", "display_name": name, "name": view["name"], "id": view["id"]}
    return Workspace._from_model(internal.View(**parts, spec=spec))


def plain(server: Server, name: str) -> Any:
    return json.loads(next(view for view in server.views.values() if view["displayName"] == name)["spec"])


def leaves(node: Any) -> Iterator[str]:
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from leaves(value)
    if isinstance(node, str):
        yield node


def test_the_view_is_saved_once_and_renewed(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    run(composed("entity=team", command="dashboard"))
    first = capsys.readouterr().out
    run(composed("entity=team", command="dashboard"))
    assert first == capsys.readouterr().out
    assert first.startswith("dashboard: https://wandb.example/team/fer?nw=")
    assert [view["displayName"] for view in server.views.values()] == ["fer"]
    run(composed("entity=team", "group=cv5-1a2b3c4d", command="dashboard"))
    run(composed("entity=team", "name=mine", command="dashboard"))
    assert [view["displayName"] for view in server.views.values()] == ["fer", "cv5-1a2b3c4d", "mine"]


def test_a_team_sees_comparison_matrices_and_curves_without_clicking(server: Server) -> None:
    run(composed("entity=team", "group=cv5-1a2b3c4d", command="dashboard"))
    view = saved(server, "cv5-1a2b3c4d")
    assert [s.name for s in view.sections if s.is_open] == [
        *("Comparison", "Confusion matrices", "Curves by fold and network"),
    ]
    spec = plain(server, "cv5-1a2b3c4d")["section"]
    assert "cv5-1a2b3c4d" in json.dumps(spec["runSets"][0]["filters"])
    panels = [panel for section in spec["panelBankConfig"]["sections"] for panel in section["panels"]]
    kinds = {panel["viewType"] for panel in panels}
    assert {"Run History Line Plot", "Bar Chart", "Media Browser", "Vega2", "Weave"} <= kinds
    grouped = {panel["config"].get("groupBy") for panel in panels}
    assert {"model_name.value", "protocol.value.fold"} <= grouped
    vega = [panel["config"] for panel in panels if panel["viewType"] == "Vega2"]
    assert {config["panelDefId"] for config in vega} == {"wandb/confusion_matrix/v1"}


def metrics_of(workspace: Workspace) -> set[str]:
    """Every key of a run's history or summary that a panel or a column shows."""
    keys = {column.removeprefix("summary:") for column in COLUMNS if column.startswith("summary:")}
    for section in workspace.sections:
        for panel in section.panels:
            for name in ("y", "metrics", "media_keys"):
                keys |= {getattr(key, "name", key) for key in getattr(panel, name, ())}
            keys |= {panel.table_name} if hasattr(panel, "table_name") else set()
            keys |= {panel.query["summaryTable"]["tableKey"]} if hasattr(panel, "chart_fields") else set()
    return keys


def logged(folder: Path) -> tuple[set[str], dict[str, Any]]:
    """Keys of an offline run's history and summary, and its config."""
    keys, config = set(), {}
    for record in wandb_records(folder):
        keys |= {item.key or "/".join(item.nested_key) for item in record.summary.update}
        keys |= {item.key or item.nested_key[0] for item in record.history.item}
        updates = [*record.run.config.update, *record.config.update]
        config |= {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in updates}
    return keys, config


def test_every_panel_is_over_what_runs_log(whole: Path, tmp_path: Path) -> None:
    workspace = layout("team", "fer", None, None)
    keys, config = logged(whole)
    wanted = metrics_of(workspace)
    assert len(wanted) > 25
    assert wanted - keys == DETECTION | SUMMARY | {"test/acc_contempt"}  # the run's faces show 7 expressions
    assert {f"test/acc_{name}" for name in BASIC_7} <= wanted
    for column in COLUMNS:
        if column.startswith("config:"):
            name, *inner = column.removeprefix("config:").replace(".value", "").split(".")
            assert name in config
            assert inner in ([], ["fold"])  # of protocols that have folds
    record = {"jobs": 0, "groups": []}
    log_summary(composed().logger.wandb, tmp_path, "0" * 8, "cv5", "command", record)
    assert logged(tmp_path)[0] >= SUMMARY


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "entity is missing"),
        (["entity=team", "project=null"], "project is empty"),
        (["entity=nobody"], "no project nobody/fer that you may see"),
    ],
)
def test_mistakes_are_one_sentence(server: Server, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(composed(*words, command="dashboard"))
    assert not server.views


def test_without_credentials_or_network_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("entity=team", command="dashboard")
    with pytest.raises(UserError, match=r"no credentials for api\.wandb\.ai"):
        run(config)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 does not answer"):
        run(config)
