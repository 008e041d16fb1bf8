"""Faces and expressions in photographs, with a trained run: what ``fer.predict`` and ``fer.demo`` do, from Python.

faces = fer.Recognizer.load("outputs/rafdb-convcut/2026-11-22_10-00-00").predict("photo.jpg")
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fer.config import CONF
from fer.data.images import read_image
from fer.data.store import fit
from fer.data.transforms import Finish
from fer.errors import UserError
from fer.evaluation.calibration import kept_calibration, tempered
from fer.faces.detect import Detector, FoundFace
from fer.faces.framing import Framing
from fer.trained import TrainedRun, open_run

log = logging.getLogger(__name__)

Image = np.ndarray[Any, np.dtype[np.uint8]]
Picture = Image | Path | str
BATCH = 32  # faces in a forward pass
OURS = Framing(size=224, margin=0.1, shift=0.0)  # that of fer.prepare, where a run's own is not known


@dataclass(frozen=True)
class Face:
    """A face and its expression.

    Attributes:
        box: x, y, width, height in pixels of the upright picture; may reach beyond it.
        landmarks: left eye, right eye, nose, left mouth corner, right mouth corner as seen in the picture, (x, y) each,
            None for those the detector does not give; or None.
        expression: the likeliest class.
        probability: its probability.
        probabilities: of all classes, summing to 1.
        crop: (S, S, C) uint8, the face as the network's run has its images stored.
    """

    box: tuple[float, ...]
    landmarks: list[list[float] | None] | None
    expression: str
    probability: float
    probabilities: dict[str, float]
    crop: Image

    def as_json(self) -> dict[str, Any]:
        """The line's entry in ``predictions.jsonl``."""
        names = ("box", "landmarks", "expression", "probability", "probabilities")
        return {name: getattr(self, name) for name in names}


class Recognizer:
    """Finds the faces of pictures and names their expressions.

    Args:
        run: the trained run.
        detector: what finds faces.
        framing: how faces lie in the images the run was trained on.

    Attributes:
        class_names: the expressions.
        temperature: what the logits are divided by.
        calibrated: whether that was fitted; otherwise it is 1 and probabilities are as confident as the network is.
    """

    def __init__(self, run: TrainedRun, detector: Detector, framing: Framing) -> None:
        self.run, self.detector, self.framing = run, detector, framing
        self.class_names = run.module.class_names
        self.store_size, self.channels = int(run.config.data.store_size), int(run.config.data.channels)
        # The views of the run's own test: the temperature was fitted to their mean.
        self._views, self._central = run.finish(str(run.results["tta"])), run.finish("none")
        calibration = kept_calibration(run)
        self.calibrated = calibration is not None
        self.temperature = 1.0 if calibration is None else calibration.temperature
        if calibration is None:
            log.warning("probabilities are not calibrated: python -m fer.evaluate run=%s does that", run.folder.path)
        if run.results["stamps"]:
            log.warning("this run is stamped: %s", "; ".join(run.results["stamps"]))

    @classmethod
    def load(
        cls,
        run: Path | str,
        *,
        detector: Detector | str = "mtcnn",
        device: str = "auto",
        framing: Mapping[str, Any] | None = None,
    ) -> Self:
        """Open a finished run folder.

        Args:
            run: the folder.
            detector: a file of ``conf/detector`` by name, or what finds faces.
            device: where the network and the detector shall be; ``auto``: an accelerator where there is one.
            framing: ``size``, ``margin`` or ``shift`` of the crops, where they shall not be those of the images the run
                was trained on, see `fer.faces.framing.Framing`.

        Raises:
            UserError: the run cannot be opened, see `fer.trained.open_run`, or the detector cannot be made.
        """
        trained = open_run(Path(run), device)
        finder = detector_called(detector, device) if isinstance(detector, str) else detector
        return cls(trained, finder, framing_of(trained, framing or {}))

    @overload  # a str is a sequence of str too
    def predict(self, pictures: Picture) -> list[Face]: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, pictures: Sequence[Picture]) -> list[list[Face]]: ...

    def predict(self, pictures: Picture | Sequence[Picture]) -> list[Face] | list[list[Face]]:
        """Find and name every face.

        Args:
            pictures: (H, W) or (H, W, 3) RGB uint8, a file, or a sequence of such, whose faces share batches.

        Returns:
            The faces of the picture, largest first, or of each picture; an empty list where there is none.

        Raises:
            fer.data.images.BadImage: a file cannot be read.
        """
        if isinstance(pictures, np.ndarray | Path | str):
            return self.predict([pictures])[0]
        found: list[list[FoundFace]] = []
        crops: list[list[Image]] = []
        for picture in pictures:
            image = picture if isinstance(picture, np.ndarray) else read_image(Path(picture))
            # A face with an empty box shows nothing.
            pairs = [
                (face, crop) for face in self.detector.detect(image) if (crop := self.crop(image, face)) is not None
            ]
            found.append([face for face, _ in pairs])
            crops.append([crop for _, crop in pairs])
        rows = iter(self.probabilities([crop for of_one in crops for crop in of_one]))
        return [
            [self._face(face, crop, next(rows)) for face, crop in zip(*pair, strict=True)]
            for pair in zip(found, crops, strict=True)
        ]

    def crop(self, image: Image, face: FoundFace) -> Image | None:
        """A face as the run's data set would have it in its store, (S, S, C) uint8; None where its box is empty."""
        crop = self.framing.crop(image, face)
        return None if crop is None else fit(crop.image, self.store_size, self.channels)

    def probabilities(self, crops: Sequence[Image]) -> np.ndarray[Any, Any]:
        """(B, K) calibrated probabilities of B crops, see `crop`."""
        out = [np.empty((0, len(self.class_names)))]
        for start in range(0, len(crops), BATCH):
            views = self._input(crops[start : start + BATCH], self._views)
            with torch.inference_mode():
                out.append(tempered(self.run.module.probabilities(views).cpu().numpy(), self.temperature))
        return np.concatenate(out)

    def attention(self, crops: Sequence[Image], expressions: Sequence[str]) -> tuple[Image, np.ndarray[Any, Any]]:
        """Where the network sees the expressions of B crops, see `fer.explanation.cam`.

        Returns:
            (B, H, W, 3) uint8, the crops as they reach the network, and (B, H, W) float32 in [0, 1].

        Raises:
            UserError: the grad-cam package is not installed.
        """
        from fer.explanation.cam import cam

        image = self._input(crops, self._central)
        maps = cam(self.run, image, torch.tensor([self.class_names.index(name) for name in expressions]))
        mean, std = (
            torch.tensor(values, device=image.device) for values in (self.run.module.mean, self.run.module.std)
        )
        seen = (image.permute(0, 2, 3, 1) * std + mean).mul(255).round().clamp(0, 255)
        return seen.to(torch.uint8).cpu().numpy(), maps

    def _input(self, crops: Sequence[Image], finish: Finish) -> torch.Tensor:
        """(B, S, S, C) uint8 as the network's input, on its device."""
        pixels = torch.from_numpy(np.stack(crops)).to(self.run.device)
        return finish({"image": pixels, "index": torch.arange(len(crops))}, epoch=0)["image"]

    def _face(self, face: FoundFace, crop: Image, probabilities: np.ndarray[Any, Any]) -> Face:
        best = int(probabilities.argmax())
        points = None if face.landmarks is None else [_point(point) for point in face.landmarks]
        return Face(
            box=tuple(round(float(value), 2) for value in face.box),
            landmarks=points,
            expression=self.class_names[best],
            probability=round(float(probabilities[best]), 6),
            probabilities={n: round(float(p), 6) for n, p in zip(self.class_names, probabilities, strict=True)},
            crop=crop,
        )


def _point(point: np.ndarray[Any, Any]) -> list[float] | None:
    return None if np.isnan(point).any() else [round(float(value), 2) for value in point]


def detector_called(name: str, device: str) -> Detector:
    """The detector of a file of ``conf/detector``, on a device where it has one."""
    path = CONF / "detector" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in path.parent.glob("*.yaml")))
        raise UserError(f"detector={name} is not one of {known}")
    detector: Detector = instantiate(OmegaConf.create({"device": device, "detector": OmegaConf.load(path)}).detector)
    return detector


def framing_of(run: TrainedRun, given: Mapping[str, Any]) -> Framing:
    """How faces lie in the images a run was trained on: measured then, or recorded for its data set.

    Args:
        run: the run.
        given: values of a `Framing` that the user knows better.
    """
    data = run.config.data["_target_"]
    recorded: Any = OmegaConf.to_container(OmegaConf.load(CONF / "framing.yaml"))
    known = run.results["data_facts"].get("framing") or recorded.get(data)
    if known is None and "margin" not in given:
        log.warning(
            "how faces lie in the images of %s is not known: they are cut out with a margin of %g; set framing.margin "
            "and framing.shift to what its images have",
            data.rpartition(".")[2],
            OURS.margin,
        )
    return Framing(**{**(known or OURS.as_json()), **given})
