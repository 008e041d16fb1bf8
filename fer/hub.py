"""An exported network alone, without its run: built by name through the allow-list, weights from safetensors.

    model = ExportedModel.from_pretrained("path/to/export")  # or a repository of the Hugging Face Hub
    model.probabilities(model.preprocess(crops))             # (B, S, S, C) uint8 aligned crops -> (B, K)

Nothing is unpickled on the way: a folder without ``model.safetensors`` is refused, whatever else it holds.
"""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import EntryNotFoundError
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from fer.config import argument_problems
from fer.data.transforms import Augment, Finish
from fer.errors import UserError
from fer.models.base import ExpressionModule
from fer.safety import refuse_unsafe
from fer.trained import INITIAL_WEIGHTS


class ExportedModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="fer",
    pipeline_tag="image-classification",
    tags=["facial-expression-recognition"],
):
    """A network with what it needs to be used; the arguments are the content of ``config.json``.

    Args:
        model: the architecture's node of a run's config, its ``_target_`` on the allow-list.
        preprocessing: ``image_size``, ``store_size``, ``channels``, ``crop_pct``, ``mean``, ``std``.
        temperature: that calibrates the probabilities; None: uncalibrated.
        about: where the weights come from, for people.

    Raises:
        UserError: a target that may not be used, or options that its class does not take.
    """

    def __init__(
        self,
        model: dict[str, Any],
        preprocessing: dict[str, Any],
        temperature: float | None,
        about: dict[str, Any],
    ) -> None:
        super().__init__()
        # No weights are fetched or read for a network that gets its own in a moment.
        options = {**model, **{key: value for key, value in INITIAL_WEIGHTS.items() if key in model}}
        config = OmegaConf.create({"model": options})
        refuse_unsafe(config)
        problems = argument_problems({"model": options})
        if problems:
            raise UserError("config.json is of other code than this: " + "; ".join(problems))
        module = instantiate(config.model)
        if not isinstance(module, ExpressionModule):
            raise UserError(f"config.json: model._target_={model['_target_']} is no model")
        self.network = module.network
        self.class_names = module.class_names
        self.temperature = temperature
        self.preprocessing, self.about = preprocessing, about
        augment = Augment(crop_pct=preprocessing["crop_pct"], crops_per_image=1, batched=None, per_image=[])
        self._finish = Finish(
            size=preprocessing["image_size"],
            mean=preprocessing["mean"],
            std=preprocessing["std"],
            augment=augment,
            seed=0,
            train=False,
            augmented=False,
            tta="none",
        )
        self.eval()

    def preprocess(self, crops: Tensor) -> Tensor:
        """(B, store_size, store_size, channels) uint8 faces, aligned as in training -> (B, 3, S, S)."""
        side, channels = self.preprocessing["store_size"], self.preprocessing["channels"]
        if crops.dtype != torch.uint8 or crops.shape[1:] != (side, side, channels):
            raise ValueError(
                f"crops {crops.dtype} {tuple(crops.shape)}: expected uint8 (B, {side}, {side}, {channels})"
            )
        return self._finish({"image": crops, "index": torch.arange(len(crops))}, epoch=0)["image"]

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, K) logits."""
        logits: Tensor = self.network(image)
        return logits

    def probabilities(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, K) float32 probabilities, calibrated where a temperature is known."""
        return (self(image).float() / (self.temperature or 1.0)).softmax(1)  # type: ignore[no-any-return]

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        model: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
        temperature: float | None = None,
        about: dict[str, Any] | None = None,
        map_location: str = "cpu",
    ) -> "ExportedModel":
        """Build from ``config.json``, which the mixin has read, and load ``model.safetensors``; never a pickle."""
        if model is None or preprocessing is None:
            raise UserError(f"{model_id}: config.json is missing or has no model and preprocessing: expected an export")
        if Path(model_id).is_dir():
            path = str(Path(model_id) / SAFETENSORS_SINGLE_FILE)
        else:
            try:
                path = hf_hub_download(
                    repo_id=model_id,
                    filename=SAFETENSORS_SINGLE_FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            except EntryNotFoundError:
                raise UserError(f"{model_id} has no {SAFETENSORS_SINGLE_FILE}, and nothing else is loaded") from None
        if not Path(path).is_file():
            raise UserError(f"{path} is missing, and nothing else is loaded: expected an export with its weights")
        exported = cls(model=model, preprocessing=preprocessing, temperature=temperature, about=about or {})
        try:
            safetensors.torch.load_model(exported, path, strict=True, device=map_location)
        except (RuntimeError, safetensors.SafetensorError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{path} does not fit the model of its config.json ({reason})") from None
        return exported.to(map_location).eval()
