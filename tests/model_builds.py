"""Builds the models of ``conf/model`` small, and says whether predictions depend on neighbours."""

from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from fer.models.base import ExpressionModule

CONF = Path(__file__).parents[1] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("[!_]*.yaml"))
SEVEN = ["anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]
EIGHT = sorted([*SEVEN, "contempt"])
CHEAP = {
    "dan": ["backbone=test_resnet", "image_size=64", "heads=2"],
    "multiscale_region": [
        *["backbone=test_resnet", "image_size=64", "width=16", "proposals=8", "score=0.1", "detector_epochs=0"],
    ],
    "posterpp": ["blocks=[1,1,1]", "dim=32", "depth=1", "width=16", "landmark_blocks=[1,1,1]"],
    "two_stream": ["backbone=test_vit", "image_size=64", "dim=32", "depth=1", "width=16", "landmark_blocks=[1,1,1]"],
    "cbam_resnet": ["width=32", "layers=[1,1,1,1]"],
    "convcut": ["backbone=convnext_atto", "truncate=2", "image_size=96"],
    "resattn_vit": [
        *["backbone=test_resnet", "image_size=64", "width=64", "dim=32", "hidden=32", "depth=2", "heads=4"],
    ],
    "timm": ["backbone=test_resnet", "image_size=64"],
    "vit": ["backbone=test_vit", "image_size=64"],
    "swin": ["image_size=64", "arguments.embed_dim=16", "arguments.depths=[1,1,2,1]", "arguments.window_size=2"],
}
PUBLISHED = ["width=64", "landmark_blocks=[4,6,2]"]  # of the two, what weights from elsewhere fit
HEAVY = {"posterpp", "two_stream"}  # not to be made small: minutes of CPU time to learn anything


def build(name: str, *overrides: str, classes: list[str] = SEVEN) -> ExpressionModule:
    """The module a YAML describes, without pre-trained weights unless an override says so."""
    model = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    model.pop("defaults", None)  # Hydra's choice of a recipe, no argument of the model
    OmegaConf.set_struct(model, True)
    if "arguments" in model:
        OmegaConf.set_struct(model.arguments, False)
    offline = ["pretrained=false"] if "pretrained" in model else []
    model.merge_with_dotlist([*offline, *overrides])
    groups = {
        "data": {"class_names": classes},
        "loss": OmegaConf.load(CONF / "loss" / "cross_entropy.yaml"),
        "optim": OmegaConf.load(CONF / "optim" / "adamw.yaml"),
    }
    torch.manual_seed(0)
    try:
        module = instantiate(OmegaConf.create({**groups, "model": model}).model)
    except InstantiationException as error:
        raise error.__cause__ or error from None
    assert isinstance(module, ExpressionModule)
    return module


def cheap(name: str, *overrides: str, classes: list[str] = SEVEN) -> ExpressionModule:
    return build(name, *CHEAP.get(name, []), *overrides, classes=classes)


def shaken(module: ExpressionModule) -> ExpressionModule:
    """The module in eval mode, with norms, biases and gates moved off the zeros and ones they start from."""
    generator = torch.Generator().manual_seed(3)
    for tensor in module.network.state_dict().values():
        if tensor.is_floating_point() and (tensor.ndim <= 1 or not tensor.any()):
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return module.eval()


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Random coloured patches, in [-1, 1]."""
    patches = 2 * torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) - 1
    return nn.functional.interpolate(patches, size)


def batch_of(module: ExpressionModule, count: int) -> dict[str, torch.Tensor]:
    """Random images whose labels go round the classes, with a face and its organs where they usually are."""
    face = torch.tensor([0.1, 0.1, 0.8, 0.8])
    organs = torch.tensor([[0.2, 0.3, 0.2, 0.2], [0.6, 0.3, 0.2, 0.2], [0.4, 0.4, 0.2, 0.3], [0.3, 0.7, 0.4, 0.15]])
    return {
        "image": images(count, module.image_size),
        "label": torch.arange(count) % module.num_classes,
        "box": module.image_size * face.repeat(count, 1),
        "organ_boxes": module.image_size * organs.repeat(count, 1, 1),
    }


def parameter_count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def neighbour_dependence(module: ExpressionModule, dtype: torch.dtype = torch.float64) -> float:
    """Largest change of an image's logits between being alone, in a batch, permuted, and among other images (T1)."""
    module = shaken(module).to(dtype)
    batch, others = images(8, module.image_size).to(dtype), images(3, module.image_size, seed=1).to(dtype)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = module(batch)
        alone = torch.cat([module(batch[i : i + 1]) for i in (0, 5)])
        permuted = module(batch[order])
        beside = module(torch.cat([others, batch[2:3]]))[-1]
    assert (logits[0] - logits[1]).abs().max() > 1e-6, "the images must differ for this to say anything"
    differences = [alone - logits[[0, 5]], permuted - logits[order], beside - logits[2]]
    return max(d.abs().max().item() for d in differences)
