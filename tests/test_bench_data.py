"""The data bench compares like with like, and the counters see what they count."""

from typing import Any

import counters
import numpy as np
import pytest
import torch
from conftest import composed
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fer.benching.augment import batched, by_albumentations, by_torchvision, per_image
from fer.config import CONF

RECIPES = OmegaConf.load(CONF / "bench.yaml").augment.recipes
FORMS = (batched, per_image, by_albumentations, by_torchvision)


def recipe(name: str, *more: str) -> Any:
    return instantiate(composed(f"augment={name}", "data.store_size=40", *more).augment)


def test_every_form_of_a_recipe_that_changes_nothing_gives_the_same_batch() -> None:
    nothing = recipe("light", "augment.batched.flip=0", "augment.crop_pct=1")
    for channels in (1, 3):
        images = np.random.default_rng(0).integers(0, 256, (4, 40, 40, channels), np.uint8)
        expected = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 127.5 - 1
        for form in FORMS:
            torch.testing.assert_close(form(nothing, images, 40)(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_form_of_a_recipe_changes_every_image(name: str) -> None:
    augment = recipe(name)
    smooth = np.linspace(40, 200, 40 * 40).reshape(1, 40, 40, 1) + np.zeros((6, 1, 1, 3))
    images = smooth.astype(np.uint8)
    for form in FORMS:
        make = form(augment, images, 36)
        first, second = make(), make()
        assert first.shape == (6, 3, 36, 36)
        assert first.isfinite().all()
        assert first.abs().max() < 1 + 1e-4
        again = torch.equal(first, second)
        assert again == (form in (batched, per_image))  # a pure function of seed, epoch and row; the rivals draw anew


def test_counters_count_what_an_accelerator_waits_for() -> None:
    x = torch.arange(6.0)
    with counters.Operators() as seen:
        x.sum().item()
        x[x > 2] += 1
        torch.tensor([1.0, 2.0])
        x.view(2, 3)
    assert sum(seen.names[read] for read in counters.READS) == 3  # a mask is read to take, and again to put
    assert seen.names[counters.MADE] == 1
    with counters.Operators() as seen:
        x.double()
    assert seen.written == 48


def test_a_rise_is_a_sentence() -> None:
    kept, found = {"a": 3, "b": 3, "gone": 1}, {"a": 4, "b": 2, "new": 1}
    assert list(counters.rises(kept, found)) == [
        "a: expected at most 3, found 4; python tests/counters.py --accept keeps it",
        "new: found 1, none is kept; python tests/counters.py --accept keeps it",
    ]
