"""Loaders whose order is a pure function of (seed, epoch) and whose position is part of a checkpoint.

Two loaders give the same kind of batch: `ResidentLoader` slices a tensor that holds the whole store on the device,
`WorkerLoader` lets worker processes read the memory map. Both walk an `EpochSampler`, which alone knows the order and
how far the epoch has come. Lightning saves `state_dict` with the trainer and calls ``sampler.set_epoch``.
"""

import abc
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fer.data import workers
from fer.data.manifest import Array

Order = Callable[[int], Array]  # epoch -> rows of the manifest, in the order in which they are seen


class EpochSampler:
    """Batches of rows of one epoch, and the position in it.

    Args:
        order: rows of an epoch; a constant function for evaluation.
        batch_size: images per batch on this device.
        drop_last: leave out a last batch that is not full.
        rank, world_size: this process' share under data-parallel training.
        passes: how often an epoch goes through the order; every pass counts as an epoch of its own to order and
            augmentation.
    """

    def __init__(
        self, order: Order, batch_size: int, drop_last: bool, rank: int = 0, world_size: int = 1, passes: int = 1
    ) -> None:
        self.order, self.batch_size, self.drop_last = order, batch_size, drop_last
        self.rank, self.world_size, self.passes = rank, world_size, passes
        self.epoch = 0
        self.position = 0
        n = len(order(0)) // world_size if drop_last else -(-len(order(0)) // world_size)
        self.pass_batches = max(1, n // batch_size) if drop_last else -(-n // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; keeps the position when it is the epoch a resume is in the middle of."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        return self.passes * self.pass_batches

    def runs(self) -> Iterator[tuple[int, Array]]:
        """Yield (epoch, rows) of each pass from the current position on; a pass has an epoch's number of its own."""
        first, skipped = divmod(self.position, self.pass_batches)
        for epoch in range(self.epoch * self.passes + first, (self.epoch + 1) * self.passes):
            rows = self.order(epoch)[self.rank :: self.world_size]
            yield epoch, rows[skipped * self.batch_size : self.pass_batches * self.batch_size]
            skipped = 0

    def __iter__(self) -> Iterator[tuple[int, Array]]:
        """Yield (epoch, rows of a batch) from the current position on."""
        for epoch, rows in self.runs():
            for start in range(0, len(rows), self.batch_size):
                yield epoch, rows[start : start + self.batch_size]


class _Loader(abc.ABC):
    """What both loaders share: length, and a state that says which batch comes next."""

    def __init__(self, sampler: EpochSampler, remember_position: bool) -> None:
        self.sampler = sampler  # the name under which Lightning looks for set_epoch
        self.remember_position = remember_position

    @property
    def batch_sampler(self) -> EpochSampler:
        """The sampler again: Lightning asks any loader that has a ``sampler`` for this one too."""
        return self.sampler

    def __len__(self) -> int:
        return len(self.sampler)

    @abc.abstractmethod
    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The epoch's batches from the sampler's position on."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._batches():
            if self.remember_position:
                self.sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches already handed out."""
        return {"epoch": self.sampler.epoch, "position": self.sampler.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches handed out when the state was taken."""
        self.sampler.epoch, self.sampler.position = state["epoch"], state["position"]


Finish = Callable[[dict[str, Tensor], int], dict[str, Tensor]]  # a batch as stored, epoch -> what the network sees


class ResidentLoader(_Loader):
    """Batches as slices of tensors that live on the device; augmentation runs batched there.

    Args:
        sampler: order and position.
        images: (N, S, S, C) uint8.
        fields: further per-image tensors on the same device, by batch key.
        finish: turns a batch with (B, S, S, C) uint8 images into the network's input.
        remember_position: a training loader, whose position a checkpoint keeps.
    """

    def __init__(
        self, sampler: EpochSampler, images: Tensor, fields: dict[str, Tensor], finish: Finish, remember_position: bool
    ) -> None:
        super().__init__(sampler, remember_position)
        self.images, self.fields, self.finish = images, fields, finish

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        for epoch, rows in self.sampler.runs():
            # The order goes to the device once a pass: a copy in every step would wait for the device each time.
            order = torch.from_numpy(np.ascontiguousarray(rows)).to(self.images.device)
            for index in order.split(self.sampler.batch_size):  # type: ignore[no-untyped-call]
                batch = {key: values[index] for key, values in self.fields.items()}
                yield self.finish({"image": self.images[index], "index": index, **batch}, epoch)


Augmented = Callable[[Array, int, Array], dict[str, Any]]  # images of the store, epoch, rows -> lists and tensors


class StoreDataset(Dataset[dict[str, Tensor]]):
    """Images of the store by (epoch, rows of a batch), augmented per image; what a worker process holds.

    Keeps numpy arrays only: Python lists would be copied into every worker by reference counting.
    """

    def __init__(self, images: Array, fields: dict[str, Array], augment: Augmented | None) -> None:
        self.images, self.fields, self.augment = images, fields, augment

    def __getitems__(self, place: tuple[int, Array]) -> dict[str, Tensor]:
        epoch, rows = place
        # Taking rows of a memory map itself costs more; what corrupts images as they are read is no array.
        images = self.images.view(np.ndarray) if isinstance(self.images, np.ndarray) else self.images
        seen = {"image": [images[row] for row in rows]} if self.augment is None else self.augment(images, epoch, rows)
        fields = {key: torch.from_numpy(values[rows]) for key, values in self.fields.items()}
        # In a worker the library's own way of stacking writes straight into memory shared with the parent.
        return {**seen, "image": default_collate(seen["image"]), "index": torch.from_numpy(rows), **fields}


def _as_it_is(batch: Any) -> Any:
    return batch


class _Places:
    """The sampler as PyTorch's DataLoader wants it: (epoch, rows of a batch)."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, Array]]:
        for epoch, rows in self.sampler:
            yield epoch, np.ascontiguousarray(rows)


def _init_worker(number: int) -> None:
    workers.init_worker(number)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


class WorkerLoader(_Loader):
    """Batches read and augmented per image by worker processes, finished on the device.

    Args:
        sampler: order and position.
        dataset: images by (epoch, row).
        num_workers: processes; 0 reads in this process.
        device: where batches go.
        finish: the last step, as in `ResidentLoader`.
        remember_position: a training loader, whose position a checkpoint keeps.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        dataset: StoreDataset,
        num_workers: int,
        device: torch.device,
        finish: Finish,
        remember_position: bool,
    ) -> None:
        super().__init__(sampler, remember_position)
        self.device, self.finish = device, finish
        places: Any = _Places(sampler)
        self.loader = DataLoader(
            dataset,
            batch_sampler=places,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_init_worker,
            collate_fn=_as_it_is,
            timeout=workers.HUNG_SECONDS if num_workers else 0,
        )

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        # A training loader moves its position while workers read ahead; the sampler's iterator has started by then,
        # so the position counts batches handed out, never batches read.
        sampler = self.sampler
        for batch in workers.batches(self.loader):
            epoch = sampler.epoch * sampler.passes + sampler.position // sampler.pass_batches  # of this pass
            yield self.finish({key: values.to(self.device, non_blocking=True) for key, values in batch.items()}, epoch)
