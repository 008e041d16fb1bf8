"""The data module every data set shares: from a root folder to batches.

    Manifest -> split -> store (decoded uint8) -> loader -> batch

A data set is a subclass with a few class attributes, its own options and `manifest()`. The base class owns the rest:
finding the root, the message when it is missing, decoding, the protocol's split and its checks, the store, the
loaders, counts and augmentation.

A batch is a dict: ``image`` (B, 3, H, W) float32 normalised, ``label`` (B,) int64, ``index`` (B,) int64 rows of the
manifest, and where the data has them ``soft`` (B, K), ``accepted`` (B, K) bool, classes any of which is right,
``valence_arousal`` (B, 2), ``face_labels`` (B, F) int64 and, in pixels of the input with NaN where missing or outside,
``box`` (B, 4), ``organ_boxes`` (B, 4, 4), ``face_boxes`` (B, F, 4), ``face_organ_boxes`` (B, F, 4, 4) and
``landmarks`` (B, L, 2), see `fer.data.manifest.Manifest`. Where a data set has landmarks but no organ boxes, these are
made from them (`fer.data.regions`).
"""

import abc
import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
import torch
from lightning import LightningDataModule

from fer.config import require_counts
from fer.data.images import BadImage, read_image
from fer.data.loaders import EpochSampler, Order, ResidentLoader, StoreDataset, WorkerLoader
from fer.data.manifest import OPTIONAL, PARTS, Array, Manifest, Part
from fer.data.per_image import WorkerAugment
from fer.data.places import PLACES, relative
from fer.data.protocols import Protocol
from fer.data.regions import with_regions
from fer.data.splits import Split
from fer.data.store import Store, open_store, stat_fingerprint
from fer.data.transforms import TTA_VIEWS, Augment, Finish
from fer.errors import UserError
from fer.faces.framing import Framing
from fer.labels import index_map, spelled_as

log = logging.getLogger(__name__)

Image = np.ndarray[Any, np.dtype[np.uint8]]
RESIDENT_SHARE = 0.5  # of the accelerator's free memory that a store may take under resident=auto
RESIDENT_CPU_SIDE = 64  # px; on a CPU batched augmentation beats per-image up to about this side and loses at 224


class DataOptions(TypedDict):
    """Options common to all data sets; every value comes from ``conf/data/_common.yaml`` and the data set's YAML.

    Attributes:
        root: folder of the data set.
        class_names: names and order of the model's outputs, ``happy`` for ``happiness`` too; images of other classes
            are left out, which the facts say. None: the data's.
        image_size: side in pixels of the network's input.
        mean, std: per-channel normalisation of an image in [0, 1].
        store_size: side in pixels of the images in the store.
        channels: channels in the store, 1 or 3; the network always sees 3.
        batch_size, eval_batch_size: images per step.
        num_workers: worker processes when the data is not resident.
        resident: ``auto``, ``yes`` or ``no``: keep the whole store on the device and augment batched there.
        on_bad_image: ``fail`` or ``skip`` unreadable images.
        sampling: ``plain`` (each image once per epoch), ``balanced`` or ``sqrt`` (drawn with replacement with weight
            1/n or 1/sqrt(n) of the image's class).
        augment: the augmentation recipe.
        tta: views averaged at test: ``none``, ``flip``, ``five_crop``, ``ten_crop``.
        protocol: how the data is split.
        seed: the run's seed, for order and augmentation.
        cache: folder of the stores.
    """

    root: str
    class_names: list[str] | None
    image_size: int
    mean: list[float]
    std: list[float]
    store_size: int
    channels: int
    batch_size: int
    eval_batch_size: int
    num_workers: int
    resident: str
    on_bad_image: str
    sampling: str
    augment: Augment
    tta: str
    protocol: Protocol
    seed: int
    cache: str


def class_left_out(name: str) -> str:
    """Why images of a class are not used that ``data.class_names`` does not name."""
    return f"class {name} is not in data.class_names"


def _one_of(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UserError(f"data.{key}={value} is not one of {', '.join(map(str, allowed))}")


class ExpressionDataModule(LightningDataModule, abc.ABC):
    """Base of all data sets. See `DataOptions` for the constructor's arguments.

    Attributes:
        class_names: names in the order of the labels in batches; known after `open`.
        store: the decoded images; known after `open`.
        label: (N,) labels of the store's images in the order of ``class_names``, -1 for classes left out.
        split: rows of each part; known after `open`.
        regions: how many organ boxes were made from landmarks and rejected, by rule; None where none had to be made.
        manifest_options: the subclass's options that change its manifest or pixels; part of the store's key.
    """

    title: ClassVar[str]  # the data set's name for people: "RAF-DB"
    expected_tree: ClassVar[str]  # the files looked for under the root, as a small drawing
    request: ClassVar[str]  # where and how one obtains the data
    sequential: ClassVar[bool] = False  # images can only be read front to back, in one go
    on_disk: ClassVar[bool] = True  # False: nothing is read from the root
    crop_to_box: bool = False  # the store keeps of each image what lies in its face box

    class_names: list[str]
    store: Store
    label: Array
    split: Split
    regions: dict[str, Any] | None

    def __init__(
        self,
        *,
        root: str,
        class_names: list[str] | None,
        image_size: int,
        mean: list[float],
        std: list[float],
        store_size: int,
        channels: int,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        resident: str,
        on_bad_image: str,
        sampling: str,
        augment: Augment,
        tta: str,
        protocol: Protocol,
        seed: int,
        cache: str,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "num_workers": num_workers}
        least = {"seed": 0, "data.batch_size": 1, "data.eval_batch_size": 1, "data.num_workers": 0}
        require_counts({"seed": seed, **{f"data.{key}": value for key, value in counts.items()}}, least)
        if seed >= 2**32:
            raise UserError(f"seed={seed}: numpy's generators take numbers below 2**32 only")
        _one_of("channels", channels, (1, 3))
        _one_of("resident", resident, ("auto", "yes", "no"))
        _one_of("on_bad_image", on_bad_image, ("fail", "skip"))
        _one_of("sampling", sampling, ("plain", "balanced", "sqrt"))
        _one_of("tta", tta, tuple(TTA_VIEWS))
        self.root = root
        self.wanted_classes = list(class_names) if class_names is not None else None
        self.image_size, self.mean, self.std = image_size, list(mean), list(std)
        self.store_size, self.channels = store_size, channels
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.resident, self.on_bad_image, self.sampling = resident, on_bad_image, sampling
        self.augment, self.tta, self.protocol = augment, tta, protocol
        self.seed, self.cache = seed, Path(cache)
        self.manifest_options: dict[str, Any] = {}
        self._opened = False
        self._held: dict[str, bool] = {}  # what ``auto`` came to on each kind of device
        self._tensors: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None

    # -- what a data set says -------------------------------------------------------------------------------------

    @abc.abstractmethod
    def manifest(self) -> Manifest:
        """Read the form found under ``self.root``; runs once per store, not once per run."""

    def images(self, manifest: Manifest, rows: Array) -> Iterator[Image | BadImage]:
        """Yield the whole image of each row, (H, W) or (H, W, 3) uint8 RGB at its own size; files by default."""
        for row in rows:
            try:
                yield read_image(Path(self.root) / str(manifest.item[row]))
            except BadImage as bad:
                yield bad

    def source_fingerprint(self) -> str:
        """Changes when the source does; by default from the stat of every file under the root."""
        return stat_fingerprint(Path(self.root))

    def missing(self, looked_for: str) -> UserError:
        """The sentence for missing data: what was looked for, the expected tree, where to get it, the mend."""
        return UserError(
            f"{self.title} not found: looked for {looked_for} under {Path(self.root).absolute()}; "
            f"set data.root=/path/to/it (obtain it from {self.request}). Expected tree:\n{self.expected_tree.strip()}"
        )

    # -- opening --------------------------------------------------------------------------------------------------

    def check_root(self) -> None:
        """Raise the sentence for missing data when the root is not there; costs nothing."""
        if self.on_disk and not Path(self.root).is_dir():
            raise self.missing("a folder")

    def open(self, *, absent_classes: bool = False) -> None:
        """Open or build the store, map classes by name, split. Does nothing the second time.

        Args:
            absent_classes: ``class_names`` may name classes that the data does not have, for a network of other data.

        Raises:
            UserError: the data is missing, classes that it does not have, unreadable images under
                ``on_bad_image=fail``, an impossible split.
        """
        if self._opened:
            return
        self.check_root()
        key = {
            "reader": f"{type(self).__module__}.{type(self).__qualname__}",
            "source": self.source_fingerprint(),
            "options": self.manifest_options,
            "size": self.store_size,
            "channels": self.channels,
        }
        name = type(self).__module__.rpartition(".")[2]
        self.store = open_store(self.cache, name, key, self.manifest, self.images, self.sequential, self.crop_to_box)
        manifest, self.regions = with_regions(self.store.manifest, self.store.windows)
        self.store = dataclasses.replace(self.store, manifest=manifest)
        self._check_bad_images()
        self.class_names = self._chosen_classes(manifest.class_names, absent_classes)
        to_output = np.array(index_map(manifest.class_names, self.class_names))
        self.label = to_output[manifest.label]
        if (self.label < 0).all():
            raise UserError(
                f"data.class_names={self.class_names}: none of them occurs in {self.title} "
                f"({', '.join(manifest.class_names)})"
            )
        # Splits stratify by the labels the model learns.
        view = dataclasses.replace(manifest, label=np.maximum(self.label, 0), class_names=tuple(self.class_names))
        self.split = self.protocol.split(view, self.store.copies, self.store.usable & (self.label >= 0))
        self._opened = True

    def _chosen_classes(self, known: tuple[str, ...], absent: bool) -> list[str]:
        """``class_names`` as the data spells them."""
        if self.wanted_classes is None:
            return list(known)
        chosen = spelled_as(self.wanted_classes, known)
        unknown = [name for name in chosen if name not in known]
        if unknown and not absent:
            raise UserError(
                f"data.class_names: {self.title} has no {', '.join(unknown)}; it has {', '.join(known)}: name some of "
                "these, or data.class_names=null for all"
            )
        twice = [name for name, n in Counter(chosen).items() if n > 1]
        if twice:
            raise UserError(f"data.class_names={self.wanted_classes} names {', '.join(twice)} twice; name each once")
        return chosen

    def _check_bad_images(self) -> None:
        bad = self.store.bad
        if bad and self.on_bad_image == "fail":
            report = self.store.path / "bad.json"
            item, why = self.store.manifest.item[bad[0][0]], bad[0][1]
            raise UserError(
                f"{len(bad)} of {len(self.store.manifest)} images cannot be read, the first is {item} ({why}); all are "
                f"listed in {report}: mend them, or go on without them by data.on_bad_image=skip"
            )

    def setup(self, stage: str) -> None:
        """Lightning's hook; `open` does the work."""
        self.open()

    # -- facts about the opened data ------------------------------------------------------------------------------

    def class_counts(self, part: Part) -> Array:
        """(K,) images per class of one part, in the order of ``class_names``."""
        return np.bincount(self.label[self.split.part(part)], minlength=len(self.class_names))

    def face_sizes(self, part: Part) -> Array:
        """(N, 2) widths and heights of a part's known faces in pixels of the network's input, not augmented."""
        fields = self._fields()
        keys = [key for key in ("face_boxes", "box") if key in fields]
        if not keys:
            return np.empty((0, 2), dtype=np.float32)
        # A box's half sides, where the image reaches from -1 to 1, are its sides as shares of the image.
        share = fields[keys[0]][self.split.part(part)][..., 2:].reshape(-1, 2) / self.augment.crop_pct
        return np.minimum(share[np.isfinite(share).all(1)], 1) * self.image_size

    def facts(self) -> dict[str, Any]:
        """What ``split.json`` and the results record about the data: counts, differences, leaks, stamps."""
        manifest = self.store.manifest
        counts = {part: dict(zip(self.class_names, map(int, self.class_counts(part)), strict=True)) for part in PARTS}
        skipped = Counter(why for _, why in (*manifest.skipped, *self.store.bad))
        unnamed = manifest.label[self.store.usable & (self.label < 0)]
        skipped.update(class_left_out(manifest.class_names[label]) for label in unnamed.tolist())
        return {
            "data": self.title,
            "form": manifest.form,
            "store": self.store.path.name,
            "counts": counts,
            "n": {part: len(rows) for part, rows in self.split.parts()},
            "count_differences": manifest.count_differences(),
            "skipped": dict(skipped.most_common()),
            "split": self.split.rule,
            "fold": self.split.fold,
            "drop_leaks": self.protocol.drop_leaks,
            "copies_before_drop_leaks": self.split.copies_before,
            "copies": self.split.copied(self.store.copies),
            "shared_subjects": self.split.shared(manifest.subject),
            "shared_sequences": self.split.shared(manifest.sequence),
            "subjects": None if manifest.subject is None else len(np.unique(manifest.subject)),
            "warnings": list(manifest.warnings),
            "regions": self.regions,
            "framing": framing.as_json() if (framing := self.framing()) is not None else None,
            "selected_on": self.split.selected_on,
            "stamps": list(self.split.stamps),
            "fingerprint": self.split.fingerprint(manifest),
        }

    def framing(self) -> Framing | None:
        """How faces lie in the training images; None where their landmarks are not known or there are several."""
        store, rows = self.store, self.split.train
        if store.manifest.landmarks is None or store.manifest.face_boxes is not None:
            return None
        shares = (relative(store.manifest.select(rows), store.windows[rows])["landmarks"] + 1) / 2
        return Framing.measured(shares, store.windows[rows, 2:].max(1))

    def fingerprint(self) -> str:
        """Hash of split, pixels, labels, votes and places: changes when anything a run sees of the data does."""
        digest = hashlib.sha256(self.split.fingerprint(self.store.manifest).encode())
        digest.update(np.ascontiguousarray(self.store.copies).tobytes())
        manifest = self.store.manifest
        # Organ boxes that were made from landmarks say nothing new.
        facts = {"label": self.label, "windows": self.store.windows}
        facts |= {name: getattr(manifest, name) for name in OPTIONAL if name != "organ_boxes" or self.regions is None}
        for name, values in facts.items():
            if values is not None:
                plain = np.char.encode(values, "utf-8") if values.dtype.kind == "U" else values
                digest.update(f"{name} {plain.shape}".encode() + np.ascontiguousarray(plain).tobytes())
        return digest.hexdigest()[:16]

    # -- loaders --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where batches are made: the trainer's device, or the CPU before there is one."""
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    def is_resident(self) -> bool:
        """Whether the whole store is held on the device; decides which form of the augmentation runs.

        ``auto`` is settled once for each kind of device: neither what a training takes of the memory later nor a resume
        beside another job changes it.
        """
        if self.resident != "auto":
            return self.resident == "yes"
        kind = self.device.type
        if kind not in self._held:
            self._held[kind] = self._fits(self.device)
        return self._held[kind]

    def state_dict(self) -> dict[str, Any]:
        """What ``resident=auto`` came to, for the checkpoint."""
        return {"resident": dict(self._held)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep to it."""
        self._held |= state_dict["resident"]

    def _fits(self, device: torch.device) -> bool:
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return bool(self.store.images.nbytes < RESIDENT_SHARE * free)
        return self.store_size <= RESIDENT_CPU_SIDE

    def _order(self, part: Part) -> Order:
        rows = self.split.part(part)
        if part != "train":
            return lambda epoch: rows
        if self.sampling == "plain":
            return lambda epoch: self._rng(epoch).permutation(rows)
        counts = self.class_counts("train").astype(np.float64)
        per_class = 1 / np.maximum(counts, 1) ** (1.0 if self.sampling == "balanced" else 0.5)
        weight = per_class[self.label[rows]]
        return lambda epoch: self._rng(epoch).choice(rows, size=len(rows), p=weight / weight.sum())

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch]))

    def _fields(self) -> dict[str, Array]:
        manifest = self.store.manifest
        fields: dict[str, Array] = {"label": self.label.astype(np.int64)}
        if manifest.soft is not None:
            to_output = np.array(index_map(self.class_names, manifest.class_names))
            soft = np.where(to_output >= 0, manifest.soft[:, to_output], 0).astype(np.float32)
            fields["soft"] = soft / np.maximum(soft.sum(1, keepdims=True), 1e-12)
        if manifest.valence_arousal is not None:
            fields["valence_arousal"] = manifest.valence_arousal.astype(np.float32)
        if manifest.face_labels is not None:
            to_output = np.array([*index_map(manifest.class_names, self.class_names), -1])
            fields["face_labels"] = to_output[manifest.face_labels]
        return fields | relative(manifest, self.store.windows)

    def _sampler(self, part: Part) -> EpochSampler:
        train, trainer = part == "train", self.trainer
        # Of several devices each trains on its share and validates on everything, so all know the same scores.
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None and train else (0, 1)
        batch_size = self.batch_size if train else self.eval_batch_size
        passes = self.augment.crops_per_image if train else 1
        return EpochSampler(self._order(part), batch_size, drop_last=train, rank=rank, world_size=world, passes=passes)

    def train_batches(self) -> int:
        """Batches of a training epoch on each device."""
        return len(self._sampler("train"))

    def _loader(self, part: Part, tta: str = "none") -> ResidentLoader | WorkerLoader:
        train, resident, device = part == "train", self.is_resident(), self.device
        sampler = self._sampler(part)
        finish = Finish(
            size=self.image_size,
            mean=self.mean,
            std=self.std,
            augment=self.augment,
            seed=self.seed,
            train=train,
            augmented=train and not resident,
            tta=tta,
        )
        if resident:
            return ResidentLoader(sampler, *self._resident_tensors(device), finish, remember_position=train)
        fields = self._fields()
        track = any(key in fields for key in PLACES)
        augment = WorkerAugment(self.augment, self.image_size, self.seed, track) if train else None
        dataset = StoreDataset(self.store.images, fields, augment)
        return WorkerLoader(sampler, dataset, self.num_workers, device, finish, remember_position=train)

    def _resident_tensors(self, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self._tensors is None or self._tensors[0].device != device:
            fields = {key: torch.from_numpy(values).to(device) for key, values in self._fields().items()}
            self._tensors = (torch.from_numpy(self.store.images).to(device), fields)
        return self._tensors

    def train_dataloader(self) -> ResidentLoader | WorkerLoader:
        """Shuffled, augmented, resumable."""
        return self._loader("train")

    def val_dataloader(self) -> ResidentLoader | WorkerLoader:
        """In order, central crop."""
        return self._loader("val")

    def test_dataloader(self) -> ResidentLoader | WorkerLoader:
        """In order, with the views of ``tta``."""
        return self._loader("test", self.tta)

    def evaluation_loader(self, part: Literal["val", "test"], tta: str) -> ResidentLoader | WorkerLoader:
        """A part in order, each image in the views of ``tta``."""
        return self._loader(part, tta)
