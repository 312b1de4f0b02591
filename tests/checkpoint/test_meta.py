"""Meta's consolidated.*.pth, made from a stock torchtune model, whose logits are the truth."""

import json

import pytest
import torch
from torchtune.models.convert_weights import tune_to_meta
from torchtune.models.llama3 import llama3

from torchtune_fused import ShardTransformerDecoder, load_model_config, plan_shards
from torchtune_fused.checkpoint import CheckpointError

PARAMS = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "vocab_size": 96,
}
TOKENS = torch.arange(22).view(2, 11)
ROW_PARALLEL = ("wo.weight", "w2.weight")


@pytest.fixture(scope="module")
def stock() -> torch.nn.Module:
    torch.manual_seed(0)
    return llama3(
        vocab_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        max_seq_len=64,
        intermediate_dim=192,
        rope_base=500_000,
        norm_eps=1e-5,
    )


def write(folder, stock, ranks: int, embedding_dim: int) -> None:
    """Split the model over files as Meta's model-parallel layers are."""
    weights = tune_to_meta(stock.state_dict())
    for rank in range(ranks):
        part = {"rope.freqs": torch.zeros(8)}
        for name, tensor in weights.items():
            if name.endswith("norm.weight"):
                part[name] = tensor
            else:
                by_columns = name.endswith(ROW_PARALLEL)
                dim = embedding_dim if name == "tok_embeddings.weight" else int(by_columns)
                part[name] = tensor.chunk(ranks, dim)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))


@pytest.mark.parametrize(
    ("ranks", "embedding_dim"),
    [(1, 0), (2, 0), (4, 1)],
    ids=["one file", "Llama 3 over 2", "Llama 2 over 4"],
)
def test_logits_are_those_of_the_model_it_was_written_from(tmp_path, stock, ranks, embedding_dim):
    write(tmp_path, stock, ranks, embedding_dim)
    with torch.inference_mode():
        whole = ShardTransformerDecoder.from_pretrained(tmp_path, max_seq_len=64, patch=False)
        # The same modules on the same weights.
        assert torch.equal(whole(TOKENS), stock(TOKENS))
        h = TOKENS
        for shard in plan_shards(load_model_config(tmp_path), 2):
            part = ShardTransformerDecoder.from_pretrained(
                tmp_path, shard, max_seq_len=64, patch=False
            )
            h = part(h) if shard.is_first_layer() else part(hidden_state=h)
        assert torch.equal(h, stock(TOKENS))


def test_saved_in_the_layout_of_transformers(tmp_path, stock):
    write(tmp_path, stock, 1, 0)
    ShardTransformerDecoder.from_pretrained(tmp_path).save_pretrained(tmp_path / "hf")
    model = ShardTransformerDecoder.from_pretrained(tmp_path / "hf", patch=False)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS), stock(TOKENS))


def test_a_missing_part_is_named(tmp_path, stock):
    write(tmp_path, stock, 2, 0)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"attention\.wq\.weight has shape \[32, 64\]"):
        ShardTransformerDecoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)])
def test_corrupt(tmp_path, stock, content):
    write(tmp_path, stock, 1, 0)
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: truncated, or not") as error:
        ShardTransformerDecoder.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[], {"norm.weight": 3}])
def test_not_a_dictionary_of_tensors(tmp_path, stock, content):
    write(tmp_path, stock, 1, 0)
    torch.save(content, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors"):
        ShardTransformerDecoder.from_pretrained(tmp_path)


def test_parts_of_different_models(tmp_path, stock):
    write(tmp_path, stock, 2, 0)
    part = torch.load(tmp_path / "consolidated.01.pth")
    del part["layers.2.feed_forward.w1.weight"]
    torch.save(part, tmp_path / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match="not the parts of one Llama"):
        ShardTransformerDecoder.from_pretrained(tmp_path)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, stock):
    write(tmp_path, stock, 1, 0)
    torch.save({"norm.weight": Malicious()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of plain tensors"):
        ShardTransformerDecoder.from_pretrained(tmp_path)
