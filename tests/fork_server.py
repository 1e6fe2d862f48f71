"""Runs `dsg` commands in forked processes, which have imported everything before they begin.

Reads a JSON object per line: `argv`, the working directory `cwd`, and perhaps `delay` and `signal`,
what to send to the command after how many seconds. Answers with its `status` (negative: the signal
that ended it), `seconds`, and what it wrote to stderr.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from wandb.sdk.data_types import _private

from dsg.cli.environment import prepare_environment


def import_everything() -> None:
    prepare_environment()
    import datamodules  # noqa: F401
    import lightning_modules  # noqa: F401
    from dsg.cli.demo import text, text_work, world  # noqa: F401
    from dsg.cli.demo.text_model import Sizes
    from dsg.cli.grid import run, work  # noqa: F401

    small = {"vocab_size": 120, "d_model": 16, "num_layers": 3, "d_ff": 32, "repetitions": 2}
    text.SIZES = Sizes(**small, max_rounds=1, d_sae=64, sae_samples=2_000)
    text.GRID = {"ratio_percentile": [50.0], "num_features": [2]}
    text.NUM_RANDOM_DRAWS = 1
    # A worker of a grid would import everything again.
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda _method=None: get_context("fork")  # type: ignore[assignment]


def build_cache(name: str) -> int:
    """Builds a folder of the cache, slowly."""
    from dsg.cli.process import interrupts_raised
    from dsg.io.cache import cached_folder

    def build(folder: Path) -> None:
        for number in range(40):
            (folder / f"{number}.txt").write_text(str(number) * 1000)
            time.sleep(0.01)

    with interrupts_raised():
        cached_folder(name, build)
    return 0


def run_child(request: dict[str, Any], errors: Path) -> None:
    """The body of a forked process; leaves through `sys.exit`, as a command does."""
    # W&B makes it when it is imported, here by the parent, and removes it when a process ends.
    Path(_private.MEDIA_TMP.name).mkdir(exist_ok=True)
    os.chdir(request["cwd"])
    for descriptor, target in ((1, os.devnull), (2, str(errors))):
        os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    argv = request["argv"]
    if argv[0] == "cache":
        sys.exit(build_cache(argv[1]))
    sys.argv = ["dsg", *argv]
    from dsg.cli.main import main

    sys.exit(main())


def serve(requests: Any, answers: Any, errors: Path) -> None:
    for line in requests:
        request = json.loads(line)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            run_child(request, errors)
        if "signal" in request:
            time.sleep(request["delay"])
            os.kill(pid, request["signal"])
        _, status = os.waitpid(pid, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - began,
            "errors": errors.read_text(errors="replace") if errors.exists() else "",
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    import_everything()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    serve(sys.stdin, sys.stdout, Path(sys.argv[1]))
