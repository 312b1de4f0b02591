"""Loading a part of a checkpoint takes the memory of that part."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from torchtune_fused import load_model_config
from torchtune_fused.checkpoint import WeightAdapter
from torchtune_fused.models import build_decoder

MiB = 2**20
SIZES = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
CASES = [(0, 3, "bfloat16"), (4, 7, "bfloat16"), (0, 3, "float32"), (4, 7, "float32")]

PROGRAM = """
import json, os, sys, torch
from torchtune_fused import Shard, ShardTransformerDecoder

def load(folder, shard=None, dtype=None):
    return ShardTransformerDecoder.from_pretrained(folder, shard, dtype=dtype, patch=False)

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

small, large, cases = sys.argv[1:]
torch.set_num_threads(1)  # a forked process has no other
load(small)  # what Python and torch import on first use is not the model's
for start, end, dtype in json.loads(cases):
    if os.fork() == 0:  # so that no case finds memory that another has left behind
        load(small)  # maps the libraries' pages again
        open("/proc/self/clear_refs", "w").write("5")  # the peak restarts from here
        before = status("VmRSS")
        model = load(large, Shard("llama", start, end), getattr(torch, dtype))
        peak = status("VmHWM") - before
        print(json.dumps([peak, sum(p.nbytes for p in model.parameters())]), flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit("a case failed")
"""


def write(folder, sizes: dict) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes))
    config = load_model_config(folder)
    with torch.device("meta"):
        weights = build_decoder(config).state_dict()
    adapter = WeightAdapter.for_hf(config)
    tensors = {
        adapter.their_name(name): torch.ones(tensor.shape, dtype=torch.bfloat16)
        for name, tensor in weights.items()
    }
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[tuple, tuple[int, int]]:
    """Of each case: by how much the resident memory peaked, and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("memory")
    small, large = folder / "small", folder / "large"
    write(small, {**SIZES, "hidden_size": 64, "vocab_size": 64, "intermediate_size": 64})
    # The largest tensor of all is the last shard's head, which it copies from the embedding.
    write(large, {**SIZES, "tie_word_embeddings": True})
    assert (large / "model.safetensors").stat().st_size > 200 * MiB
    command = [sys.executable, "-c", PROGRAM, str(small), str(large), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_of_a_checkpoint_peaks_at_its_own_bytes(measured, case):
    peak, own = measured[case]
    assert own > 100 * MiB
    # Were the pages of the file counted too, this would be 2 (same dtype) or 1.5 (widened).
    assert peak < 1.15 * own, f"peak {peak / MiB:.0f} MiB for {own / MiB:.0f} MiB of weights"
