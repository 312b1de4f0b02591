"""All that a config decides about a run, checked before any weight is read."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import Dataset
from torchtune.training.metric_logging import MetricLoggerInterface

from torchtune_fused.checkpoint.hub import fetch_side_files
from torchtune_fused.models import ModelConfig, load_model_config
from torchtune_fused.recipe_component import instantiate
from torchtune_fused.recipe_config import check_count, check_flags, check_seed, expand_path
from torchtune_fused.training.checkpoints import CheckpointFolder
from torchtune_fused.training.data import Schedule, build_dataset
from torchtune_fused.training.optimizers import check_optimizer
from torchtune_fused.training.processes import Processes

STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class Plan:
    """The parts of a run, which exist and fit together.

    Args:
        processes (Processes): Who runs it.
        model (ModelConfig): The model to train.
        dataset (Dataset): Its rows, tokenized.
        pad_id (int): Token that fills up short rows.
        schedule (Schedule): Which rows each step trains on.
        loss (nn.Module): The loss.
        logger (MetricLoggerInterface | None): Where metrics go; None on all ranks but the first.
        checkpoints (CheckpointFolder): Where checkpoints go.
        facts (Mapping[str, Any]): What must be the same when the run is resumed.
        resumed (Path | None): The checkpoint to continue from.
        state (Mapping[str, Any] | None): What it says of the optimizer.
        first_step (int): Steps done by then.
    """

    processes: Processes
    model: ModelConfig
    dataset: Dataset
    pad_id: int
    schedule: Schedule
    loss: nn.Module
    logger: MetricLoggerInterface | None
    checkpoints: CheckpointFolder
    facts: Mapping[str, Any]
    resumed: Path | None
    state: Mapping[str, Any] | None
    first_step: int


def make_plan(cfg: DictConfig, processes: Processes, dtype: torch.dtype, **facts: Any) -> Plan:
    """Build the parts of a run that need no weights, and find out where to continue.

    Args:
        cfg (DictConfig): The config of a recipe.
        processes (Processes): Who runs it.
        dtype (torch.dtype): Dtype of the weights.
        **facts (Any): More that must be the same when the run is resumed, as plain values.

    Returns:
        Plan: the parts.

    Raises:
        ValueError: If a value is out of range, parts don't fit together, or the folder holds the
            checkpoints of a run that this one does not continue.
        FileNotFoundError: If the model or a file of the dataset is absent.
        OSError: If checkpoints can't be written to the folder.
        InstantiationError: If there is no such component.
    """
    _check_values(cfg, processes, dtype)
    check_optimizer(cfg.optimizer, cfg.lr_scheduler)
    cfg.output_dir = expand_path(cfg.output_dir)  # for loggers, which don't
    model = load_model_config(fetch_side_files(expand_path(cfg.checkpoint)))
    checkpoints = CheckpointFolder(Path(cfg.output_dir), cfg.keep_last_n_checkpoints)
    first_step, resumed = checkpoints.newest() or (0, None)
    if resumed is not None and not cfg.resume:
        raise ValueError(
            f"{resumed} is a checkpoint of an earlier run: continue it by resume=true, or choose "
            "another output_dir"
        )
    loss = instantiate("loss", cfg.loss, having=("ignore_index",))
    dataset, pad_id = _read_data(cfg, model)
    schedule = Schedule(
        rows=len(dataset),
        batch_size=cfg.batch_size,
        accumulation=cfg.gradient_accumulation_steps,
        processes=processes.count,
        epochs=cfg.epochs,
        max_steps_per_epoch=cfg.max_steps_per_epoch,
        seed=cfg.seed,
        shuffle=cfg.shuffle,
    )
    facts = {
        **facts,
        "model": _identity(model),
        "optimizer": OmegaConf.to_container(cfg.optimizer, resolve=True),
        "lr_scheduler": cfg.lr_scheduler and OmegaConf.to_container(cfg.lr_scheduler, resolve=True),
        "dtype": str(dtype),
        "seed": cfg.seed,
        "shuffle": cfg.shuffle,
        "rows": schedule.rows,
        "rows_per_step": schedule.rows_per_step,
        "steps_per_epoch": schedule.steps_per_epoch,
    }
    state = None if resumed is None else _read_state(resumed, facts)
    checkpoints.check()
    logger = None
    if cfg.metric_logger is not None and processes.is_first:
        methods = ("log_config", "log_dict", "close")
        logger = instantiate("metric_logger", cfg.metric_logger, having=methods)
    return Plan(
        processes=processes,
        model=model,
        dataset=dataset,
        pad_id=pad_id,
        schedule=schedule,
        loss=loss,
        logger=logger,
        checkpoints=checkpoints,
        facts=facts,
        resumed=resumed,
        state=state,
        first_step=first_step,
    )


def _check_values(cfg: DictConfig, processes: Processes, dtype: torch.dtype) -> None:
    for key in ("checkpoint", "output_dir"):
        if not (isinstance(cfg[key], str) and cfg[key]):
            raise ValueError(f"{key} must be a path, got {cfg[key]!r}")
    flags = ("patch", "compile", "shuffle", "resume", "optimizer_in_bwd")
    check_flags(cfg, *flags, "enable_activation_checkpointing", "enable_activation_offloading")
    positive = ("batch_size", "gradient_accumulation_steps", "epochs", "keep_last_n_checkpoints")
    optional = ("max_steps_per_epoch", "save_every_n_steps")
    for key in (*positive, *optional, "log_every_n_steps"):
        check_count(key, cfg[key], optional=key in optional)
    check_seed(cfg.seed)
    norm = cfg.clip_grad_norm
    if norm is not None and not (type(norm) in (int, float) and norm > 0):
        raise ValueError(f"clip_grad_norm must be a number above 0 or null, got {norm!r}")
    if dtype == torch.float16:
        raise ValueError("dtype=fp16: gradients would underflow without scaling; use bf16 or fp32")
    if cfg.optimizer_in_bwd:
        for key, off in (("gradient_accumulation_steps", 1), ("clip_grad_norm", None)):
            if cfg[key] != off:
                raise ValueError(
                    f"optimizer_in_bwd frees each gradient at once, which {key}={cfg[key]} needs: "
                    "turn one of them off"
                )
    if cfg.enable_activation_offloading:
        if processes.device.type != "cuda":
            raise ValueError("enable_activation_offloading moves activations off a GPU: use one")
        if not cfg.enable_activation_checkpointing:
            raise ValueError(
                "enable_activation_offloading needs enable_activation_checkpointing: what it "
                "offloads are the inputs of layers"
            )


def _identity(model: ModelConfig) -> dict[str, Any]:
    """What tells a model from others, as plain values."""
    sizes = {field.name: getattr(model, field.name) for field in fields(model) if field.compare}
    return {"name": model.model_id, **sizes}


def _read_data(cfg: DictConfig, model: ModelConfig) -> tuple[Dataset, int]:
    """The dataset, of which the first row has been seen, and the token that fills up rows."""
    tokenizer = instantiate("tokenizer", cfg.tokenizer, having=("pad_id",))
    length = getattr(tokenizer, "max_seq_len", None)
    check_count("tokenizer.max_seq_len", length, optional=True)
    if length is not None and length > model.max_seq_len:
        raise ValueError(
            f"tokenizer.max_seq_len is {length}, but the model's is {model.max_seq_len}"
        )
    try:
        dataset = build_dataset(cfg.dataset, tokenizer)
        largest = max(dataset[0]["tokens"]) if len(dataset) else 0
    except KeyError as error:
        raise ValueError(f"dataset: its rows have no {error}") from error
    except StopIteration as error:
        raise ValueError("dataset: a file of it is empty") from error
    except (TypeError, AttributeError, DatasetsError) as error:
        raise ValueError(f"dataset: {error}{_cause(error)}") from error
    if largest >= model.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, but the model knows {model.vocab_size}: they do "
            "not belong together"
        )
    return dataset, tokenizer.pad_id


def _cause(error: Exception) -> str:
    return f": {error.__cause__}" if error.__cause__ is not None else ""


def _read_state(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        before = state["facts"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not the state of a run: {error}") from error
    facts, before = _flat(facts), _flat(before)
    for key in {**facts, **before}:
        if facts.get(key) != before.get(key):
            raise ValueError(
                f"{folder} can't be resumed: its {key} was {before.get(key)}, and is "
                f"{facts.get(key)} now; use the config it was made with, or another output_dir"
            )
    return state


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Facts within facts under names with dots, such as ``optimizer.lr``."""
    flat = {}
    for key, value in facts.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
