"""One rank of the FSDP2 runs that test_loss_fsdp.py starts; it saves what it saw to a file."""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torchtune import training
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2

from torchtune_fused import patch_model
from torchtune_fused.modules import CEWithChunkedOutputLoss

BUILDERS = {"tied": llama3_2, "untied": llama3}
# The kind of head, and whether head and embedding are sharded apart from the root.
CASES = [("tied", False), ("tied", True), ("untied", False), ("untied", True)]
STEPS = 3
LEARNING_RATE = 0.1


def build(head):
    torch.manual_seed(0)
    model = BUILDERS[head](
        vocab_size=97,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=32,
        intermediate_dim=48,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def batch(rank):
    """Tokens and labels of one rank; as many labels count on each."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(97, (2, 16), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[rank, :9] = -100
    return tokens, labels


def train(model, loss, batches, parameter):
    """The loss of each step and, in the end, each parameter, whole."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        value = sum(loss(model(tokens), labels) for tokens, labels in batches) / len(batches)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    return torch.stack(losses), {n: parameter(p).detach() for n, p in model.named_parameters()}


def train_sharded(head, apart, rank, world_size):
    model, loss = build(head), CEWithChunkedOutputLoss()
    patch_model(model)
    names = ["tok_embeddings", "output"] if apart else None
    training.shard_model(
        model,
        [partial(training.get_shard_conditions, names_to_match=names)],
        cpu_offload=False,
        reshard_after_forward=True,
        dp_mesh=init_device_mesh("cpu", (world_size,)),
    )
    model.set_num_output_chunks(loss.num_output_chunks)
    losses, weights = train(model, loss, [batch(rank)], lambda p: p.full_tensor())
    dist.all_reduce(losses)
    return losses / world_size, weights


def main(scratch, rank, world_size):
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world_size
    )
    results = {case: train_sharded(*case, rank, world_size) for case in CASES}
    torch.save(results, Path(scratch, f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    scratch, rank, world_size = sys.argv[1:]
    main(scratch, int(rank), int(world_size))
