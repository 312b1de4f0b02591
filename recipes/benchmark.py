"""Measure torchtune-fused beside its peers, in one run on one machine.

Run it with::

    tune run torchtune_fused/recipes/benchmark.py --config smollm2_135m/benchmark
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchtune_fused.benchmarks.contest import PEERS
from torchtune_fused.benchmarks.decode import decode
from torchtune_fused.benchmarks.environment import environment
from torchtune_fused.benchmarks.first_token import first_token
from torchtune_fused.benchmarks.lora import lora
from torchtune_fused.benchmarks.packed import packed
from torchtune_fused.benchmarks.plot import plot
from torchtune_fused.benchmarks.prefill import prefill
from torchtune_fused.benchmarks.roof import Roofline
from torchtune_fused.benchmarks.runner import hold
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.benchmarks.table import table
from torchtune_fused.benchmarks.train import train
from torchtune_fused.generation import Sampler
from torchtune_fused.recipe_config import check_count, check_seed, expand_path, parse

SECTIONS = {
    "decode": decode,
    "prefill": prefill,
    "first_token": first_token,
    "train": train,
    "packed": packed,
    "lora": lora,
}


@parse
def main(cfg: DictConfig) -> str | None:
    """Measure torchtune-fused beside its peers; key=value overrides any key of the config.

    Each figure is a median of rounds in which the systems take turns or, where they don't fit into
    the GPU's memory together, run one after another; the table says which. A peer that is not
    installed, runs out of memory or fails is skipped with the reason; if one of ours does, the exit
    status is 1. The roof is what this machine does at best: for decode, bytes at the speed of a
    long copy or sum, elsewhere FLOPs at that of a large GEMM. MFU is the model's FLOPs by the peak
    of the GPU's data sheet.

    checkpoint     folder of the model; or null, to build
    model          a component, with random weights
    device, dtype  auto, cuda or cpu; fp32, bf16 or fp16
    seed           of the random tokens, and weights
    sections       any of
                     decode       tokens after a prompt, the prompt itself not counted
                     prefill      a prompt, up to the first token
                     first_token  loading a checkpoint in a fresh process, up to the first token
                     train        a step of full fine-tuning
                     packed       the same on packed documents
                     lora         a step of LoRA fine-tuning, of lora.model
                   of which each has shapes, a list of [batch size, tokens]; packed [documents,
                   tokens of each]; and decode new_tokens
    peers          any of torchtune, torchtune compiled, transformers, transformers + Liger
    rounds         each figure is the median of so many
    temperature, top_k
                   how decode and prefill sample
    loss           a component: what torchtune-fused trains with; torchtune trains with its
                   CEWithChunkedOutputLoss, Liger with its fused one. The optimizer is AdamW:
                   torchtune-fused's own, and torch's fused one for the others
    output         a JSON file to write with every round's seconds and what they depend on, and
                   beside it a PNG plot (pip install 'torchtune-fused[plot]'); or null
    """
    check(cfg)
    setting = Setting.of(cfg)
    # All are described, and errors of the config found, before any weight is made or loaded.
    contests = [contest for name in cfg.sections for contest in SECTIONS[name](setting)]
    report = {
        "model": str(cfg.checkpoint or cfg.model["_component_"]),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "environment": environment(setting.device),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "contests": [],
    }
    print(report["model"], report["dtype"], report["environment"]["device"], sep=", ")
    roofline = Roofline(setting.device, setting.dtype)
    for contest in contests:
        outcome = hold(contest.among(cfg.peers), cfg.rounds, roofline).as_dict()
        print(f"\n{table(outcome)}", flush=True)
        report["contests"].append(outcome)
        if cfg.output is not None:  # after each, so that what fails later takes nothing with it
            write(report, Path(expand_path(cfg.output)))
    if cfg.output is not None and any(contest["systems"] for contest in report["contests"]):
        draw(report, Path(expand_path(cfg.output)))
    skipped = [(c["work"], *item) for c in report["contests"] for item in c["skipped"].items()]
    failed = [f"{work}, {who}: {why}" for work, who, why in skipped if who not in PEERS]
    return f"no figures of {'; '.join(failed)}" if failed else None


def check(cfg: DictConfig) -> None:
    """Raise a ValueError if the config asks for what there is not; make the output's folder."""
    check_count("rounds", cfg.rounds)
    check_seed(cfg.seed)
    Sampler(temperature=cfg.temperature, top_k=cfg.top_k)
    for key, known in (("sections", SECTIONS), ("peers", PEERS)):
        if not OmegaConf.is_list(cfg[key]):
            raise ValueError(f"{key} must be a list of {', '.join(known)}; got {cfg[key]!r}")
        if key == "sections" and not cfg.sections:
            raise ValueError("sections is empty: name one")
        if unknown := [name for name in cfg[key] if name not in known]:
            raise ValueError(f"{key}: there is no {unknown[0]!r}, only {', '.join(known)}")
    if cfg.output is not None:
        path = Path(expand_path(cfg.output))
        if path.suffix != ".json":
            raise ValueError(f"output must be a .json file, got {cfg.output!r}")
        path.parent.mkdir(parents=True, exist_ok=True)


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(report, indent=1))


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the report beside its JSON, if matplotlib is installed, and say what was written."""
    picture = path.with_suffix(".png")
    try:
        plot(report, picture)
    except ImportError:
        print(f"\nwritten to {path}; no plot: pip install 'torchtune-fused[plot]'")
    else:
        print(f"\nwritten to {path} and {picture}")


if __name__ == "__main__":
    main()
