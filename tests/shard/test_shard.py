import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchtune_fused import Shard, plan_shards
from torchtune_fused.models import ModelConfig, build_decoder
from torchtune_fused.shard import validate_shards

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-5,
    }
)


def with_layers(num_layers: int, **changes) -> ModelConfig:
    return replace(CONFIG, num_layers=num_layers, sliding_windows=(None,) * num_layers, **changes)


def size(config: ModelConfig, shard: Shard) -> int:
    """Parameters of a shard, counted on the shard itself."""
    return sum(parameter.numel() for parameter in build_decoder(config, shard).parameters())


def test_a_shard_knows_its_place():
    first, middle, last = Shard("m", 0, 1, 5), Shard("m", 2, 3, 5), Shard("m", 4, 4, 5)
    assert [s.is_first_layer() for s in (first, middle, last)] == [True, False, False]
    assert [s.is_last_layer() for s in (first, middle, last)] == [False, False, True]
    assert [s.get_layer_count() for s in (first, middle, last)] == [2, 2, 1]
    assert Shard("m", 0, 4, 5).is_first_layer() and Shard("m", 0, 4, 5).is_last_layer()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2, 4), "0 <= start_layer"),
        ((3, 2, 4), "start_layer <= end_layer"),
        ((0, 4, 4), "the last layer being 3"),
        ((5, 5, 4), "end_layer must be below n_layers"),
    ],
)
def test_a_shard_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shard("m", *arguments)


def test_n_layers_may_come_from_the_model():
    shard = Shard("m", 1, 2)
    with pytest.raises(ValueError, match="n_layers is needed"):
        shard.is_last_layer()
    assert shard.of(3).is_last_layer()
    with pytest.raises(ValueError, match="below n_layers"):
        shard.of(2)
    with pytest.raises(ValueError, match="n_layers is 3, but the model has 4"):
        Shard("m", 1, 2, 3).of(4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab_size", [5, 50, 500])
@pytest.mark.parametrize("n", range(1, 7))
def test_no_cut_has_a_smaller_largest_shard(n, vocab_size, tied):
    config = with_layers(6, vocab_size=vocab_size, tie_word_embeddings=tied)
    shards = plan_shards(config, n)
    validate_shards(shards)
    assert len(shards) == n
    largest = max(size(config, shard) for shard in shards)
    for cuts in itertools.combinations(range(1, 6), n - 1):
        starts = (0, *cuts)
        other = [
            Shard("m", start, end - 1, 6) for start, end in zip(starts, (*cuts, 6), strict=True)
        ]
        assert largest <= max(size(config, shard) for shard in other)


def test_equal_cuts_are_preferred():
    shards = plan_shards(with_layers(10, vocab_size=1), 3)
    assert sorted(shard.get_layer_count() for shard in shards) == [3, 3, 4]


@given(st.integers(1, 40), st.data())
def test_a_plan_tiles_the_model(num_layers, data):
    n = data.draw(st.integers(1, num_layers))
    shards = plan_shards(with_layers(num_layers), n)
    validate_shards(shards)
    assert [layer for shard in shards for layer in shard.layers] == list(range(num_layers))


@pytest.mark.parametrize("n", [0, -1, 7])
def test_a_number_of_shards_that_cannot_be(n):
    with pytest.raises(ValueError, match="choose between 1 and 6"):
        plan_shards(CONFIG, n)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], "no shards were given"),
        ([(1, 3)], "does not start at layer 0"),
        ([(0, 2)], "does not reach layer 3"),
        ([(0, 1), (1, 3)], "overlap or are out of order"),
        ([(0, 0), (2, 3)], "no shard owns the layers between"),
        ([(0, 3), (0, 3)], "overlap"),
        ([(2, 3), (0, 1)], "does not start at layer 0"),
    ],
)
def test_shards_that_do_not_make_up_a_model(ranges, message):
    with pytest.raises(ValueError, match=message):
        validate_shards([Shard("m", start, end, 4) for start, end in ranges])


def test_shards_of_different_models():
    with pytest.raises(ValueError, match="different models"):
        validate_shards([Shard("a", 0, 1, 4), Shard("b", 2, 3, 4)])
