"""The upload of a W&B record beside the run that writes it, so that the run itself never waits for W&B's server.

The run is recorded offline. `Upload` starts a process that sends the record while it grows: ``wandb beta sync --live``.
What the server does, answering slowly, with errors or never, happens to that process alone.
"""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)
RECORD_SECONDS = 15.0  # from one flush of W&B's record to the next: before the first there is nothing to send
LEFT_SECONDS = 600.0  # how long an upload may go on after its run has ended
YIELD = 10  # the run has the processor first
SYNCED = ".synced"  # what W&B appends to a record's name once all of it is uploaded


class Upload:
    """One record's upload, from now until the run has ended and a little beyond.

    Args:
        record: the run's ``wandb/offline-run-*/run-*.wandb``.
    """

    def __init__(self, record: Path) -> None:
        self.record = record
        words = [sys.executable, "-m", "fer.wandb_upload", str(record)]
        # A local process of its own: the run's ends with the run.
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        # Its own session: Ctrl-C in the terminal ends the run, and the upload only after what the run says last.
        with (record.parents[1] / "upload.log").open("ab") as output:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**environment, "WANDB_SILENT": "false"},
            )

    def finish(self, seconds: float) -> bool:
        """Tell the upload that the run has ended, and wait for it.

        Args:
            seconds: the longest wait; the upload goes on after it, for `LEFT_SECONDS` at most.

        Returns:
            Whether everything is uploaded; if not, a sentence has said what to do.
        """
        assert self.process.stdin is not None
        self.process.stdin.close()
        again = f"wandb sync {self.record.parent}"
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning(
                "W&B: the upload goes on for up to %g minutes after this run; if the run is not whole then: %s",
                LEFT_SECONDS / 60,
                again,
            )
            return False
        done = self.record.with_name(self.record.name + SYNCED).exists()
        if not done:
            log.warning("W&B: the upload failed, everything is recorded here; later: %s", again)
        return done


def main() -> None:
    """``python -m fer.wandb_upload RECORD``, whose standard input stays open as long as the run goes on."""
    record = Path(sys.argv[1])
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.buffer.read()  # returns when the run closes it, or dies
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    os.nice(YIELD)
    ended.wait(RECORD_SECONDS)
    # A run's sessions one after another, first those that were not uploaded: W&B appends each to the one before.
    with FileLock(record.parents[1] / ".upload.lock"):
        earlier = sorted(p for p in record.parents[1].glob("offline-run-*/run-*.wandb") if p.parent < record.parent)
        for path in earlier:
            if not path.with_name(path.name + SYNCED).exists():
                _sync([str(path)], ended)
        _sync(["--live", str(record)], ended)


def _sync(words: list[str], ended: threading.Event) -> None:
    process = subprocess.Popen([sys.executable, "-m", "wandb", "beta", "sync", *words], stdin=subprocess.DEVNULL)
    threading.Thread(target=_stop, args=(process, ended), daemon=True).start()
    process.wait()


def _stop(process: "subprocess.Popen[bytes]", ended: threading.Event) -> None:
    ended.wait()
    try:
        process.wait(LEFT_SECONDS)
    except subprocess.TimeoutExpired:  # the server does not take it, or the run was killed and wrote no end
        process.kill()


if __name__ == "__main__":
    main()
