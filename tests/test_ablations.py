"""The papers' ablations: every job of both commands of each sweep composes, fits its classes and, small, is built."""

import shlex

import pytest
import torch
from conftest import apply, composed, planned
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fer.config import CONF, argument_problems
from fer.models.base import ExpressionModule

JOBS = {  # of the full form and of the small one
    "cbam_placement": (5, 5),
    "convcut_blocks": (4, 4),
    "convcut_truncation": (7, 4),
    "multiscale_region_gamma": (3, 3),
    "multiscale_region_scales": (5, 5),
    "resattn_vit_blocks": (8, 8),
    "two_stream_start": (4, 2),
}
FORMS = [(sweep, form) for sweep in JOBS for form in ("full", "small")]


def jobs_of(sweep: str, form: str) -> list[list[str]]:
    """Overrides of the jobs of a command at the head of the sweep's file."""
    head = (CONF / "sweep" / f"{sweep}.yaml").read_text().splitlines()
    full, small = (line.removeprefix("#").strip() for line in head if "python -m fer.train" in line)
    words = shlex.split(small if form == "small" else full)[3:]
    return list((planned(*words).jobs or {}).values())


def test_every_ablation_is_on_the_page() -> None:
    page = (CONF.parent / "docs" / "papers.md").read_text()
    assert [sweep for sweep in JOBS if page.count(f"sweep={sweep}") < 2] == []


@pytest.mark.parametrize(("sweep", "form"), FORMS)
def test_every_job_is_another_network_or_loss_that_can_be_built(sweep: str, form: str) -> None:
    jobs = jobs_of(sweep, form)
    assert len(jobs) == JOBS[sweep][form == "small"]
    own = ("model.", "loss.")  # where the jobs differ
    (shared,) = {tuple(word for word in words if not word.startswith((*own, "data.root="))) for words in jobs}
    config = composed(*shared)
    assert argument_problems({"data": OmegaConf.to_container(config.data, resolve=True)}) == []
    found = set()
    for words in jobs:
        apply([word for word in words if word.startswith(own)], config)  # each sets all that any sets
        model = OmegaConf.to_container(config.model, resolve=True)
        assert isinstance(model, dict)
        assert argument_problems({"model": model}) == []
        found.add(str(model))
        if form == "small":
            with torch.device("meta"):
                names = model["class_names"] or [f"class {k}" for k in range(7)]
                module = instantiate(OmegaConf.create({**model, "class_names": names}))
            assert isinstance(module, ExpressionModule)
    assert len(found) == len(jobs)
