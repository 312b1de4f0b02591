"""One rank of the pipelines that test_pipeline.py starts; it saves what it saw to a file."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from torchtune_fused import ShardTransformerDecoder, generate
from torchtune_fused.generation import stream
from torchtune_fused.shard.pipeline import Pipeline

PROMPTS = [[5, 17, 3, 88, 41], [9], [60, 61, 62, 63, 64, 65, 66]]
STEPS = 24
SAMPLING = {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "seed": 11}


def generations(model):
    """The calls whose tokens must not depend on the number of processes."""
    greedy = generate(model, PROMPTS, max_new_tokens=STEPS)
    stop = [greedy[0, 9].item()]
    return {
        "greedy": greedy,
        "sampled": generate(model, PROMPTS, max_new_tokens=STEPS, **SAMPLING),
        "streamed": torch.stack(list(stream(model, PROMPTS, max_new_tokens=STEPS, **SAMPLING)), 1),
        "stopped": generate(model, PROMPTS[0], max_new_tokens=STEPS, stop_tokens=stop, pad_id=0),
    }


def run(folder, rank, **options):
    pipeline = Pipeline.from_pretrained(folder, **options)
    tokens = torch.tensor([PROMPTS[2]], device=options["device"])
    with torch.no_grad():
        logits = pipeline(tokens)
    result = {
        **generations(pipeline),
        "layers": list(pipeline.decoder.shard.layers),
        "cached": pipeline.decoder.caches_are_setup(),
        "bitwise": logits,
        "errors": [],
    }
    if logits is not None:
        # In the same process, so that both run on as many threads.
        whole = ShardTransformerDecoder.from_pretrained(folder, **options)
        with torch.no_grad():
            result["bitwise"] = whole(tokens).equal(logits)
    for bad in ({"max_new_tokens": 500}, {"max_new_tokens": 4, "seed": rank}):
        try:
            generate(pipeline, PROMPTS, **bad)
        except ValueError as error:
            result["errors"].append(str(error))
    return result


def fail(folder, rank, **options):
    try:
        Pipeline.from_pretrained(folder, **options)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def main(rank, mode, folder, scratch, world_size, device, dtype):
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{scratch}/rendezvous",
        rank=rank,
        world_size=world_size,
    )
    options = {"device": torch.device(device), "dtype": getattr(torch, dtype)}
    result = {"run": run, "fail": fail}[mode](folder, rank, **options)
    torch.save(result, Path(scratch, f"{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    rank, mode, folder, scratch, world_size, device, dtype = sys.argv[1:]
    main(int(rank), mode, folder, scratch, int(world_size), device, dtype)
