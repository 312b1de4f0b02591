"""Section first_token: from a checkpoint on disk to the first token."""

import subprocess
import sys
from collections.abc import Callable, Iterator

from torchtune_fused.benchmarks.contest import OURS, TRANSFORMERS, Contest, System
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.recipe_config import expand_path


def first_token(setting: Setting) -> Iterator[Contest]:
    """From ``from_pretrained`` to the first token in a fresh process, imports aside."""
    if setting.cfg.checkpoint is None:
        raise ValueError("section first_token loads a checkpoint: set checkpoint to a folder")
    device = repr(str(setting.device))
    prompt = f"torch.arange(8, device={device})[None]"
    arguments = f"{expand_path(setting.cfg.checkpoint)!r}, dtype={setting.dtype}"
    systems = [
        System(
            TRANSFORMERS,
            lambda: _program(
                "from transformers import AutoModelForCausalLM as Model",
                f"model = Model.from_pretrained({arguments}).to({device})",
                f"model.generate({prompt}, max_new_tokens=1)",
            ),
        ),
        System(
            OURS,
            lambda: _program(
                "from torchtune_fused import ShardTransformerDecoder as Model, generate",
                f"model = Model.from_pretrained({arguments}, device={device})",
                f"generate(model, {prompt}, max_new_tokens=1)",
            ),
        ),
    ]
    yield Contest(
        section="first_token",
        work="load, and the first token",
        tokens=1,
        systems=systems,
        clock=lambda run: run(),
        warm_up=0,  # every run is a fresh process
    )


def _program(imports: str, *statements: str) -> Callable[[], float]:
    """Run statements in a process of their own; returns their seconds."""
    clock = "import torch, time; start = time.perf_counter()"
    source = "\n".join([imports, clock, *statements, "print(time.perf_counter() - start)"])

    def run() -> float:
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"a process failed: {done.stderr.strip().splitlines()[-1:]}")
        return float(done.stdout.split()[-1])

    return run
