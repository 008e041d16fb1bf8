"""The W&B logger: online with credentials and a reachable server, offline otherwise, decided before any wait."""

import logging
import netrc
import os
import socket
import threading
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)
PROBE_SECONDS = 1.5


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
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = url.hostname or "api.wandb.ai", url.port or (80 if url.scheme == "http" else 443)
    return "online" if has_credentials(host) and reachable(host, port) else "offline"


class Wandb(WandbLogger):
    """Lightning's W&B logger inside the run folder.

    Args:
        project, entity: where the run goes on W&B.
        group: runs that belong together: a sweep, or all runs of one data set and model.
        job_type: ``train``, ``fold``, ``eval`` or ``summary``.
        tags: words to filter by.
        mode: ``auto`` (see `choose_mode`), ``online`` or ``offline``.
        run_id: the run's id, the same again after a resume.
        name: the run's name.
        save_dir: the run folder.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        group: str | None,
        job_type: str,
        tags: list[str],
        mode: str,
        run_id: str,
        name: str,
        save_dir: str,
    ) -> None:
        chosen = choose_mode() if mode == "auto" else mode
        log.info("W&B: %s", chosen if chosen == "online" else f"{chosen}; `wandb sync` uploads the run later")
        options: dict[str, Any] = {"entity": entity, "group": group, "job_type": job_type, "tags": list(tags)}
        os.environ.setdefault("WANDB_SILENT", "true")
        super().__init__(
            project=project,
            name=name,
            save_dir=save_dir,
            id=run_id,
            resume="allow",
            mode=chosen,
            log_model=False,
            **options,
        )
        # Lightning passes this on although W&B no longer knows it and warns.
        self._wandb_init.pop("anonymous", None)
