"""What papers claim, and how their protocol differs from a group's: read from ``conf/claims.yaml``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fer.config import CONF
from fer.errors import UserError
from fer.reporting.benches import Bench
from fer.reporting.groups import Group

OFFICIAL = "official"
INPUT = ("mean", "std", "pretrained")  # how images come in; what weights begin with has a line of its own
# What the name of weights holds that were trained on what a claim names; see fer/models/pretrained.py.
_MARKS = {"ImageNet": r"in\d+k", "ImageNet-1k": r"(?<!ft_)in1k", "DINOv2": "dinov2"}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One figure a paper claims, in per cent as printed.

    Attributes:
        paper: title of the paper.
        method: the method's name in it.
        data: data sets whose tables it belongs to.
        classes: number of classes.
        acc: accuracy.
        split: ``official``, or what the paper did instead.
        selected_on: ``val``, ``test`` or ``unstated``: what chose the epoch.
        model: our name of the method, None where we have none.
        settings: what a run of that model must have been set to, as dotted names of its config.
        mean_acc: mean class accuracy.
        per_class: accuracy of each class.
        test_images: images tested.
        tta: views averaged at test, None where it is not said.
        weights: pre-trained weights, None where it is not said.
        void: why the figure must not be chased.
        notes: what else a reader must know.
    """

    paper: str
    method: str
    data: list[str]
    classes: int
    acc: float
    split: str
    selected_on: str
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    mean_acc: float | None = None
    per_class: dict[str, float] = field(default_factory=dict)
    test_images: int | None = None
    tta: str | None = None
    weights: str | None = None
    void: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def protocol(self) -> str:
        """The paper's protocol in words."""
        words = [f"{self.split} parts" if self.split == OFFICIAL else self.split, f"{self.classes} classes"]
        words += [f"{self.test_images:,} test images"] if self.test_images is not None else []
        words += ["epoch: not said" if self.selected_on == "unstated" else f"epoch chosen on {self.selected_on}"]
        words += [f"views: {self.tta}"] if self.tta not in (None, "none") else []
        words += [f"weights: {self.weights}"] if self.weights is not None else []
        return ", ".join(words)

    def measured_by(self, group: Group) -> bool:
        """Whether a group is of the model, and set as the claim says."""
        return group.model == self.model and all(group.settings.get(k) == v for k, v in self.settings.items())

    def differences(self, group: Group) -> list[str]:
        """Everything known in which a group's protocol differs from the paper's, in words."""
        results, out = group.runs[0].results, []
        if self.split != OFFICIAL:
            out.append(f"split: {self.split}; here {group.protocol}")
        elif not _official(group):
            out.append(f"split: official parts; here {group.protocol}")
        if group.missing:
            out.append(f"here {len(group.folds)} of {group.settings['data.protocol.folds']} folds")
        if self.classes != len(group.classes):
            out.append(f"{self.classes} classes; here {len(group.classes)}")
        if self.test_images is not None and self.test_images != group.images:
            out.append(f"{self.test_images:,} test images; here {group.images:,}")
        here = results["selected_on"]
        if self.selected_on == "unstated":
            out.append(f"not said what chose the epoch; here {here}")
        elif self.selected_on != here:
            out.append(f"epoch chosen on {self.selected_on}; here on {here}")
        if self.tta is not None and self.tta != results["tta"]:
            out.append(f"views averaged at test: {self.tta}; here {results['tta']}")
        weights = str(results["weights"])
        if self.weights is not None and ("random" in weights or not re.search(_MARKS.get(self.weights, "$^"), weights)):
            out.append(f"weights: {self.weights}; here {weights}")
        if changed := _changed(group):
            out.append(f"here not the network of conf/model/{group.model}.yaml: {', '.join(changed)}")
        return out

    @property
    def remarks(self) -> list[str]:
        """What holds of the claim itself."""
        return [*([f"void: {self.void}"] if self.void else []), *self.notes]


def _changed(group: Group) -> list[str]:
    """The options in which a group's network is not the one of its model's file, which is the paper's."""
    path = CONF / "model" / f"{group.model}.yaml"
    plain = yaml.safe_load(path.read_text()) if path.is_file() else {}
    decided = {key: value for key, value in plain.items() if not isinstance(value, dict) and "${" not in str(value)}
    there = {key: group.settings.get(f"model.{key}", value) for key, value in decided.items()}
    return [f"{key}={value}" for key, value in there.items() if value != decided[key] and key not in INPUT]


def _official(group: Group) -> bool:
    """Whether a group is tested on the data set's official test part."""
    rotating = group.settings.get("data.protocol.held_out") == "val"
    return rotating or str(group.settings.get("data.protocol._target_")).endswith(".Official")


def load_claims(path: Path) -> list[Claim]:
    """Read a claims file.

    Raises:
        UserError: it is missing, no YAML, or an entry lacks a key or has one too many.
    """
    try:
        content = yaml.safe_load(path.read_text())
        papers, entries = content["papers"], content["claims"]
    except OSError:
        raise UserError(f"claims={path}: no such file; expected one like conf/claims.yaml") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no claims file ({error}): expected `papers` and `claims` as conf/claims.yaml has"
        ) from None
    return [_claim(entry, papers, f"{path}, claim {place}") for place, entry in enumerate(entries, 1)]


def _claim(entry: dict[str, Any], papers: dict[str, str], where: str) -> Claim:
    known = {one.name for one in fields(Claim)}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]}, expected some of {', '.join(sorted(known))}")
    if entry.get("paper") not in papers:
        raise UserError(f"{where}: paper: {entry.get('paper')} is not one of {', '.join(papers)}")
    try:
        return Claim(**{**entry, "paper": papers[entry["paper"]]})
    except TypeError as error:
        raise UserError(f"{where}: {str(error).partition(' ')[2]}") from None


@dataclass(frozen=True)
class Beside:
    """A claim and the measured group beside it, None where the model was not run."""

    claim: Claim
    group: Group | None


def beside(bench: Bench, claims: Sequence[Claim]) -> list[Beside]:
    """Every claim on a bench's data set, with each group of its model; claims with a measured group first."""
    out = []
    for claim in claims:
        if bench.data in claim.data:
            groups = [group for group in bench.ranked if claim.measured_by(group)]
            out += [Beside(claim, group) for group in groups] or [Beside(claim, None)]
    return sorted(out, key=lambda one: one.group is None)
