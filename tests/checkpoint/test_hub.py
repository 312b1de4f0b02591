"""Which files are asked of the Hub: its real client against a local stand-in for its API."""

import hashlib
import json
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from torchtune_fused import Shard, ShardTransformerDecoder
from torchtune_fused.checkpoint import HubError
from torchtune_fused.checkpoint.hub import fetch_checkpoint

COMMIT = hashlib.sha1(b"commit").hexdigest()
SIDE_FILES = ["config.json", "generation_config.json"]
INDEX = "model.safetensors.index.json"


class Hub(ThreadingHTTPServer):
    """The calls of the Hub's API that fetching files takes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos: dict[str, Path] = {}
        self.fetched: list[str] = []

    def serve(self, repo: str, folder: Path) -> None:
        self.repos[repo] = folder
        self.fetched.clear()


class HubHandler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        for repo, folder in self.server.repos.items():
            files = sorted(folder.iterdir())
            if path.startswith(f"/api/models/{repo}/revision/"):
                siblings = [{"rfilename": file.name} for file in files]
                return self._reply({"id": repo, "sha": COMMIT, "siblings": siblings})
            if path == f"/api/models/{repo}/tree/{COMMIT}":
                return self._reply([self._tree_entry(file) for file in files])
            if path.startswith(f"/{repo}/resolve/{COMMIT}/"):
                file = folder / path.rsplit("/", 1)[1]
                if self.command == "GET":
                    self.server.fetched.append(file.name)
                return self._reply(file.read_bytes(), ETag=f'"{etag(file)}"')
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _tree_entry(self, file: Path) -> dict:
        size = file.stat().st_size
        return {"type": "file", "path": file.name, "size": size, "oid": etag(file)}

    def _reply(self, content: object, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def fetch(hub, tmp_path_factory):
    """``fetch_checkpoint`` in a process whose Hub is ours: its client reads that at import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_HUB_OFFLINE", "0")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda *arguments: pool.submit(fetch_checkpoint, *arguments).result()


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_only_the_files_of_the_shards_tensors_are_fetched(split, hub, fetch):
    (split / "tokenizer.json").write_text("{}")
    (split / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    (split / "README.md").write_text("large pictures")
    hub.serve("someone/split", split)
    every = set(weight_map(split).values())
    of_layer_2 = {file for name, file in weight_map(split).items() if "layers.2." in name}
    assert of_layer_2 < every

    shard = Shard("llama", 2, 2, 4)
    folder = fetch("someone/split", shard)
    assert sorted(hub.fetched) == sorted([*SIDE_FILES, INDEX, "tokenizer.json", *of_layer_2])
    ours = ShardTransformerDecoder.from_pretrained(folder, shard).state_dict()
    local = ShardTransformerDecoder.from_pretrained(split, shard).state_dict()
    assert ours.keys() == local.keys()
    assert all(torch.equal(ours[name], local[name]) for name in local)

    hub.fetched.clear()
    fetch("someone/split")
    assert sorted(hub.fetched) == sorted(every - of_layer_2)
    hub.fetched.clear()
    fetch("someone/split")
    assert hub.fetched == []


def test_a_model_in_one_file(single, hub, fetch):
    hub.serve("someone/single", single)
    fetch("someone/single", Shard("llama", 3, 3))
    assert sorted(hub.fetched) == sorted([*SIDE_FILES, "model.safetensors"])


def test_the_last_shard_of_a_tied_model_fetches_the_embedding(tied, hub, fetch, tmp_path):
    model = ShardTransformerDecoder.from_pretrained(tied)
    model.save_pretrained(tmp_path / "files", max_shard_size="20KB")
    hub.serve("someone/tied", tmp_path / "files")
    fetch("someone/tied", Shard("llama", 3, 3))
    files = weight_map(tmp_path / "files")
    assert files["model.embed_tokens.weight"] in hub.fetched
    assert files["model.layers.1.mlp.up_proj.weight"] not in hub.fetched


def test_an_index_that_points_outside_is_refused_before_weights_are_fetched(
    split, hub, fetch, edit_index
):
    edit_index(split, lambda files: files.update({"model.norm.weight": "../x.safetensors"}))
    hub.serve("someone/malicious", split)
    with pytest.raises(ValueError, match=r"names the file '\.\./x\.safetensors'"):
        fetch("someone/malicious")
    assert sorted(hub.fetched) == sorted([*SIDE_FILES, INDEX])


def test_an_unknown_repository_is_one_clear_line(fetch):
    with pytest.raises(HubError, match=r"someone/else: not a local folder, and could not") as error:
        fetch("someone/else")
    assert "\n" not in str(error.value)
