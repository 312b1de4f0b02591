"""Measure torchtune-fused beside its peers, in one run on one machine.

Run it with::

    tune run torchtune_fused/recipes/benchmark.py --config smollm2_135m/benchmark
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torchtune import training
from torchtune.generation import generate as torchtune_generate
from torchtune.generation import generate_next_token
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from torchtune_fused import generate
from torchtune_fused.recipe_config import expand_path, parse
from torchtune_fused.recipe_model import device_and_dtype, load_model
from torchtune_fused.recipe_timing import race

Figures = dict[str, dict[str, float]]


@parse
def main(cfg: DictConfig) -> None:
    """Measure torchtune-fused beside its peers; key=value overrides any key of the config.

    checkpoint     folder of the model; or null, to build `model` with random weights
    device, dtype  auto, cuda or cpu; fp32, bf16 or fp16
    sections       any of decode, train, first_token
    rounds         each figure is the median of so many; the systems take turns, so that a machine
                   that slows down slows all of them
    compile        whether torchtune compiled is among the peers
    output         a JSON file to write, or null
    """
    device, dtype = device_and_dtype(cfg)
    figures: Figures = {}
    for name in cfg.sections:
        if name not in SECTIONS:
            raise ValueError(f"no section {name!r}: there are {', '.join(SECTIONS)}")
        figures |= SECTIONS[name](cfg, device, dtype)
    report(figures, cfg, device, dtype)


def decode(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> Figures:
    """Tokens per second of decoding after a prompt; the prefill is not counted."""
    batch, prompt_len, new = (cfg.decode[k] for k in ("batch_size", "prompt_tokens", "new_tokens"))
    stock, fused = (load_model(cfg, device, dtype, patch=patch).eval() for patch in (False, True))
    prompt = torch.randint(
        0, stock.tok_embeddings.num_embeddings, (batch, prompt_len), device=device
    )
    with device:
        for model in (stock, fused):
            model.setup_caches(batch, dtype, decoder_max_seq_len=prompt_len + new)
    sampling = {"temperature": cfg.decode.temperature, "top_k": cfg.decode.top_k}

    def torchtune(model, step=None):
        def run(tokens: int) -> None:
            model.reset_caches()
            torchtune_generate(
                model,
                prompt,
                max_generated_tokens=tokens,
                pad_id=-1,
                custom_generate_next_token=step,
                **sampling,
            )

        return run

    systems = {"torchtune": torchtune(stock)}
    if cfg.compile:
        compiled = torch.compile(generate_next_token, mode="max-autotune", fullgraph=True)
        systems["torchtune compiled"] = torchtune(stock, compiled)
    systems["torchtune, patched"] = torchtune(fused)
    systems["torchtune-fused"] = lambda tokens: generate(
        fused, prompt, max_new_tokens=tokens, **sampling
    )

    with torch.inference_mode():
        whole = race({w: lambda r=r: r(new) for w, r in systems.items()}, cfg.rounds, "decode")
        first = race({w: lambda r=r: r(1) for w, r in systems.items()}, cfg.rounds, "prefill")
    steps = {who: (whole[who] - first[who]) / (new - 1) for who in systems}
    work = f"decode {batch} x {new} after {prompt_len}"
    figures = {f"{work}, tok/s": {who: batch / s for who, s in steps.items()}}
    if device.type == "cuda":
        moved = step_bytes(fused, batch, prompt_len + new // 2)
        copy = copy_bandwidth(device)
        figures[f"{work}, of copy bandwidth"] = {w: moved / s / copy for w, s in steps.items()}
    return figures


def train(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> Figures:
    """Tokens per second of a full optimizer step."""
    batch, seq_len = cfg.train.batch_size, cfg.train.seq_len

    def stepper(*, patch: bool, compiled: bool = False) -> Callable[[], None]:
        model = load_model(cfg, device, dtype, patch=patch).train()
        if compiled:
            training.compile_model(model, verbose=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        vocab_size = model.tok_embeddings.num_embeddings
        tokens = torch.randint(0, vocab_size, (batch, seq_len), device=device)

        def step() -> None:
            logits = model(tokens)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    systems = {"torchtune": stepper(patch=False)}
    if cfg.compile:
        systems["torchtune compiled"] = stepper(patch=False, compiled=True)
    systems["torchtune-fused"] = stepper(patch=True)
    seconds = race(systems, cfg.rounds, "train")
    tokens = batch * seq_len
    return {f"train {batch} x {seq_len}, tok/s": {w: tokens / s for w, s in seconds.items()}}


def first_token(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> Figures:
    """From ``from_pretrained`` to the first token in a fresh process, imports aside."""
    prompt = f"torch.arange(8, device={str(device)!r})[None]"
    arguments = f"{expand_path(cfg.checkpoint)!r}, dtype={dtype}"
    programs = {
        "transformers": (
            "from transformers import AutoModelForCausalLM as Model",
            f"model = Model.from_pretrained({arguments}).to({str(device)!r})",
            f"model.generate({prompt}, max_new_tokens=1)",
        ),
        "torchtune-fused": (
            "from torchtune_fused import ShardTransformerDecoder as Model, generate",
            f"model = Model.from_pretrained({arguments}, device={str(device)!r})",
            f"generate(model, {prompt}, max_new_tokens=1)",
        ),
    }
    clock = "import torch, time; start = time.perf_counter()"
    times: dict[str, list[float]] = {who: [] for who in programs}
    for _ in tqdm(range(cfg.rounds), desc="first token", disable=None):
        for who, (imports, load, run) in programs.items():
            source = [imports, clock, load, run, "print(time.perf_counter() - start)"]
            command = [sys.executable, "-c", "\n".join(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            times[who].append(float(done.stdout.split()[-1]))
    return {"first tokens per second": {w: 1 / statistics.median(t) for w, t in times.items()}}


SECTIONS = {"decode": decode, "train": train, "first_token": first_token}


def step_bytes(model: TransformerDecoder, batch: int, length: int) -> int:
    """The fewest bytes a decoding step moves: each weight once, the filled part of the caches."""
    weights = sum(p.nbytes for p in model.parameters())
    if isinstance(model.output, torch.nn.Linear):  # of an untied embedding, only a row is read
        weights -= model.tok_embeddings.weight.nbytes
    cache = model.layers[0].attn.kv_cache.k_cache
    per_slot = 2 * batch * cache.shape[1] * cache.shape[3] * cache.element_size()
    return weights + len(model.layers) * per_slot * length


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy: what memory can do at best."""
    source = torch.empty(2**30, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(times)


def report(figures: Figures, cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Print each figure with its ratio to the first system of its row; write them as JSON."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    model = cfg.checkpoint or cfg.model["_component_"]
    print(f"\n{model}, {dtype}, {name}, torch {torch.__version__}")
    for work, systems in figures.items():
        base = next(iter(systems.values()))
        for who, value in systems.items():
            print(f"{work:44s} {who:20s} {value:11.3f} {value / base:6.2f}x")
    if cfg.output is not None:
        path = Path(expand_path(cfg.output))
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"model": str(model), "dtype": str(dtype), "device": name}
        path.write_text(json.dumps({**about, "torch": torch.__version__, "figures": figures}))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
