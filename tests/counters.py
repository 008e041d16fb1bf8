"""Counts that do not depend on a machine's speed, beside those kept in ``counters.json``: a rise fails.

python tests/counters.py            compare
python tests/counters.py --accept   keep today's counts
"""

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import lightning
import torch
from fakes import write_folder
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from fer.benching.training import composed, prepared
from fer.config import CONF
from fer.data import base
from fer.experiment import watchers
from fer.runs import RunFolder
from fer.stopping import Stop
from fer.trainer import quieten

KEPT = Path(__file__).with_suffix(".json")
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))  # each in experiment=small/...
TINY = ["data.train=32", "data.val=8", "data.test=8", "data.subjects=30", "data.batch_size=4", "data.num_workers=0"]
TINY += ["trainer.enable_progress_bar=false", "logger=csv", "trainer.threads=1"]
# On an accelerator these wait until it has caught up, to read a value or to learn how large a result is.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "bincount"}
READS |= {"repeat_interleave", "unique_consecutive", "nms"}
MADE = "lift_fresh"  # a tensor of Python values, which an accelerator waits for too


class Operators(TorchDispatchMode):
    """Counts what runs while it is entered.

    Attributes:
        names: calls of each operator.
        written: bytes of new tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        masks = indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        self.names["nonzero" if masks else name] += 1
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.written += out.nbytes
        return out


class Step(Callback):
    """Counts from the beginning of one training step to that of the next, loading and callbacks included."""

    def __init__(self, number: int) -> None:
        self.number, self.operators = number, Operators()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin or end counting."""
        if batch_idx == self.number:
            self.operators.__enter__()
        elif batch_idx == self.number + 1:
            self.operators.__exit__(None, None, None)
            trainer.should_stop = trainer.limit_val_batches = 0


def of_a_step(name: str, folder: Path) -> dict[str, int]:
    """Counts of one training step of ``experiment=small/<name>`` under everything a run has."""
    config = composed(f"experiment=small/{name}", *TINY, f"data.cache={folder}/store")
    module, _ = prepared(config, batches=1)
    data = instantiate(config.data)
    data.open()
    step = Step(3)
    (folder / name).mkdir()
    trainer = instantiate(
        config.trainer, callbacks=[step, *watchers(config, RunFolder(folder / name), module, Stop())], logger=[]
    )
    trainer.fit(module, datamodule=data)
    names = step.operators.names
    print(name, {k: v for k, v in names.items() if k in READS or k == MADE}, flush=True)
    reads = sum(names[read] for read in READS)
    return {"operators": names.total(), "host reads": reads, "tensors of Python values": names[MADE]}


def of_the_data(folder: Path) -> dict[str, int]:
    """Counts of a batch on either way to the network, and of the readings of a sweep of five folds."""
    out = {}
    for resident in ("yes", "no"):
        words = [*TINY, "data.batch_size=16", "data.store_size=48", "augment=standard", f"data.resident={resident}"]
        data = instantiate(composed("data=synthetic", *words, f"data.cache={folder}/store").data)
        data.open()
        batches = iter(data.train_dataloader())
        next(batches)
        with Operators() as operators:
            next(batches)
        way = "resident" if resident == "yes" else "worker processes"
        out |= {f"{way}: operators": operators.names.total(), f"{way}: bytes written": operators.written}
        out[f"{way}: host reads"] = sum(operators.names[read] for read in READS)
        out[f"{way}: tensors of Python values"] = operators.names[MADE]
    write_folder(folder / "pictures")
    reader = mock.Mock(side_effect=base.read_image)
    words = ["data=folder", f"data.root={folder}/pictures", f"data.cache={folder}/store", "protocol=kfold"]
    words += ["protocol.val_fraction=0.3", "data.num_workers=0", "data.batch_size=4"]
    with mock.patch.object(base, "read_image", reader):
        for fold in range(5):
            data = instantiate(composed(*words, "protocol.folds=5", f"protocol.fold={fold}").data)
            data.open()
            next(iter(data.train_dataloader()))
    return {**out, "five folds: images decoded, of each": reader.call_count // len(data.label)}


def rises(kept: dict[str, int], found: dict[str, int]) -> Iterator[str]:
    """A sentence for each count above the one kept, or not kept at all."""
    for name, count in found.items():
        if name not in kept:
            yield f"{name}: found {count}, none is kept; python tests/counters.py --accept keeps it"
        elif count > kept[name]:
            yield f"{name}: expected at most {kept[name]}, found {count}; python tests/counters.py --accept keeps it"


def main(words: list[str]) -> int:
    """The command."""
    quieten()
    torch.set_num_threads(1)
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lightning.seed_everything(0, verbose=False)
        found |= {f"a batch, {name}": count for name, count in of_the_data(folder).items()}
        for model in MODELS:
            found |= {f"a step of {model}: {name}": count for name, count in of_a_step(model, folder).items()}
    if words == ["--accept"]:
        KEPT.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    sentences = list(rises(kept, found))
    fallen = sum(found.get(name, -1) < count for name, count in kept.items())
    print("\n".join(sentences) or f"{len(found)} counts, none above those kept, {fallen} below")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
