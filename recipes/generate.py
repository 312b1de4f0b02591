"""Generate text, on one device or with the model cut over several processes.

Run it with::

    tune run torchtune_fused/recipes/generate.py --config smollm2_135m/generate prompt="Hello"

and with ``--nproc_per_node 2`` before the recipe for half of the model in each of two processes.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune.data import Message

from torchtune_fused import ShardTransformerDecoder
from torchtune_fused.checkpoint.hub import fetch_side_files
from torchtune_fused.generation import Sampler, TextStream, stream
from torchtune_fused.models import load_model_config
from torchtune_fused.recipe_component import instantiate
from torchtune_fused.recipe_config import check_flags, expand_path, parse
from torchtune_fused.recipe_memory import peak_memory
from torchtune_fused.recipe_model import device_and_dtype
from torchtune_fused.shard.pipeline import Pipeline


@parse
def main(cfg: DictConfig) -> None:
    """Generate text with the model and prompt of a config; key=value overrides any of its keys.

    checkpoint      folder of the model, or a repository of the Hugging Face Hub
    tokenizer       component with encode, decode, tokenize_messages, stop_tokens and pad_id
    device, dtype   auto, cuda or cpu; fp32, bf16 or fp16
    patch           whether to swap in the fused modules
    prompt          what to answer; one of the next three, if set, takes its place
    prompts         a list of prompts, answered as one batch
    prompt_file     a text file with one prompt a line, answered as one batch
    messages        a conversation to answer: a list of {role, content}
    chat            whether prompts are put into the model's chat template
    system          a system message before each conversation
    max_new_tokens, temperature, top_k, top_p, seed
                    as of torchtune_fused.generate; temperature 0 is greedy
    """
    check_flags(cfg, "patch", "chat")
    cfg.checkpoint = expand_path(cfg.checkpoint)
    device, dtype = device_and_dtype(cfg)
    load_model_config(fetch_side_files(cfg.checkpoint))  # a folder of no model is called so
    methods = ("encode", "decode", "tokenize_messages", "stop_tokens", "pad_id")
    tokenizer = instantiate("tokenizer", cfg.tokenizer, having=methods)
    prompts = read_prompts(cfg)
    prompt_tokens = [tokenize(prompt, tokenizer, cfg) for prompt in prompts]
    sampling = {key: cfg[key] for key in ("temperature", "top_k", "top_p", "seed")}
    Sampler(**sampling)  # bad values need not wait for the weights

    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    load = ShardTransformerDecoder.from_pretrained
    if processes > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        load = Pipeline.from_pretrained
    model = load(cfg.checkpoint, dtype=dtype, device=device, patch=cfg.patch)
    steps = stream(
        model,
        prompt_tokens,
        max_new_tokens=cfg.max_new_tokens,
        stop_tokens=tokenizer.stop_tokens,
        pad_id=tokenizer.pad_id,
        **sampling,
    )
    # Every rank has all tokens; the first writes them.
    with contextlib.redirect_stdout(None) if rank else contextlib.nullcontext():
        answers, seconds = follow(steps, tokenizer, write=len(prompts) == 1)
        if len(prompts) > 1:
            write_batch(prompts, answers, tokenizer)
        write_speed(prompt_tokens, answers, seconds, peak_memory(device, processes))
    if processes > 1:
        dist.destroy_process_group()


def read_prompts(cfg: DictConfig) -> list[str] | list[list[dict[str, str]]]:
    """Texts to continue or to answer, or one conversation as a list of messages."""
    instead = [key for key in ("prompts", "prompt_file", "messages") if cfg[key] is not None]
    if len(instead) > 1:
        raise ValueError(f"{' and '.join(instead)} are set: keep one, set the others to null")
    source = instead[0] if instead else "prompt"
    value = cfg[source]
    if source == "prompt":
        value = [value]
    elif source == "prompt_file":
        lines = Path(expand_path(value)).read_text(encoding="utf-8").splitlines()
        value = [line for line in lines if line.strip()]
    elif not OmegaConf.is_list(value):
        raise ValueError(f"{source} must be a list, got {value!r}")
    if source == "messages":
        return [OmegaConf.to_container(value)]
    if not value or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{source} must hold text that is not empty")
    return list(value)


def tokenize(prompt: str | list[dict[str, str]], tokenizer: Any, cfg: DictConfig) -> list[int]:
    """Token ids of a prompt, up to where the answer begins."""
    if isinstance(prompt, str) and not cfg.chat:
        add_bos = getattr(tokenizer, "adds_bos", True)
        return tokenizer.encode(prompt, add_bos=add_bos, add_eos=False)
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if cfg.system is not None:
        chat = [{"role": "system", "content": cfg.system}, *chat]
    try:
        messages = [Message.from_dict({**turn, "masked": True}) for turn in chat]
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"messages must be a list of {{role, content}}: {error!r}") from error
    if not messages or messages[-1].role != "assistant":
        # How torchtune's tokenizers are asked for the header of an answer.
        messages.append(Message("assistant", "", masked=True))
    return tokenizer.tokenize_messages(messages, add_end_tokens=False)[0]


def follow(
    steps: Iterator[Tensor], tokenizer: Any, *, write: bool
) -> tuple[list[list[int]], tuple[float, float]]:
    """Collect each row's tokens up to its stop token; write the text of the only row meanwhile.

    Returns the answers, and the seconds to the first token and from there to the last.
    """
    text, stop = TextStream(tokenizer.decode), set(tokenizer.stop_tokens)
    answers: list[list[int]] = []
    start = first = time.perf_counter()
    for tokens in steps:
        row_tokens = tokens.tolist()
        if not answers:
            first = time.perf_counter()
            answers = [[] for _ in row_tokens]
        for answer, token in zip(answers, row_tokens, strict=True):
            if not (answer and answer[-1] in stop):
                answer.append(token)
        if write and row_tokens[0] not in stop:
            print(text.put(row_tokens[0]), end="", flush=True)
    seconds = first - start, time.perf_counter() - first
    if write:
        print(text.end())
    return answers, seconds


def write_batch(prompts: list[str], answers: list[list[int]], tokenizer: Any) -> None:
    """Write each prompt and its answer."""
    stop = set(tokenizer.stop_tokens)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        text = tokenizer.decode([token for token in answer if token not in stop])
        print(f"[{i}/{len(prompts)}] {prompt}\n{text}\n")


def write_speed(
    prompts: list[list[int]],
    answers: list[list[int]],
    seconds: tuple[float, float],
    peak_bytes: int,
) -> None:
    """Write the last line. Each row's first token comes with the prompt, the others by decoding."""
    prompt_tokens = sum(map(len, prompts))
    decoded = sum(map(len, answers)) - len(answers)
    prompt_speed, decode_speed = prompt_tokens / seconds[0], decoded / seconds[1]
    print(
        f"prompt: {prompt_tokens} tokens, {prompt_speed:.1f} tokens/s | "
        f"decode: {decoded} tokens, {decode_speed:.1f} tokens/s | "
        f"peak memory: {peak_bytes / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
