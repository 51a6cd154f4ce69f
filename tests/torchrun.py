"""Scripts under torchrun, in two processes."""

import os
import subprocess
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """One thread, no GPU, and this checkout's library."""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}


def torchrun(script: Path, cwd: Path, *options: str, seconds: float = 300) -> str:
    """What two processes of a ``script`` print. Where time is up torchrun is asked to end, and ends them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, str(script)], cwd=cwd, env=environment(), **pipes) as process:
        try:
            printed, wrong = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.communicate(timeout=60)  # it gives them 30 s, then kills them
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    assert process.returncode == 0, wrong[-3000:]
    return printed
