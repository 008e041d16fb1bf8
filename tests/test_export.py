"""What is exported answers as the run does, says where it comes from, and loads without trusting the folder."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from commands import call
from conftest import composed
from fake_runs import write_run
from huggingface_hub import ModelCard
from model_builds import MODELS, cheap, images, shaken
from safetensors.torch import load_file
from scipy import stats

from fer.errors import UserError
from fer.evaluation.calibration import Calibration, checkpoint_fingerprint
from fer.export import run as command
from fer.exporting import files
from fer.exporting.card import metric_rows
from fer.exporting.files import Options, export_onnx, export_safetensors, preprocessing_of
from fer.exporting.graph import answers_of, export_graph, session_of
from fer.exporting.int8 import cost, interleaved, method_for, quantise
from fer.exporting.zoo import best_runs
from fer.hub import ExportedModel
from fer.metrics import scores
from fer.reporting.collect import Answers
from fer.reporting.statistics import bootstrap_scores
from fer.trained import open_run

OPTIONS = Options(
    answers="logits",
    int8=True,
    licence="cc-by-nc-4.0",
    crops=20,
    calibration=20,
    repeats=20,
    seed=0,
    root=None,
)


@pytest.fixture(scope="module")
def run(whole):
    return open_run(whole)


@pytest.fixture(scope="module")
def crops(run):
    """Stored crops of the test part."""
    data = run.data()
    data.open()
    return torch.from_numpy(np.array(data.store.images[np.sort(data.split.test)]))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(run, folder, OPTIONS)
    return folder


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    export_safetensors(run, folder, OPTIONS)
    return folder


def logits_of(run, crops):
    image = run.finish("none")({"image": crops, "index": torch.arange(len(crops))}, epoch=0)["image"]
    with torch.inference_mode():
        return run.module(image).numpy()


def described(path):
    pairs = {one.key: one.value for one in onnx.load(path).metadata_props}
    return {key: value if key.endswith("processing") else _plain(value) for key, value in pairs.items()}


def _plain(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def literally(crops, facts):
    """The preprocessing that the metadata describes, in numpy."""
    side, crop = crops.shape[1], round(facts["fer.store_size"] * facts["fer.crop_pct"])
    assert crop == facts["fer.image_size"], "no resizing in this run"
    first = (side - crop) // 2
    pixels = crops.numpy()[:, first : first + crop, first : first + crop].transpose(0, 3, 1, 2) / 255.0
    if facts["fer.channels"] == 1:
        pixels = np.repeat(pixels, 3, axis=1)
    mean, std = (np.array(facts[f"fer.{key}"]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    return ((pixels - mean) / std).astype(np.float32)


def test_the_file_and_its_metadata_are_enough(run, crops, exported):
    facts = described(exported / "model.onnx")
    answers = answers_of(session_of(exported / "model.onnx"), literally(crops, facts))
    np.testing.assert_allclose(answers, logits_of(run, crops), atol=1e-4)
    assert facts["fer.class_names"] == run.module.class_names
    assert facts["fer.answers"] == "logits"
    assert facts["fer.temperature"] is None
    assert facts["fer.license"] == "cc-by-nc-4.0"
    assert facts["fer.weights"] == "random"
    assert facts["fer.stamps"] == run.results["stamps"]
    assert facts["fer.test"]["n"] == len(crops)
    assert not list(exported.glob("*.data")), "one file holds everything"


def test_the_record(exported):
    record = json.loads((exported / "export.json").read_text())
    check, int8 = record["check"], record["int8"]
    assert check["part"] == "test"
    assert check["crops"] == 20
    assert 0 <= check["largest_difference"] < check["tolerance"] == 1e-4
    assert record["bytes"] == (exported / "model.onnx").stat().st_size
    assert int8["bytes"] == (exported / "model.int8.onnx").stat().st_size < record["bytes"]
    assert int8["calibration"] == {"part": "val", "crops": 20}
    assert int8["method"] == "static"
    assert int8["milliseconds"]["repeats"] == 20
    table = (exported / "export.md").read_text()
    assert "n = 42 test images" in table
    assert "20 crops of the val part" in table


def test_int8_answers_nearly_alike(run, crops, exported):
    record = json.loads((exported / "export.json").read_text())["int8"]["test"]
    facts = described(exported / "model.int8.onnx")
    answers = answers_of(session_of(exported / "model.int8.onnx"), literally(crops, facts))
    logits = logits_of(run, crops)
    difference = np.abs(answers - logits).max()
    assert 0 < difference < 0.25 * (logits.max() - logits.min())
    data = run.data()
    data.open()
    label = data.label[np.sort(data.split.test)]
    right = [float((x.argmax(1) == label).mean()) for x in (logits, answers)]
    assert record["before"]["acc"] == pytest.approx(right[0])
    assert record["after"]["acc"] == pytest.approx(right[1])
    assert record["difference"] == pytest.approx(right[1] - right[0])
    assert record["same"] == pytest.approx((logits.argmax(1) == answers.argmax(1)).mean())


def test_ranges_are_never_of_the_test_part(run, monkeypatch, tmp_path):
    """Static quantisation sees the validation part's rows, and no others."""
    data = run.data()
    data.open()
    shown = []
    monkeypatch.setattr(files, "inputs", lambda run, data, rows: shown.append(set(rows.tolist())) or torch.zeros(1))
    monkeypatch.setattr("fer.exporting.int8.quantise", lambda path, target, image: _stop())
    with pytest.raises(InterruptedError):
        files._quantised(run, data, run.module.network, tmp_path, tmp_path, {}, OPTIONS)
    (rows,) = shown
    assert rows <= set(data.split.val.tolist())
    assert not rows & set(data.split.test.tolist())


def _stop():
    raise InterruptedError


@pytest.fixture
def drawn_before(exported, monkeypatch):
    """An export costs seconds: the graph is that of the other test, and what would have been exported is kept."""
    kept = []

    def export(network, image_size, path, answers):
        kept.append(network)
        shutil.copy(exported / "model.onnx", path)

    monkeypatch.setattr(files, "export_graph", export)
    return kept


def test_probabilities_with_a_temperature(whole, crops, drawn_before, monkeypatch, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    run = open_run(folder)
    calibration = Calibration(2.5, "val", 42, "none", checkpoint_fingerprint(run), {}, {})
    (folder / "calibration.json").write_text(json.dumps(dataclasses.asdict(calibration)))
    monkeypatch.setattr(files, "largest_difference", lambda network, session, image: 0.0)
    export_onnx(run, tmp_path, Options("probabilities", False, None, 5, 5, 20, 0, None))
    facts = described(tmp_path / "model.onnx")
    assert facts["fer.temperature"] == 2.5
    assert facts["fer.answers"] == "probabilities"
    with torch.inference_mode():
        answers = drawn_before[0](torch.from_numpy(literally(crops, facts)))
    powers = np.exp(logits_of(run, crops).astype(np.float64) / 2.5)
    np.testing.assert_allclose(answers, powers / powers.sum(1, keepdims=True), atol=1e-5)
    of_views = dataclasses.replace(calibration, tta="ten_crop")
    (folder / "calibration.json").write_text(json.dumps(dataclasses.asdict(of_views)))
    monkeypatch.setattr(files, "fit_temperature", lambda run, tta: dataclasses.replace(calibration, temperature=1.5))
    assert files.temperature_of(run) == 1.5, "one view has a temperature of its own"
    of_another = dataclasses.replace(calibration, fingerprint="of another checkpoint")
    (folder / "calibration.json").write_text(json.dumps(dataclasses.asdict(of_another)))
    assert files.temperature_of(run) is None


def test_wrong_graph_is_refused(run, drawn_before, tmp_path):
    with torch.no_grad():
        worse = copy.deepcopy(run.module)
        worse.network.classifier[-1].bias += 0.2
    changed = dataclasses.replace(run, module=worse)
    with pytest.raises(UserError, match=r"differs from PyTorch by 0\.2 on 5 test crops"):
        export_onnx(changed, tmp_path, Options("logits", False, None, 5, 5, 20, 0, None))
    assert json.loads((tmp_path / "export.json").read_text())["check"]["largest_difference"] > 0.19


# -- safetensors ------------------------------------------------------------------------------------------------------


def test_round_trip(run, crops, published, tmp_path):
    model = ExportedModel.from_pretrained(published)
    image = model.preprocess(crops)
    with torch.inference_mode():
        logits, probabilities = model(image), model.probabilities(image)
    assert np.array_equal(logits.numpy(), logits_of(run, crops))
    np.testing.assert_allclose(probabilities, logits.softmax(1), atol=1e-7)
    assert model.class_names == run.module.class_names
    assert not model.training
    model.save_pretrained(tmp_path)
    again = ExportedModel.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(image), logits)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((published / "config.json").read_text())
    with pytest.raises(ValueError, match=r"expected uint8 \(B, 48, 48, 1\)"):
        model.preprocess(crops[:, 1:])


def test_nothing_but_tensors_and_text(published):
    assert {path.name for path in published.iterdir()} == {
        *("model.safetensors", "config.json", "README.md", "export.json")
    }
    assert all(isinstance(value, torch.Tensor) for value in load_file(published / "model.safetensors").values())


def test_card(run, published):
    card = ModelCard.load(published / "README.md")
    results = run.results
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.library_name == "fer"
    values = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert values["accuracy"] == pytest.approx(results["metrics"]["test"]["acc"], abs=1e-6)
    text = card.text
    n = results["n"]
    for expected in (
        *("## Intended use", "## Limits", "## Licence", "initial weights | random", "synthetic faces"),
        f"{n['train']} train, {n['val']} validation, {n['test']} test",
        f"| accuracy | {100 * results['metrics']['test']['acc']:.2f} % |",
        results["split_fingerprint"],
        results["code_version"],
    ):
        assert expected in text, expected
    assert "{{" not in text
    assert str(run.folder.path) not in text + (published / "config.json").read_text()


def of_counts(counts, person):
    label, predicted = (np.repeat(where, counts.ravel()) for where in np.divmod(np.arange(4), 2))
    answers = Answers(np.arange(100), label, predicted, person, np.ones(100), np.zeros((15, 3)), pd.DataFrame())
    rows = metric_rows(answers, ["a", "b"], {**scores(counts, ["a", "b"]), "ece": 0, "nll": 1}, 0)
    return pd.DataFrame(rows).set_index("name")


def test_intervals():
    counts = np.array([[40, 10], [20, 30]])
    table = of_counts(counts, np.arange(100))
    p, n, z = 0.7, 100, 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    row = table.loc["accuracy"]
    assert row["value"] == "70.00 %"
    assert row["interval"] == f"{100 * (centre - half):.2f} to {100 * (centre + half):.2f} %"
    # Ten people, all of whose ten images are right or wrong, as one class is or the other.
    n = 100 / 11 * (stats.t.ppf(0.975, 99) / stats.t.ppf(0.975, 9)) ** 2
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    of_people = of_counts(counts, np.arange(100) // 10)
    assert of_people.loc["accuracy", "interval"] == f"{100 * (centre - half):.2f} to {100 * (centre + half):.2f} %"
    wide, narrow = (
        np.ptp(np.array(t.loc["accuracy of a", "interval"].split()[:3:2], float)) for t in (of_people, table)
    )
    assert wide > 2 * narrow
    # Images drawn one by one, the plain way.
    images = np.repeat(np.arange(4), counts.ravel())
    generator = np.random.default_rng(5)
    means = []
    for _ in range(4000):
        drawn = np.bincount(generator.choice(images, 100), minlength=4).reshape(2, 2)
        means.append(scores(drawn, ["a", "b"])["mean_acc"])
    np.testing.assert_allclose(bootstrap_scores(counts, 0)[0], np.quantile(means, [0.025, 0.975]), atol=0.01)


def changed(published, tmp_path, **config):
    folder = shutil.copytree(published, tmp_path / "changed")
    known = json.loads((folder / "config.json").read_text())
    known["model"] |= config
    (folder / "config.json").write_text(json.dumps(known))
    return folder


@pytest.mark.parametrize("target", ["os.system", "fer.trained.open_run", "torch.load", "builtins.eval"])
def test_hostile_config(published, tmp_path, target):
    folder = changed(published, tmp_path, _target_=target, command="touch owned")
    with pytest.raises(UserError, match="is refused"):
        ExportedModel.from_pretrained(folder)


def test_hostile_config_below(published, tmp_path):
    folder = changed(published, tmp_path, loss={"_target_": "subprocess.Popen", "args": ["true"]})
    with pytest.raises(UserError, match=r"model\.loss\._target_=subprocess\.Popen is refused"):
        ExportedModel.from_pretrained(folder)


def test_no_pickle_is_read(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing, and nothing else is loaded"):
        ExportedModel.from_pretrained(folder)


def test_half_a_file(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "half")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors does not fit the model of its config\.json"):
        ExportedModel.from_pretrained(folder)


def test_weights_of_another_network(published, tmp_path):
    with pytest.raises(UserError, match=r"does not fit the model of its config\.json"):
        ExportedModel.from_pretrained(changed(published, tmp_path, width=16))


# -- parts ------------------------------------------------------------------------------------------------------------


def test_cost():
    label = np.array([0, 0, 1, 1])
    before, after = np.eye(2)[[0, 0, 1, 0]], np.eye(2)[[0, 1, 1, 0]]
    found = cost(before, after, label, np.arange(4), ["a", "b"], seed=0)
    assert (found["before"]["acc"], found["after"]["acc"], found["difference"]) == (0.75, 0.5, -0.25)
    assert found["same"] == 0.75
    assert found["p"] == 1.0


def test_interleaved():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 5)
    assert order == ["a", "b"] * 8
    assert times["a"]["low"] <= times["a"]["median"] <= times["a"]["high"]


def test_transformers_are_quantised_dynamically(exported, tmp_path):
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])
    shape = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2])
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [shape], [out], [tensor])), tmp_path / "m.onnx"
    )
    assert method_for(tmp_path / "m.onnx") == "dynamic"
    assert method_for(exported / "model.onnx") == "static"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_in_8_bits(name, tmp_path):
    module = shaken(cheap(name))
    path, small = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    export_graph(module.network, module.image_size, path)
    method = quantise(path, small, images(8, module.image_size, seed=1).numpy())
    assert method == ("dynamic" if name in ("swin", "vit") else method)
    assert small.stat().st_size < path.stat().st_size
    batch = images(5, module.image_size, seed=2).numpy()
    whole, answers = (answers_of(session_of(file), batch) for file in (path, small))
    assert np.isfinite(answers).all()
    assert np.abs(answers - whole).max() < 0.5 * (whole.max() - whole.min())


def test_preprocessing(run):
    own = preprocessing_of(run)
    assert own["image_size"] == round(own["store_size"] * own["crop_pct"])


def test_mistakes_are_sentences(tmp_path):
    words = ["run=nowhere", "format=safetensors", "int8=true"]
    done = call("export", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "license is missing: the model card must say under which terms" in done.stderr
    assert "int8=true is for format=onnx" in done.stderr
    assert "Traceback" not in done.stderr


# -- the zoo ------------------------------------------------------------------------------------------------------


def candidate(folder, score, **more):
    """A finished run whose validation part says so much."""
    results = {"monitor": "mean_acc", "metrics": {"val": {"mean_acc": score}}, "name": "fer2013-vit"}
    write_run(folder, more=results | more)


def test_the_zoo_has_the_best_honest_run_of_each_name(tmp_path):
    candidate(tmp_path / "good", 0.6)
    candidate(tmp_path / "better", 0.7, stamps=["288 leaked copies left out of train"])
    candidate(tmp_path / "flattered", 0.9, selected_on="test")
    candidate(tmp_path / "leaky", 0.9, stamps=["LEAKY: predictions depend on the batch"])
    candidate(tmp_path / "fold", 0.9, fold=1)
    candidate(tmp_path / "evaluated", 0.9, evaluation={})
    candidate(tmp_path / "other", 0.1, name="ferplus-vit")
    write_run(tmp_path / "failed", status="failed", error="no reason")
    found = {name: path.name for name, path in best_runs(tmp_path).items()}
    assert found == {"fer2013-vit": "better", "ferplus-vit": "other"}
    with pytest.raises(UserError, match="holds no finished training on official parts"):
        best_runs(tmp_path / "leaky")


def test_a_zoo_by_one_command(whole, tmp_path):
    words = [f"run={whole.parent}", f"zoo={tmp_path / 'zoo'}", "format=safetensors", "license=cc0-1.0"]
    command(composed(*words, command="export"))
    package = tmp_path / "zoo" / "synthetic-cbam_resnet" / "safetensors"
    assert ExportedModel.from_pretrained(package).class_names
    results = json.loads((whole / "results.json").read_text())
    index = (tmp_path / "zoo" / "README.md").read_text()
    assert f"| synthetic-cbam\\_resnet | {100 * results['metrics']['test']['acc']:.2f} |" in index
    with pytest.raises(UserError, match="output= is for one run"):
        command(composed(*words, "output=here", command="export"))
