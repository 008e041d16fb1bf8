"""timm networks with or without their published weights, and one clear sentence when the weights cannot be had."""

import difflib
import logging
import threading
from collections.abc import Mapping
from typing import Any

import timm
from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache

from fer.errors import UserError

_PROBE_SECONDS = 5.0
_log = logging.getLogger(__name__)


def timm_network(name: str, pretrained: bool, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Build a timm network.

    Weights already in the Hugging Face cache are read from there without any network. Otherwise the hub is probed
    first, since the hub's own client would retry for the better part of a minute.

    Args:
        name: timm's name, ``architecture`` or ``architecture.weights``.
        pretrained: Load the published weights, by default timm's first choice for the architecture.
        options: Further arguments of `timm.create_model`, such as ``num_classes`` or ``img_size``.

    Returns:
        The network, and where its weights come from: ``random`` or ``timm/<architecture>.<weights>``.

    Raises:
        UserError: timm does not know the name or has no weights for it, or the weights cannot be fetched.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(pretrained=False), n=3)
        raise UserError(
            f"timm has no model '{name}'; did you mean {' or '.join(close) or 'one of timm.list_models()'}?"
        )
    if not pretrained:
        _log.info("%s starts from random weights", name)
        return timm.create_model(name, pretrained=False, **options), "random"
    known = timm.list_pretrained(f"{architecture}.*")
    config = timm.models.get_pretrained_cfg(name) if not tag or name in known else None
    if config is None or not config.hf_hub_id:
        raise UserError(
            f"timm has no weights '{name}' (it has: {', '.join(known) or 'none'}); "
            "go on without them by model.pretrained=false"
        )
    source = f"timm/{config.architecture}.{config.tag}"
    filename = config.hf_hub_filename or constants.SAFETENSORS_SINGLE_FILE
    cached = try_to_load_from_cache(config.hf_hub_id, filename)
    if isinstance(cached, str):
        overlay = {"file": cached, "custom_load": False}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options), source
    reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else _probe(constants.ENDPOINT)
    if reason is None:
        try:
            return timm.create_model(name, pretrained=True, **options), source
        except OSError as error:
            reason = f"the download failed ({type(error).__name__})"
    raise UserError(
        f"the weights {source} are not in the cache {constants.HF_HUB_CACHE} and cannot be fetched from "
        f"{constants.ENDPOINT}: {reason}; go on without them by model.pretrained=false, or fill the cache first"
    )


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
