import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from torchtune_fused import ShardTransformerDecoder, load_model_config, plan_shards
from torchtune_fused.shard.pipeline import Pipeline

WORKER = Path(__file__).with_name("pipeline_worker.py")
LAYERS = 4


def save_llama(folder, **sizes):
    """A tiny random Llama by transformers, in several files."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        **sizes,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), hidden_size=48, intermediate_size=80)


@pytest.fixture(scope="module")
def whole_model(checkpoint):
    model = ShardTransformerDecoder.from_pretrained(checkpoint)
    return runpy.run_path(str(WORKER))["generations"](model)


def run_ranks(mode, folder, scratch, world_size, device="cpu", dtype="float32"):
    """Start a process for each rank; return what each saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [mode, folder, scratch, str(world_size), device, dtype]
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(errors)
    return [torch.load(scratch / f"{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, checkpoint, tmp_path_factory):
    return run_ranks("run", checkpoint, tmp_path_factory.mktemp("ranks"), request.param)


def test_every_rank_gets_the_tokens_of_one_process(ranks, whole_model):
    for rank in ranks:
        for call, tokens in whole_model.items():
            assert rank[call].equal(tokens), call


def test_chained_logits_are_the_whole_models_bit_for_bit(ranks):
    assert ranks[-1]["bitwise"] is True
    assert [rank["bitwise"] for rank in ranks[:-1]] == [None] * (len(ranks) - 1)


def test_every_rank_holds_its_planned_layers_and_no_cache_after_use(ranks, checkpoint):
    planned = plan_shards(load_model_config(checkpoint), len(ranks))
    assert [rank["layers"] for rank in ranks] == [list(shard.layers) for shard in planned]
    assert not any(rank["cached"] for rank in ranks)


def test_bad_calls_are_refused_on_every_rank_and_leave_the_pipeline_usable(ranks):
    for rank in ranks:
        errors = rank["errors"]
        assert "exceed the model's max_seq_len" in errors[0]
        # Only where there is another rank to differ from.
        expected = ["rank 1 makes another generate() call than rank 0"] if len(ranks) > 1 else []
        assert errors[1:] == expected


def test_a_rank_that_can_not_load_its_shard_ends_the_others_too(checkpoint, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: file for name, file in index["weight_map"].items()}
    last = files[f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"]
    assert last not in {file for name, file in files.items() if "layers.0." in name}
    (folder / last).unlink()
    first, second = run_ranks("fail", folder, tmp_path, 2)
    assert second["error"] == "CheckpointError"
    assert last in second["message"]
    assert first["error"] == "RankError"
    assert first["message"].startswith("rank 1 could not load its shard: CheckpointError")
    assert last in first["message"]


def test_more_ranks_than_layers_fail_on_every_rank(checkpoint, tmp_path):
    # The cut is planned by the config alone, before any weight is looked for.
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    for rank in run_ranks("fail", tmp_path, tmp_path, 2):
        assert rank["error"] == "ValueError"
        assert "cannot cut a model of 1 layers into 2 shards" in rank["message"]


def test_a_pipeline_without_torch_distributed_says_how_to_start_it(checkpoint):
    with pytest.raises(RuntimeError, match="tune run --nproc_per_node"):
        Pipeline.from_pretrained(checkpoint)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path):
    # Of heads that the kernels take, so that each rank replays its captured steps.
    folder = save_llama(tmp_path / "wide", hidden_size=256, intermediate_size=384)
    model = ShardTransformerDecoder.from_pretrained(folder, device="cuda", dtype=torch.bfloat16)
    expected = runpy.run_path(str(WORKER))["generations"](model)
    ranks = run_ranks("run", folder, tmp_path, 2, "cuda", "bfloat16")
    assert ranks[-1]["bitwise"] is True
    for rank in ranks:
        for call, tokens in expected.items():
            assert rank[call].equal(tokens.to(rank[call].device)), call
