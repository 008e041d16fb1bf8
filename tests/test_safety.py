"""Configs and files are data: what runs a program under plain Hydra or plain unpickling is refused here by name."""

import ast
import logging
import pickletools
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, composed, train
from hostile import IN_CONFIG, IN_FILE, Bird
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import fer
from fer.checkpoints import load_checkpoint
from fer.config import CONF, check_command_line, compose_like_hydra, resolved
from fer.data.manifest import Manifest
from fer.data.store import open_store
from fer.errors import UserError
from fer.hub import ExportedModel
from fer.safety import read_config, refuse_unsafe, target_problem, unsafe_entries
from fer.sweep import plan
from fer.trained import open_run
from fer.weights import read_weights

ROOT = Path(fer.__file__).parent
CODE = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
HARMLESS = {"model": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}}


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Logging, search paths and modules are as before after a mechanism ran."""
    monkeypatch.syspath_prepend(str(tmp_path))
    root = logging.getLogger()
    handlers, level, known = list(root.handlers), root.level, set(sys.modules)
    loggers = [logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    silent = [logger.disabled for logger in loggers]
    yield
    root.handlers[:], root.level = handlers, level
    for logger, disabled in zip(loggers, silent, strict=True):
        logger.disabled = disabled
    GlobalHydra.instance().clear()
    for name in ("nest", "birds", "hubconf"):
        if name not in known:
            sys.modules.pop(name, None)


# -- configs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_CONFIG)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_configs_that_run_a_program(tmp_path: Path, name: str) -> None:
    mechanism, canary = IN_CONFIG[name], tmp_path / "canary"
    config = OmegaConf.create(mechanism.config(canary))
    assert not canary.exists()
    with pytest.raises(UserError, match="is refused") as caught:
        refuse_unsafe(config)
    assert mechanism.named in str(caught.value)
    with pytest.raises(UserError, match="is refused"):
        resolved(config)
    assert not canary.exists()
    try:  # most fail after they have done their harm
        mechanism.plain(config)
    except Exception as error:
        print(error)
    assert canary.exists() or canary.with_suffix(".canary").exists()


def test_there_are_enough_and_harmless_ones_run() -> None:
    assert len(IN_CONFIG) + len(IN_FILE) >= 12
    config = OmegaConf.create(HARMLESS)
    refuse_unsafe(config)
    assert instantiate(config.model)([torch.zeros(1, requires_grad=True)]).defaults["lr"] == 0.1
    assert check_command_line("train", []).model._target_ == "fer.models.cbam_resnet.CBAMResNet"
    page = (CONF.parent / "docs/safety.md").read_text()
    for name in (*IN_CONFIG, *IN_FILE):
        assert f"| {name} |" in page, name


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "subprocess.run", "builtins.eval", "pathlib.Path.unlink", "hydra.utils.instantiate"),
        *("logging.os.system", "fer.data.store.shutil.rmtree", "fer.data.store.Path", "torch.optim.torch.load"),
        *(
            "fer.experiment.run_experiment",
            "fer.prediction.output.Output",
            "fer.models.dan.os",
            "albumentations.os.system",
        ),
        *("lightning.pytorch.callbacks.ModelCheckpoint.from_file", "albumentations.from_dict", "timm.create_model"),
        *("hydra.experimental.callbacks.PickleJobInfoCallback", "torch.utils.cpp_extension.load", "", 7, None, ["x"]),
    ],
)
def test_targets_are_judged_by_name(target: object) -> None:
    assert target_problem(target) is not None
    assert unsafe_entries(OmegaConf.create({"model": {"deep": [{"_target_": target}]}}))


def test_our_own_configs_are_allowed() -> None:
    targets = 0
    for path in sorted(CONF.rglob("*.yaml")):
        text = path.read_text()
        assert unsafe_entries(OmegaConf.create(yaml.load(text, yaml.CSafeLoader))) == [], path
        targets += text.count("_target_:")
    assert targets >= 100
    assert unsafe_entries(composed(*TINY)) == []


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PATH"])
def test_configs_do_not_tell_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config stands in its run's folder and on W&B, so what it refers to does too."""
    monkeypatch.setenv(name, "secret")
    for text in (f"${{oc.env:{name}}}", "${oc.${kind}:" + name + "}", f"${{oc.env:{name},none}}"):
        config = OmegaConf.create({"kind": "env", "group": text})
        assert config.group == "secret"
        with pytest.raises(UserError, match=r"group=.* is refused"):
            resolved(config)
    monkeypatch.setenv("FER_DATA", "here")
    assert resolved(OmegaConf.create({"root": "${oc.env:FER_DATA,data}/rafdb"})) == {"root": "here/rafdb"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--config-dir=nest"], "--config-dir"),
        (["--config-path=nest"], "--config-path"),
        (["--config-name=../nest/evil"], "--config-name"),
        (["--experimental-rerun=canary.pickle"], "--experimental-rerun is refused: it unpickles"),
        (["hydra.searchpath=[pkg://nest]"], "hydra.searchpath is refused"),
        (["+hydra.job.env_set.PATH=nest"], "hydra.job.env_set.PATH=nest is refused"),
        (["-m", "hydra/launcher=ray", "+hydra.launcher.ray.init.runtime_env={pip: [evil]}"], "runtime_env"),
        (["-m", "hydra/sweeper=optuna", "hydra.sweeper.storage='redis://evil'"], "hydra.sweeper.storage=redis://evil"),
    ],
)
def test_command_lines_that_would_read_other_things(
    tmp_path: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile.package(tmp_path / "canary")
    if "hydra/sweeper=optuna" in words:
        pytest.importorskip(
            "hydra_plugins.hydra_optuna_sweeper", reason="Hydra composes it only with the extra `sweeps`"
        )
    with pytest.raises(SystemExit) as caught:
        check_command_line("train", words)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()


def test_files_that_a_sweep_chooses_among(tmp_path: Path) -> None:
    """Hydra sets up a job's logging by the job's own config, before the job's code runs."""
    canary = tmp_path / "canary"
    evil = hostile.job_logging(handlers={"x": {"()": "builtins.open", "file": str(canary), "mode": "w"}})
    (tmp_path / "evil.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(evil)))
    name = "../" * len((CONF / "experiment").parts) + str(tmp_path / "evil").lstrip("/")
    words = ["-m", f"experiment={name},demo"]
    config = compose_like_hydra("train", words)
    assert unsafe_entries(config) == []  # the choice is still open
    with pytest.raises(UserError, match=r"hydra\.job_logging\.handlers\.x\.\(\)=builtins\.open is refused"):
        plan(config, words)
    assert not canary.exists()
    job = hostile.composed_plainly(f"experiment={name}")
    OmegaConf.set_readonly(job.hydra, False)
    job.hydra.runtime.output_dir = str(tmp_path)
    try:
        hostile.logs(job)
    except ValueError as error:
        print(error)
    assert canary.exists()


def test_options_of_hydras_among_what_is_swept() -> None:
    for key in ("hydra.job.chdir", "+hydra.callbacks.x._target_", "experiment@hydra.job_logging"):
        config = OmegaConf.create({"hydra": {"sweeper": {"params": {key: "true"}}}})
        assert any(f"hydra.sweeper.params.{key}=true is refused" in line for line in unsafe_entries(config))
    assert (
        unsafe_entries(OmegaConf.create({"hydra": {"sweeper": {"params": {"seed": "0,1", "model": "dan,vit"}}}})) == []
    )


def test_hydras_own_list_can_be_lifted_and_ours_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "egg").touch()
    node = {"_target_": "os.rename", "_args_": [str(tmp_path / "egg"), str(tmp_path / "canary")]}
    with pytest.raises(InstantiationException, match=r"os\.rename"):
        instantiate(node)
    monkeypatch.setenv("HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE", "os.rename")
    with pytest.raises(UserError, match=r"os\.rename is refused"):
        refuse_unsafe(OmegaConf.create({"model": node}))
    assert not (tmp_path / "canary").exists()
    instantiate(node)
    assert (tmp_path / "canary").exists()


def test_an_attack_on_the_command_line_leaves_no_trace(tmp_path: Path) -> None:
    attack = ["++hydra.callbacks.x._target_=pathlib.Path.touch", "++hydra.callbacks.x._args_=[canary]"]
    done = train(*TINY, *attack, cwd=tmp_path)
    assert done.returncode == 2
    assert "pathlib.Path.touch" in done.stderr
    assert not list(tmp_path.iterdir())


def test_exports_of_others(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(UserError, match=r"model\._target_=pathlib\.Path\.touch is refused"):
        ExportedModel(model=hostile.touch(canary), preprocessing={}, temperature=None, about={})
    assert not canary.exists()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_FILE)
@pytest.mark.filterwarnings("ignore")
def test_files_that_run_a_program(whole: Path, tmp_path: Path, name: str) -> None:
    mechanism, canary, path = IN_FILE[name], tmp_path / "canary", tmp_path / "best.ckpt"
    mechanism.write(path, canary)
    canary.unlink(missing_ok=True)  # what was scripted has run once
    with pytest.raises(UserError, match=r"best\.ckpt"):
        read_config(path, "x") if name.startswith("YAML") else load_checkpoint(path)
    with pytest.raises(UserError, match=r"best\.ckpt"):
        read_weights(str(path), "model.pretrained", "go on without")
    assert not canary.exists()
    try:
        mechanism.plain(path)
    except Exception as error:
        print(error)
    assert canary.exists()
    assert load_checkpoint(whole / "checkpoints/best.ckpt")["state_dict"]  # and an honest one is read


def test_rerunning_a_pickle_runs_it(tmp_path: Path) -> None:
    """What --experimental-rerun, refused above, does with its file."""
    IN_FILE["a bare pickle"].write(tmp_path / "config.pickle", tmp_path / "canary")
    with pytest.raises(AttributeError), pytest.warns(UserWarning, match="rerun"):
        hostile.rerun(tmp_path / "config.pickle")
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("file", ["manifest.npz", "images.npy", "windows.npy", "pixels.npy"])
def test_a_store_with_a_pickle(tmp_path: Path, file: str) -> None:
    found = Manifest(item=np.array(["a"]), label=np.array([0]), class_names=("x",), split=np.array([""]), form="one")

    def opened() -> object:
        key = {"size": 8, "channels": 1}
        return open_store(
            tmp_path, "one", key, lambda: found, lambda m, rows: (np.zeros((8, 8), np.uint8) for _ in rows), False
        )

    path = opened().path / file  # type: ignore[attr-defined]
    birds = np.array([Bird(tmp_path / "canary")], dtype=object)
    if file.endswith(".npz"):
        np.savez(path, item=birds, text=birds)
    else:
        np.save(path, birds, allow_pickle=True)
    with pytest.raises(UserError, match="are damaged"):
        opened()
    assert not (tmp_path / "canary").exists()
    content = np.load(path, allow_pickle=True)
    _ = content["item"] if file.endswith(".npz") else content
    assert (tmp_path / "canary").exists()


def test_no_pickle_in_what_a_run_leaves(whole: Path, cache: Path) -> None:
    """PyTorch's checkpoint is the one exception: the pickle in its zip names tensors and containers alone."""
    open_run(whole).data().open()
    files = [path for folder in (whole, cache) for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".ckpt", ".npz", ".npy", ".json", ".csv", ".yaml", ".png", ".wandb"} <= kinds
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".ckpt":
            assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
            assert sum(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist()) == 1
        elif path.suffix in (".npz", ".npy"):
            loaded = np.load(path, allow_pickle=False)
            arrays = [loaded[name] for name in loaded.files] if path.suffix == ".npz" else [loaded]
            assert not any(array.dtype.hasobject for array in arrays)
        else:
            assert not is_pickle(content), path
            assert not zipfile.is_zipfile(path), path


def is_pickle(content: bytes) -> bool:
    """Whether bytes are a pickle of any protocol to its end."""
    try:
        return bool(list(pickletools.genops(content)))
    except Exception:
        return False


# -- the code ----------------------------------------------------------------------------------------------------------

FORBIDDEN = (
    *(
        "eval",
        "exec",
        "os.system",
        "os.popen",
        "torch.jit.load",
        "torch.hub.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *("pd.read_pickle", "pickle.load", "joblib.load", "to_pickle", "load_from_checkpoint", "add_safe_globals"),
)
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
DECODERS = ("cv2.imread", "cv2.imdecode", "PIL.Image.open", "Image.open", "decode_image")


def test_nothing_here_unpickles() -> None:
    seen = dict.fromkeys(NEEDED, 0)
    for path, tree in CODE.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert name not in FORBIDDEN, f"{path}: {name}"
            assert not name.endswith((".to_pickle", ".load_from_checkpoint", ".add_safe_globals")), path
            assert options.get("shell") != "True", path
            assert options.get("allow_pickle", "False") == "False", path
            if name in NEEDED:
                key, value = NEEDED[name]
                assert options.get(key) == str(value), f"{path}: {name} without {key}={value}"
                seen[name] += 1
            if name == "yaml.load":
                assert ast.unparse(node.args[1]) == "LOADER", path
    assert all(seen.values())
    assert 'getattr(yaml, "CSafeLoader", yaml.SafeLoader)' in (ROOT / "reporting/collect.py").read_text()


def test_one_decoder() -> None:
    """Training, prediction and serving see the same pixels because the same function reads them."""
    found = {
        path
        for path, tree in CODE.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in DECODERS
    }
    # The others read a run's own thumbnails, and what a loader of others would cost.
    assert found <= {"data/images.py", "reporting/pictures.py", "benching/data.py"}


def test_the_page_shows_text_as_text() -> None:
    script = (ROOT / "prediction/page.js").read_text()
    for door in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert door not in script
    assert "script" not in (ROOT / "prediction/page.html").read_text().replace('<script src="page.js"></script>', "")


def test_pages_in_markdown_show_text_as_text() -> None:
    from fer.reporting.aggregate import _markdown_table
    from fer.reporting.tables import inert

    name = "a|b\n<script>alert(1)</script>"
    assert inert(name) == "a\\|b &lt;script>alert(1)&lt;/script>"
    assert _markdown_table(["x"], [[name]])[-1] == f"| {inert(name)} |"
