"""Classes of a network and of another data set, matched by name."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fer.data.manifest import Manifest
from fer.errors import UserError
from fer.evaluation.answers import Answers
from fer.labels import index_map


@dataclass(frozen=True)
class Matching:
    """Which classes both have.

    Attributes:
        shared: names both have, in the network's order; only they are evaluated.
        only_run: outputs of the network without a counterpart in the data: left out, the rest renormalised to sum 1.
        only_data: classes of the data without a counterpart in the network: their images are left out.
        images_left_out: how many images of each of those its official test part has (all images where it has none).
    """

    shared: list[str]
    only_run: list[str]
    only_data: list[str]
    images_left_out: dict[str, int]

    @classmethod
    def of(cls, class_names: Sequence[str], manifest: Manifest) -> "Matching":
        """Match a network's classes with those of a data set.

        Raises:
            UserError: they share fewer than two.
        """
        there = set(manifest.class_names)
        shared = [name for name in class_names if name in there]
        if len(shared) < 2:
            raise UserError(
                f"data: the network knows {', '.join(class_names)}, the data has {', '.join(manifest.class_names)}; "
                "at least two classes must be the same"
            )
        only_data = [name for name in manifest.class_names if name not in class_names]
        tested = manifest.split == "test"
        tested = tested if tested.any() else np.ones(len(manifest), dtype=bool)
        counts = np.bincount(manifest.label[tested], minlength=len(manifest.class_names))
        left = {name: int(counts[list(manifest.class_names).index(name)]) for name in only_data}
        return cls(shared, [name for name in class_names if name not in there], only_data, left)

    def restrict(self, answers: Answers) -> Answers:
        """The same answers over the shared classes alone, probabilities renormalised where outputs were left out."""
        if not self.only_run:
            return answers
        kept = answers.probabilities[:, index_map(self.shared, answers.class_names)].astype(np.float64)
        total = kept.sum(1, keepdims=True)
        # A network may be so sure of a class left out that nothing remains in single precision.
        some = np.where(total > 0, kept / np.maximum(total, np.finfo(np.float64).tiny), 1 / len(self.shared))
        label = np.array(index_map(answers.class_names, self.shared))[answers.label]
        return dataclasses.replace(answers, class_names=self.shared, label=label, probabilities=some.astype(np.float32))

    def record(self, answers: Answers) -> dict[str, Any]:
        """What was left out, and what the answers left out would have cost.

        Args:
            answers: over all of the network's classes.
        """
        foreign = np.isin(answers.predicted, index_map(self.only_run, answers.class_names))
        return {
            **dataclasses.asdict(self),
            "renormalised": bool(self.only_run),
            "answers_of_classes_left_out": int(foreign.sum()),
            "acc_if_those_count_as_wrong": float((answers.predicted == answers.label).mean()),
        }

    def sentences(self) -> list[str]:
        """The same for people; empty where all classes match."""
        out = []
        if self.only_run:
            out.append(
                f"the network's {', '.join(self.only_run)} left out, which the data does not have; probabilities "
                f"renormalised over the {len(self.shared)} shared classes"
            )
        if self.only_data:
            counts = ", ".join(f"{name} ({n:,} images)" for name, n in self.images_left_out.items())
            out.append(f"the data's {counts} left out, which the network does not know")
        return out
