"""Pre-training: losses against literal transcriptions, the teacher, and weights that arrive in the models."""

import copy
import hashlib
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from conftest import composed
from fakes import picture, save
from hydra.utils import instantiate
from model_builds import cheap
from torch import nn

from fer.errors import UserError
from fer.pretraining.base import Pretraining
from fer.pretraining.distill import SelfDistillation
from fer.pretraining.landmarks import wing
from fer.pretraining.masked import MaskedImages
from fer.pretraining.run import run_pretraining
from fer.reporting.collect import find_runs
from fer.runs import read_json
from fer.weights import read_weights, write_weights

DATA = ["data.train=36", "data.val=12", "data.test=12", "data.subjects=30", "data.landmarks=68", "data.batch_size=16"]
QUICK = ["logger=csv", "trainer=cpu", "trainer.threads=1", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
VIT = ["task.backbone=test_vit", "task.pretrained=false", "task.image_size=64"]
TASKS = {
    "masked": [*VIT, "task.mask_patches=1"],
    "distill": [
        *VIT,
        *["task.small_crops=2", "task.small_size=32", "task.outputs=64", "task.hidden=32", "task.bottleneck=16"],
    ],
    "landmarks": ["task.width=16"],
}


def words(task: str, *more: str) -> list[str]:
    """A small run of a task: two steps of sixteen images."""
    return [f"task={task}", *DATA, *QUICK, *TASKS[task], *more]


def module(task: str, *more: str) -> Any:
    """The task's module, without data."""
    torch.manual_seed(0)
    built = instantiate(composed(*words(task, *more), command="pretrain").task)
    assert isinstance(built, Pretraining)
    return built


def batch(count: int = 3, size: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.rand(count, 3, size, size, generator=generator), "index": torch.arange(count) + 5}


# -- masked images ----------------------------------------------------------------------------------------------------


def literal_masked_loss(task: MaskedImages, image: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """SimMIM written out patch by patch: embed, replace, add positions, transform, predict, compare."""
    network, vit = task.network, task.network.backbone
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    losses = []
    for one, hidden in zip(image, mask, strict=True):
        tokens = []
        for y in range(4):
            for x in range(4):
                patch = one[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
                weight, bias = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias
                seen = (weight * patch).sum((1, 2, 3)) + bias
                tokens.append(network.mask_token if hidden[y, x] else seen)
        x = torch.cat([vit.cls_token[0], torch.stack(tokens)]) + vit.pos_embed[0]
        x = vit.norm(vit.blocks(vit.norm_pre(x)[None]))[0, 1:]
        total, pixels = 0.0, 0
        for place in range(16):
            if hidden[place // 4, place % 4]:
                painted = network.decoder[0].weight[:, :, 0, 0] @ x[place] + network.decoder[0].bias
                painted = painted.view(3, 16, 16)  # channel, row, column of the patch
                y, left = 16 * (place // 4), 16 * (place % 4)
                total += (painted - one[:, y : y + 16, left : left + 16]).abs().sum().item()
                pixels += 3 * 16 * 16
        losses.append(total / pixels)
    return losses


def test_masked_loss_is_its_literal_transcription() -> None:
    task = module("masked").double().eval()
    content = batch()
    content["image"] = content["image"].double()
    mask = task.mask(content["index"], 0)
    assert mask.sum((1, 2)).tolist() == [10, 10, 10]  # 0.6 of 16
    task.network.decoder.float().double()
    image, painted, _ = task.paint(content, 0)
    measured, _ = task.measures(content, train=False)
    expected = literal_masked_loss(task, content["image"], mask)
    assert measured["loss"].tolist() == pytest.approx(expected, rel=1e-5)  # the prediction is cast to float32
    assert image.dtype == torch.float64
    assert painted.shape == image.shape


def test_masked_pixels_stay_unseen_and_unmasked_ones_cost_nothing() -> None:
    task = module("masked").eval()
    content = batch()
    _, painted, masked = task.paint(content, 0)
    changed = {**content, "image": torch.where(masked, 1 - content["image"], content["image"])}
    assert torch.equal(task.paint(changed, 0)[1], painted)
    painted.retain_grad()
    ((painted - 0.5).abs() * masked).sum().backward()
    assert not painted.grad[~masked.expand_as(painted)].any()
    assert task.network.mask_token.grad.abs().sum() > 0
    assert not torch.equal(task.mask(content["index"], 0), task.mask(content["index"], 1))
    assert torch.equal(task.mask(content["index"], 1)[1:], task.mask(content["index"][1:], 1))


@pytest.mark.slow
def test_swin_can_be_masked() -> None:
    task = module("masked", "task.backbone=swin_tiny_patch4_window7_224", "task.mask_patches=8", "task.image_size=64")
    _, painted, masked = task.paint(batch(1), 0)
    assert painted.shape == (1, 3, 64, 64)
    assert masked.float().mean() == 0.5  # 2 of 4 squares


@pytest.mark.parametrize(
    ("task", "word", "message"),
    [
        ("masked", "task.backbone=test_resnet", "no patches to mask"),
        ("masked", "task.mask_patches=3", "must divide the 4 patches"),
        ("masked", "task.mask_ratio=1.0", "between 0 and 1"),
        ("masked", "task.pretrained=nowhere", "task.pretrained: there is no file nowhere"),
        ("distill", "task.small_size=40", "a multiple of its patch of 16"),
        ("landmarks", "task.loss=l2", "not one of l1, wing"),
        ("landmarks", "task.image_size=100", "multiples of 16 pixels"),
    ],
)
def test_what_cannot_be_is_refused(task: str, word: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        module(task, "task.points=5" if task == "landmarks" else "seed=0", word)
    assert isinstance(caught.value.__cause__, UserError)


# -- self-distillation ------------------------------------------------------------------------------------------------


def test_distillation_loss_is_its_literal_transcription() -> None:
    task = module("distill")
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(n, 3, 64, generator=generator, dtype=torch.float64) for n in (4, 2))
    task.centre = torch.randn(64, generator=generator)
    got = task.distilled([s.float() for s in student], [t.float() for t in teacher], 0.05)
    for image in range(3):
        total, pairs = 0.0, 0
        for i in range(2):
            for j in range(4):
                if i == j:
                    continue
                sharp = [math.exp((t - c) / 0.05) for t, c in zip(teacher[i, image], task.centre.double(), strict=True)]
                soft = [math.exp(s / 0.1) for s in student[j, image].tolist()]
                total -= sum(a / sum(sharp) * math.log(b / sum(soft)) for a, b in zip(sharp, soft, strict=True))
                pairs += 1
        assert got["loss"][image].item() == pytest.approx(total / pairs, rel=1e-4)
        assert pairs == 6


def test_centre_and_teacher_move_as_said() -> None:
    task = module("distill")
    outputs = torch.randn(10, 64)
    task.update_centre(outputs)
    task.update_centre(outputs + 1)
    expected = 0.1 * (outputs + 1).double().mean(0) + 0.9 * 0.1 * outputs.double().mean(0)
    torch.testing.assert_close(task.centre.double(), expected, atol=1e-6, rtol=1e-5)
    # What all images have in common does not reach the targets once the centre has it.
    task.centre = torch.zeros(64)
    base = task.distilled([outputs] * 2, [outputs] * 2, 0.05)["loss"]
    task.centre = torch.full((64,), 3.0)
    torch.testing.assert_close(task.distilled([outputs] * 2, [outputs + 3] * 2, 0.05)["loss"], base)
    before = copy.deepcopy(task.teacher)
    for parameter in task.student.parameters():
        nn.init.normal_(parameter)
    task.update_teacher(0.9)
    triples = zip(before.parameters(), task.student.parameters(), task.teacher.parameters(), strict=True)
    assert all(torch.allclose(0.9 * b + 0.1 * s, t, atol=1e-6) for b, s, t in triples)
    task.total_steps = 10
    assert task.momentum(0) == pytest.approx(0.996)
    assert task.momentum(5) == pytest.approx(0.998)
    assert task.momentum(10) == 1
    assert [task.temperature(epoch) for epoch in (0, 5, 50)] == pytest.approx([0.04, 0.07, 0.07])


def test_convolutions_are_distilled_too() -> None:
    task = module("distill", "task.backbone=test_resnet").train()
    measures, _ = task.measures(batch(), train=True)
    measures["loss"].mean().backward()
    assert all(p.grad.isfinite().all() for p in task.student.parameters())
    assert all(p.grad is None for p in task.teacher.parameters())
    assert task.usage("weights") == ["model=timm", "model.backbone=test_resnet", "model.pretrained=weights"]


def test_crops_are_a_function_of_the_image() -> None:
    task = module("distill")
    content = batch()
    crops, again = task.views(content, 3), task.views({k: v[1:] for k, v in content.items()}, 3)
    assert [c.shape[-1] for c in crops] == [64, 64, 32, 32]
    assert all(torch.allclose(a[1:], b, atol=1e-6) for a, b in zip(crops, again, strict=True))
    assert not torch.allclose(crops[0], crops[1])


# -- landmarks --------------------------------------------------------------------------------------------------------


def test_wing_loss() -> None:
    error = torch.tensor([0.0, 1.0, -1.0, 10.0, -25.0], dtype=torch.float64)
    joint = 10 - 10 * math.log(6)
    expected = [0, 10 * math.log(1.5), 10 * math.log(1.5), 10 * math.log(6), 25 - joint]
    assert wing(error, 10, 2).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["l1", "wing"])
def test_landmark_errors_are_in_interocular_distances(loss: str) -> None:
    task = module("landmarks", "task.points=5", f"task.loss={loss}")
    truth = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0)) * 100
    truth[0, 2] = torch.nan  # a point outside the image
    truth[2, 1] = torch.nan  # an eye: no unit to measure in
    shift = torch.tensor([3.0, -4.0])
    found = (truth.nan_to_num(7) + shift + 0.5) / 112
    task.network.locate = lambda image: found
    measures, counts = task.measures({"image": torch.zeros(3, 3, 112, 112), "landmarks": truth}, train=False)
    assert counts.tolist() == [True, True, False]
    for face in range(2):
        unit = (truth[face, 0] - truth[face, 1]).norm().item()
        assert measures["nme"][face].item() == pytest.approx(5 / unit, rel=1e-4)
        both = torch.tensor([3 / unit, 4 / unit])
        mean = both.mean() if loss == "l1" else wing(100 * both, 10, 2).mean() / 100
        assert measures["loss"][face].item() == pytest.approx(mean.item(), rel=1e-4)
    assert torch.isfinite(torch.stack(list(measures.values()))).all()


# -- whole runs -------------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """A finished run of two steps of each task; of the self-distilled one the weights after each step."""

    folder: dict[str, Path]
    teacher: list[torch.Tensor]
    students: list[list[torch.Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Runs:
    folder = tmp_path_factory.mktemp("pretraining")
    done = Runs({task: folder / task for task in TASKS}, [], [])
    follow = SelfDistillation.update_teacher

    def watched(self: SelfDistillation, momentum: float) -> None:
        done.teacher = done.teacher or [p.clone() for p in self.teacher.parameters()]
        follow(self, momentum)
        done.students.append([p.detach().clone() for p in self.student.parameters()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfDistillation, "update_teacher", watched)
        for task in TASKS:
            config = composed(*words(task, f"data.cache={cache}"), command="pretrain")
            run_pretraining(config, done.folder[task], command="x")
    return done


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_weights_with_a_checksum(task: str, runs: Runs) -> None:
    folder, results = runs.folder[task], read_json(runs.folder[task] / "results.json")
    path = folder / ("landmarks.safetensors" if task == "landmarks" else "backbone.safetensors")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert results["sha256"] == checksum
    assert Path(f"{path}.sha256").read_text() == f"{checksum}  {path.name}\n"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["task"] == task
    assert metadata["architecture"] == ("mobilefacenet" if task == "landmarks" else "test_vit")
    assert metadata["data"] == "synthetic faces"
    assert results["n"] == {"train": 36, "val": 12, "test": 12}
    assert results["steps"] == 2
    assert all(math.isfinite(value) for value in results["metrics"]["test"].values())
    assert (folder / "metrics.csv").read_text().count("\n") == 2
    assert len(list(folder.glob("*.png"))) == 1
    with pytest.raises(UserError, match="no run folder"):
        find_runs([folder.parent])


def test_the_teacher_is_the_students_moving_average(runs: Runs) -> None:
    teacher = [p.double() for p in runs.teacher]
    for step, student in enumerate(runs.students):
        keep = 1 - (1 - 0.996) * (math.cos(math.pi * step / 2) + 1) / 2
        teacher = [keep * t + (1 - keep) * s.double() for t, s in zip(teacher, student, strict=True)]
    state = torch.load(runs.folder["distill"] / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    found = [state[f"teacher.{name}"] for name, _ in module("distill").teacher.named_parameters()]
    assert len(runs.students) == 2
    assert not torch.equal(found[0], runs.teacher[0])
    assert all(torch.allclose(a.double(), b, atol=1e-6) for a, b in zip(found, teacher, strict=True))
    assert state["centre"].abs().sum() > 0


@pytest.mark.parametrize(("name", "task"), [("vit", "masked"), ("two_stream", "distill")])
def test_a_backbone_arrives(name: str, task: str, runs: Runs) -> None:
    path = runs.folder[task] / "backbone.safetensors"
    checksum = read_json(runs.folder[task] / "results.json")["sha256"]
    model = cheap(name, f"pretrained={path}@sha256:{checksum}")
    assert f"backbone.safetensors sha256:{checksum}" in model.weights
    network = model.network if name == "vit" else model.network.pyramid.backbone
    state = network.state_dict()
    weights = read_weights(str(path), "x", "y").tensors
    assert set(state) - set(weights) <= {"head.weight", "head.bias"}
    assert all(torch.equal(state[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["two_stream", "posterpp"])
def test_landmarks_arrive_and_stay(name: str, runs: Runs) -> None:
    path = runs.folder["landmarks"] / "landmarks.safetensors"
    model = cheap(name, f"landmark_ckpt={path}", "width=16", "landmark_blocks=[4,6,2]").train()
    assert "landmarks.safetensors sha256:" in model.weights
    assert model.weights.endswith(", frozen")
    stream = model.network.landmarks
    weights = read_weights(str(path), "x", "y").tensors
    assert all(torch.equal(weights[key], value) for key, value in stream.network.state_dict().items())
    assert not any(p.requires_grad for p in stream.parameters())
    assert not stream.network.conv1.bn.training


def test_wrong_weights_are_one_sentence(runs: Runs, tmp_path: Path) -> None:
    backbone, landmarks = (
        runs.folder["masked"] / "backbone.safetensors",
        runs.folder["landmarks"] / "landmarks.safetensors",
    )
    with pytest.raises(UserError, match=r"does not hold the weights of test_resnet but of test_vit \(it lacks"):
        cheap("timm", f"pretrained={backbone}")
    with pytest.raises(UserError, match="does not hold the weights of test_vit but of mobilefacenet"):
        cheap("vit", f"pretrained={landmarks}")
    with pytest.raises(UserError, match="does not hold the MobileFaceNet"):
        cheap("two_stream", f"landmark_ckpt={backbone}", "width=16")
    with pytest.raises(UserError, match=r"says 0000.*: it is another file, or damaged"):
        cheap("vit", f"pretrained={backbone}@sha256:{'0' * 64}")
    damaged = tmp_path / "backbone.safetensors"
    damaged.write_bytes(backbone.read_bytes()[:-4] + b"oops")
    (tmp_path / "backbone.safetensors.sha256").write_text(Path(f"{backbone}.sha256").read_text())
    with pytest.raises(UserError, match=r"backbone\.safetensors\.sha256 says"):
        cheap("vit", f"pretrained={damaged}")
    damaged.write_bytes(b"no weights")
    (tmp_path / "backbone.safetensors.sha256").unlink()
    with pytest.raises(
        UserError, match=r"cannot be read as weights .*; go on without weights by model\.pretrained=false"
    ):
        cheap("vit", f"pretrained={damaged}")


def test_a_done_run_is_left_alone_and_another_one_refused(runs: Runs, cache: Path) -> None:
    before = (runs.folder["masked"] / "results.json").stat().st_mtime_ns
    again = words("masked", f"data.cache={cache}")
    run_pretraining(composed(*again, command="pretrain"), runs.folder["masked"], command="x")
    with pytest.raises(UserError, match="fresh=true"):
        run_pretraining(composed(*again, "seed=3", command="pretrain"), runs.folder["masked"], command="x")
    with pytest.raises(UserError, match="one device"):
        run_pretraining(composed(*again, "trainer.devices=2", command="pretrain"), runs.folder["masked"], command="x")
    assert (runs.folder["masked"] / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_goes_on_to_the_same_weights(task: str, tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    """Stopped in the middle of the second epoch; weights and curves are the same to the last bit."""
    more = [f"data.cache={cache}", "trainer.max_epochs=3", "trainer.checkpoint_steps=1"]
    config = [*words(task), *more]
    run_pretraining(composed(*config, command="pretrain"), tmp_path / "whole", command="x")
    step = Pretraining.training_step

    def stopped(self: Pretraining, content: Any, number: int) -> Any:
        if self.trainer.global_step == 3:
            raise KeyboardInterrupt
        return step(self, content, number)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "training_step", stopped)
        with pytest.raises(SystemExit):
            run_pretraining(composed(*config, command="pretrain"), tmp_path / "stopped", command="x")
    assert read_json(tmp_path / "stopped" / "pretraining.json")["status"] == "interrupted"
    run_pretraining(composed(*config, command="pretrain"), tmp_path / "stopped", command="x")
    whole, stopped_too = (read_json(tmp_path / name / "results.json") for name in ("whole", "stopped"))
    assert stopped_too["resumed_from_step"] == 3
    # Tensor by tensor: safetensors writes its metadata in no fixed order, so the files' checksums differ.
    files = [str(tmp_path / name / whole["file"]) for name in ("whole", "stopped")]
    weights, others = (read_weights(file, "x", "y").tensors for file in files)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert whole["metrics"] == stopped_too["metrics"]
    curves = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "stopped")]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_landmarks_of_new_people_are_found(tmp_path: Path) -> None:
    """Two to three core-minutes: a quarter of the published width, one thousand drawn faces, people never seen."""
    config = composed(
        *["task=landmarks", "task.width=16", "data.landmarks=68", "data.store_size=64", "augment=light"],
        *["data.train=1000", "data.val=100", "data.test=300", "data.batch_size=32", "optim.optimizer.lr=3e-3"],
        *["logger=csv", "trainer=cpu", "trainer.threads=1", "trainer.max_epochs=7", "trainer.precision=32-true"],
        "trainer.enable_progress_bar=false",
        command="pretrain",
    )
    run_pretraining(config, tmp_path / "run", command="x")
    results = read_json(tmp_path / "run" / "results.json")
    test = results["metrics"]["test"]
    assert results["data_facts"]["shared_subjects"] == {}
    assert results["n"]["test"] == 300
    assert test["nme"] < 0.6 * test["mean_shape_nme"], test


COMMANDS = {
    "masked": "data=folder data.root=faces data.store_size=64 protocol=holdout",
    "distill": "data=folder data.root=faces data.store_size=64 protocol=holdout",
    "landmarks": "data.train=32 data.val=8 data.test=8 data.subjects=30",
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_command_line(task: str, tmp_path: Path) -> None:
    """Two steps from a folder of unlabelled pictures, or of drawn faces; then training on the weights."""
    for i in range(64):
        save(tmp_path / "faces" / f"{i:06d}.jpg", picture(i % 7, i, size=64, colour=True))
    more = [*COMMANDS[task].split(), "data.batch_size=16", "+trainer.limit_train_batches=2", "hydra.run.dir=run"]
    line = [sys.executable, "-m", "fer.pretrain", f"task={task}", *QUICK, *TASKS[task], *more]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    results = read_json(tmp_path / "run" / "results.json")
    assert f"{results['sha256']}  " in done.stdout
    assert results["steps"] == 2
    again = subprocess.run(
        [sys.executable, "-m", "fer.pretrain", "resume=run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert results["sha256"] in again.stdout  # done already


def test_a_small_landmark_network_is_a_small_model_s_stream(tmp_path: Path) -> None:
    """Of 48 pixels and fewer bottlenecks; the words that the run ends with are those that fit."""
    task = module("landmarks", "task.points=68", "task.image_size=48", "task.blocks=[1,1,1]")
    words = task.usage(str(tmp_path / "landmarks.safetensors"))
    assert words[1:4] == ["model.width=16", "model.landmark_blocks=[1,1,1]", "model.grid=3"]
    write_weights(tmp_path / "landmarks.safetensors", task.kept().state_dict(), {})
    model = cheap(
        "two_stream", *(word.removeprefix("model.") for word in words[1:]), "windows=[3,3,3]", "image_size=48"
    )
    stream = model.network.landmarks
    assert torch.equal(stream.network.conv1.conv.weight, task.network.conv1.conv.weight)
    assert len(stream(torch.zeros(1, 3, 48, 48))) == 3
    assert not any(p.requires_grad for p in stream.parameters())
