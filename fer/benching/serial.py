"""``python -m fer.benching.serial FOLDER WORD...``: folds one after the other as a careful person's script trains them.

One process, the images decoded once and shared, a hand-written loop, a validation pass each epoch, the best epoch's
weights kept in a file, one test. Prints the CPU seconds it took after its imports, and the folds' test accuracies.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from fer.benching.training import Loop, composed
from fer.benching.windows import timed
from fer.models.base import ExpressionModule
from fer.trainer import auto_precision


def train_fold(words: list[str], fold: int, best: Path) -> float:
    """Train one fold and return its accuracy on the images held out."""
    config = composed(*words, "protocol=kfold", f"protocol.fold={fold}")
    data = instantiate(config.data)
    data.open()
    config.data.class_names = data.class_names
    torch.manual_seed(config.seed)
    module = instantiate(config.model)
    if config.trainer.channels_last:
        module = module.to(memory_format=torch.channels_last)
    precision = auto_precision() if config.trainer.precision == "auto" else config.trainer.precision
    bf16 = precision == "bf16-mixed"
    loader, epochs = data.train_dataloader(), config.trainer.max_epochs
    loop = Loop(module, data.class_counts("train"), bf16, len(loader), epochs)
    score = -1.0
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        module.train()
        loop.run(loader)
        found = _accuracy(module, data.val_dataloader(), bf16)
        if found > score:
            score, weights = found, copy.deepcopy(module.state_dict())
            torch.save(weights, best)
    module.load_state_dict(weights)
    return _accuracy(module, data.test_dataloader(), bf16)


@torch.inference_mode()
def _accuracy(module: ExpressionModule, loader: Any, bf16: bool) -> float:
    module.eval()
    right: Tensor | int = 0
    count = 0
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = module(batch["image"])
        right += (logits.argmax(1) == batch["label"]).sum()
        count += len(logits)
    return float(right) / count


def main() -> None:
    """The script."""
    folder, folds, *words = sys.argv[1:]
    with timed() as times:
        accuracies = [train_fold(words, fold, Path(folder) / f"fold{fold}.pt") for fold in range(int(folds))]
    print(json.dumps({"cpu": times.cpu, "wall": times.wall, "accuracy": accuracies}))


if __name__ == "__main__":
    main()
