"""Files that are not what they should be: one clear line, and nothing is loaded."""

import os

import pytest
import torch

from torchtune_fused import ShardTransformerDecoder
from torchtune_fused.checkpoint import CheckpointError

INDEX = "model.safetensors.index.json"
FILE = "model.safetensors"


def load_and_fail(folder, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        ShardTransformerDecoder.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_weights(single):
    (single / FILE).unlink()
    assert "no weights found" in load_and_fail(single, FileNotFoundError)


def test_no_folder(tmp_path):
    assert "no such folder" in load_and_fail(tmp_path / "absent", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ShardTransformerDecoder.from_pretrained("./absent/folder")


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=["empty", "size", "header", "last byte"])
def test_truncated(single, kept):
    content = (single / FILE).read_bytes()
    (single / FILE).write_bytes(content[:kept])
    assert f"{FILE}: truncated" in load_and_fail(single)


def test_not_safetensors(single):
    (single / FILE).write_bytes(b"<html>Please log in</html>" * 100)
    assert "not a safetensors file" in load_and_fail(single)


def test_index_naming_an_absent_file(split, edit_index):
    edit_index(
        split,
        lambda weight_map: weight_map.update({"model.norm.weight": "gone.safetensors"}),
    )
    assert "gone.safetensors: the file is missing" in load_and_fail(split)


def test_index_naming_a_file_without_the_tensor(split, edit_index):
    def move(weight_map):
        files = sorted(set(weight_map.values()))
        current = weight_map["model.norm.weight"]
        weight_map["model.norm.weight"] = next(file for file in files if file != current)

    edit_index(split, move)
    assert "model.norm.weight is missing" in load_and_fail(split)


@pytest.mark.parametrize(
    "file",
    [
        "../single/model.safetensors",
        "inside/../../model.safetensors",
        "/etc/model.safetensors",
        "C:\\model.safetensors",
        "..\\model.safetensors",
        "model.pickle",
        "",
        7,
        None,
    ],
)
def test_index_naming_a_file_outside(split, edit_index, file):
    edit_index(split, lambda weight_map: weight_map.update({"model.norm.weight": file}))
    assert "not a .safetensors file in its folder" in load_and_fail(split)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
def test_corrupt_index(split, content):
    (split / INDEX).write_text(content)
    assert "not an index" in load_and_fail(split)


def test_files_that_are_links_to_blobs_as_in_the_hubs_cache(split, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in split.glob("*.safetensors"):
        os.rename(file, blobs / file.name)
        file.symlink_to(os.path.relpath(blobs / file.name, split))
    ShardTransformerDecoder.from_pretrained(split)


def test_weights_that_are_not_floating_point(single, edit_weights):
    edit_weights(
        single,
        lambda weights: weights.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
    )
    assert "model.norm.weight has dtype I8, which is not supported" in load_and_fail(single)
