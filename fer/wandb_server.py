"""W&B's server: where it is, whether there are credentials for it, whether it answers. Nothing here imports wandb."""

import netrc
import os
import socket
import threading
from urllib.parse import urlparse

PROBE_SECONDS = 1.5


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


def choose_mode() -> str:
    """``online`` or ``offline`` (or ``disabled``, where WANDB_MODE says so)."""
    asked = os.environ.get("WANDB_MODE")
    if asked:
        return asked
    host, port = address()
    return "online" if has_credentials(host) and reachable(host, port) else "offline"
