"""timm networks with random, published or one's own weights, and one clear sentence when the weights cannot be had."""

import difflib
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache

from fer.errors import UserError
from fer.weights import is_sha256, read_weights, sha256_of

_PROBE_SECONDS = 5.0
_WITHOUT = "go on without weights by {option}=false"
_log = logging.getLogger(__name__)


def timm_network(
    name: str, pretrained: bool | str, options: Mapping[str, Any], option: str = "model.pretrained"
) -> tuple[Any, str]:
    """Build a timm network.

    Weights already in the Hugging Face cache are read from there without any network. Otherwise the hub is probed
    first, since the hub's own client would retry for the better part of a minute.

    Args:
        name: timm's name, ``architecture`` or ``architecture.weights``.
        pretrained: True: the published weights, by default timm's first choice for the architecture. False: random
            weights. A file: its weights, see `fer.weights.read_weights`: of ``python -m fer.pretrain``, or published
            ones in a layout that timm reads.
        options: Further arguments of `timm.create_model`, such as ``num_classes`` or ``img_size``.
        option: The config's key behind ``pretrained``, for messages.

    Returns:
        The network, and where its weights come from: ``random``, or ``timm/<architecture>.<weights>`` or a file, with
        the checksum.

    Raises:
        UserError: timm does not know the name or has no weights for it, the weights cannot be fetched or are damaged,
            or a file holds those of another network.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(pretrained=False), n=3)
        raise UserError(
            f"timm has no model '{name}'; did you mean {' or '.join(close) or 'one of timm.list_models()'}?"
        )
    if isinstance(pretrained, str):
        return _from_file(name, pretrained, options, option)
    if not pretrained:
        _log.info("%s starts from random weights", name)
        return timm.create_model(name, pretrained=False, **options), "random"
    known = timm.list_pretrained(f"{architecture}.*")
    config = timm.models.get_pretrained_cfg(name) if not tag or name in known else None
    if config is None or not config.hf_hub_id:
        raise UserError(
            f"timm has no weights '{name}' (it has: {', '.join(known) or 'none'}); {_WITHOUT.format(option=option)}"
        )
    source = f"timm/{config.architecture}.{config.tag}"
    filename = config.hf_hub_filename or constants.SAFETENSORS_SINGLE_FILE
    cached = try_to_load_from_cache(config.hf_hub_id, filename)
    if isinstance(cached, str):
        source = f"{source} sha256:{_intact(Path(cached))}"
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=_file(cached), **options), source
    reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else _probe(constants.ENDPOINT)
    if reason is None:
        try:
            network = timm.create_model(name, pretrained=True, **options)
        except OSError as error:
            reason = f"the download failed ({type(error).__name__})"
        else:
            cached = try_to_load_from_cache(config.hf_hub_id, filename)
            return network, f"{source} sha256:{_intact(Path(cached))}" if isinstance(cached, str) else source
    raise UserError(
        f"the weights {source} are not in the cache {constants.HF_HUB_CACHE} and cannot be fetched from "
        f"{constants.ENDPOINT}: {reason}; {_WITHOUT.format(option=option)}, or fill the cache first"
    )


def _file(path: str | Path) -> dict[str, Any]:
    """What makes timm take its weights from a file, fitting positions to the image size and dropping the classifier."""
    return {"file": str(path), "custom_load": False}


def _intact(path: Path) -> str:
    """SHA-256 of a file in the Hugging Face cache, which files large files under the name of their published one.

    Raises:
        UserError: the file is not what was published.
    """
    found, published = sha256_of(path), path.resolve().name
    if is_sha256(published) and found != published:
        raise UserError(
            f"{path} is damaged: published with SHA-256 {published}, found {found}; delete it to fetch it anew"
        )
    return found


def _from_file(name: str, place: str, options: Mapping[str, Any], option: str) -> tuple[Any, str]:
    """Build a network with the weights of a file, which must fit it but for classifier and image size."""
    weights = read_weights(place, option, _WITHOUT.format(option=option))
    # timm fills in what it finds, so what it will look for is compared first, on networks without memory. Those of a
    # pyramid (features_only) have other names, but come of the same whole network.
    shape = {key: value for key, value in options.items() if key not in ("features_only", "out_indices", "num_classes")}
    with torch.device("meta"):
        headless = timm.create_model(name, pretrained=False, num_classes=0, **shape)
        known = timm.create_model(name, pretrained=False, num_classes=1, **shape).state_dict().keys()
    translate = getattr(sys.modules[timm.models.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    try:
        tensors = translate(dict(weights.tensors), headless) if translate else weights.tensors
    except (RuntimeError, ValueError, KeyError, AttributeError):
        tensors = {}
    wanted = {key: value.shape for key, value in headless.state_dict().items()}
    misfits = [
        *(f"it lacks {key}" for key in wanted if key not in tensors),
        *(
            f"{key} is {_by(tensors[key])}, not {_by(s)}"
            for key, s in wanted.items()
            if key in tensors and tensors[key].shape != s
        ),
        *(f"{key} is none of its weights" for key in tensors if key not in known),
    ]
    if misfits:
        of = weights.metadata.get("architecture")
        raise UserError(
            f"{option}: {weights.path} does not hold the weights of {name}{f' but of {of}' if of else ''} ({misfits[0]}"
            f"{f' and {len(misfits) - 1} more such' if len(misfits) > 1 else ''}); {_WITHOUT.format(option=option)}"
        )
    network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=_file(weights.path), **options)
    return network, weights.source


def _by(tensor: Any) -> str:
    return " x ".join(map(str, getattr(tensor, "shape", tensor))) or "a number"


def _probe(url: str) -> str | None:
    """Why ``url`` cannot be reached, or None if it answers; in `_PROBE_SECONDS` even when name resolution hangs."""
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(url, timeout=_PROBE_SECONDS)
            outcome.append(None)
        except Exception as error:  # whatever went wrong, the user wants the one sentence
            outcome.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return outcome[0] if outcome else f"no answer within {_PROBE_SECONDS:.0f} seconds"
