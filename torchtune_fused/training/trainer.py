"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training, utils
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from tqdm import tqdm

from torchtune_fused.recipe_memory import peak_memory
from torchtune_fused.surgery import patch_model
from torchtune_fused.training.data import Batch, read_steps
from torchtune_fused.training.optimizers import Optimizers
from torchtune_fused.training.plan import STATE_FILE, Plan
from torchtune_fused.training.speedometer import Speedometer

_say = partial(utils.log_rank_zero, utils.get_logger("INFO"))


class Trainer:
    """Trains a model as a config says, from where its plan says.

    Args:
        cfg (DictConfig): The config.
        plan (Plan): Its parts.
        model (TransformerDecoder): The model, with the weights to start from. With several
            processes, on the CPU, the same on each.
        write (Callable[[Mapping[str, Tensor], Path], None]): Writes a state dict, whole and on the
            CPU, to a checkpoint's folder.
    """

    def __init__(
        self,
        cfg: DictConfig,
        plan: Plan,
        model: TransformerDecoder,
        write: Callable[[Mapping[str, Tensor], Path], None],
    ) -> None:
        self._cfg = cfg
        self._plan = plan
        self._model = model.train()
        self._write = write
        self._speed = Speedometer(model, plan.processes)
        if cfg.patch:
            _say(str(patch_model(model)))
        if cfg.compile:
            training.compile_model(model, verbose=False)
        if cfg.enable_activation_checkpointing:
            training.set_activation_checkpointing(model, {TransformerSelfAttentionLayer})
        if plan.processes.count > 1:
            plan.processes.shard(model)
        self._offloading = training.get_act_offloading_ctx_manager(
            model, cfg.enable_activation_offloading
        )
        self._loss = plan.loss
        if cfg.compile:
            self._loss = training.compile_loss(plan.loss, verbose=False)
        if hasattr(plan.loss, "set_model_output"):  # as in torchtune's main branch
            plan.loss.set_model_output(model)
        elif hasattr(plan.loss, "num_output_chunks"):
            model.set_num_output_chunks(plan.loss.num_output_chunks)
        self._optimizers = Optimizers(
            model,
            cfg.optimizer,
            cfg.lr_scheduler,
            steps=plan.schedule.steps,
            in_backward=cfg.optimizer_in_bwd,
        )
        if plan.resumed is not None:
            self._optimizers.load_state_dict(plan.state)

    def run(self) -> None:
        """Train to the last step; write checkpoints on the way and at the end."""
        cfg, plan, processes = self._cfg, self._plan, self._plan.processes
        if plan.logger is not None:
            plan.logger.log_config(cfg)
        first, last = plan.first_step, plan.schedule.steps
        if plan.resumed is not None:
            _say(f"going on from {plan.resumed}: {max(last - first, 0)} of {last} steps left")
        elif cfg.resume:
            _say(f"no checkpoint to go on from in {cfg.output_dir}: starting at the first step")
        steps = read_steps(
            plan.dataset,
            plan.schedule,
            rank=processes.rank,
            first_step=first,
            pad_id=plan.pad_id,
            ignore_index=plan.loss.ignore_index,
        )
        batches = next(steps, None)
        self._speed.restart()
        # None: no bar where the output is not a terminal.
        bar = tqdm(initial=first, total=last, disable=None if processes.is_first else True)
        for done in range(first + 1, last + 1):
            # Dropout follows from the step and the rank, so there is no random state to save.
            torch.manual_seed(cfg.seed + 2**32 * (done * processes.count + processes.rank))
            metrics = {"loss": self._run_backward(batches), "lr": self._optimizers.lr}
            if cfg.clip_grad_norm is not None:
                metrics["grad_norm"] = self._optimizers.clip(cfg.clip_grad_norm)
            self._optimizers.step()
            batches = next(steps, None)  # tokenized while a GPU is busy
            processes.sum(metrics["loss"])
            bar.set_description(f"loss {metrics['loss']:.4f}", refresh=False)
            bar.update()
            if done % cfg.log_every_n_steps == 0 or done == last:
                self._log(metrics, done)
            if done == last or (cfg.save_every_n_steps and done % cfg.save_every_n_steps == 0):
                self._save(done)
        bar.close()
        if plan.logger is not None:
            plan.logger.close()

    def _run_backward(self, batches: list[Batch]) -> Tensor:
        """Gradients of the mean loss over all labels of a step; returns this rank's share of it."""
        processes, ignored = self._plan.processes, self._plan.loss.ignore_index
        counts = [int((batch["labels"] != ignored).sum()) for batch in batches]
        # Known before the first backward pass, so that no gradient has to be scaled after the last.
        labels = int(processes.sum(torch.tensor(sum(counts))))
        if labels == 0:
            _say("a step without labels: are prompts longer than tokenizer.max_seq_len?")
        share = torch.zeros((), device=processes.device)
        for batch, count in zip(batches, counts, strict=True):
            self._speed.count(batch["tokens"])
            if count == 0:
                # The mean over no label is NaN; one that counts for nothing takes their place.
                batch["labels"][0, 0] = 0
            utils.batch_to_device(batch, processes.device)
            targets = batch.pop("labels")
            with self._offloading:
                output = self._model(**batch)
            if isinstance(output, Tensor):
                output, targets = output.flatten(0, 1), targets.flatten()
            loss = self._loss(output, targets) * (count / max(labels, 1))
            del output  # or it is there while the backward pass needs the most
            # FSDP takes the mean of the ranks' gradients, where their sum is wanted.
            (loss * processes.count).backward()
            share += loss.detach()
        return share

    def _log(self, metrics: Mapping[str, float | Tensor], done: int) -> None:
        device, logger = self._plan.processes.device, self._plan.logger
        peak = peak_memory(device, self._plan.processes.count)
        metrics = {**metrics, **self._speed.read(), "peak_memory_gib": peak / 2**30}
        if logger is not None:
            logger.log_dict({name: float(value) for name, value in metrics.items()}, step=done)

    def _save(self, done: int) -> None:
        """Write a checkpoint; all ranks take part."""
        plan = self._plan
        weights = plan.processes.gather(self._model.state_dict())
        state = {"facts": dict(plan.facts), **self._optimizers.state_dict()}
        if plan.processes.is_first:
            with plan.checkpoints.writing(done) as folder:
                self._write(weights, folder)
                torch.save(state, folder / STATE_FILE)
            _say(f"checkpoint written to {plan.checkpoints.newest()[1]}")
        plan.processes.wait()
        self._speed.restart()
