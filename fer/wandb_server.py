"""W&B's server: where it is, whether there are credentials for it, whether it answers. Nothing here imports wandb."""

import netrc
import os
import socket
import threading
from typing import Any, NamedTuple
from urllib.parse import urlparse

PROBE_SECONDS = 1.0


def address() -> tuple[str, int]:
    """Host and port of the server: W&B's own, or the one WANDB_BASE_URL names."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return url.hostname or "api.wandb.ai", url.port or (80 if url.scheme == "http" else 443)


def has_credentials(host: str) -> bool:
    """Whether an API key is at hand: the environment's, or one for this host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def reachable(host: str, port: int, seconds: float = PROBE_SECONDS) -> bool:
    """Whether a TCP connection opens in time; name resolution, which has no time limit of its own, included."""
    answer: list[bool] = []

    def probe() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            answer.append(True)
        except OSError:
            answer.append(False)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answer and answer[0])


class Way(NamedTuple):
    """How a run is recorded.

    Attributes:
        mode: W&B's own word: ``online``, ``offline``, ``disabled``.
        upload: an offline record is uploaded beside the run (`fer.wandb_upload`).
        said: a sentence for the person.
    """

    mode: Any  # the parameter of wandb.init is a Literal
    upload: bool
    said: str


def choose_way(asked: str) -> Way:
    """How to record, decided before any wait.

    Args:
        asked: ``auto``, or one of W&B's modes.
    """
    asked = os.environ.get("WANDB_MODE", asked)
    if asked != "auto":
        return Way(asked, False, asked)
    host, port = address()
    if not has_credentials(host):
        return Way("offline", False, f"offline, no credentials for {host}; `wandb sync` uploads the run later")
    if not reachable(host, port):
        return Way("offline", False, f"offline, {host}:{port} does not answer; `wandb sync` uploads the run later")
    if "WANDB_SWEEP_ID" in os.environ:  # W&B's agent has to know of the run before it goes on
        return Way("online", False, "online")
    return Way("offline", True, f"recorded here, and uploaded to {host} beside the run")
