"""Generation with a KV cache: one prefill of the prompt, then one step a token."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from torchtune_fused.generation.decoding import CachedDecoder, check_caches, empty_caches
from torchtune_fused.generation.host_value import HostValue
from torchtune_fused.generation.prompt import Prompt, make_prompt
from torchtune_fused.generation.sampling import Sampler, is_int
from torchtune_fused.shard import ShardTransformerDecoder
from torchtune_fused.shard.pipeline import Pipeline


def generate(
    model: TransformerDecoder | Pipeline,
    prompt_tokens: Sequence | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    pad_id: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Continue prompts, and return them with what followed.

    KV caches are made for the call and removed after it; a model that already has them uses its
    own, emptied first. The model runs in the mode (train or eval) that it is in.

    Args:
        model (TransformerDecoder | Pipeline): Any torchtune decoder, patched or stock, a shard
            that is the whole model, or a :class:`~torchtune_fused.shard.pipeline.Pipeline`,
            whose ranks must all make the same call.
        prompt_tokens (Sequence | Tensor): One prompt as a list of ids or a tensor ``[s]``, or
            several, as a list of lists of any lengths or a tensor ``[b, s]``. Shorter lists are
            padded on the left; in a tensor, the leading run of ``pad_id`` in a row is padding.
        max_new_tokens (int): Tokens to generate after the longest prompt.
        temperature (float): Divides the logits; 0 takes the likeliest token (greedy).
        top_k (int | None): Sample among the ``top_k`` likeliest tokens.
        top_p (float | None): Sample among the likeliest tokens that together reach ``top_p``.
        stop_tokens (Sequence[int]): A row ends with the first of these that it generates;
            generation ends when all rows have.
        pad_id (int | None): Fills the padding, and rows after their stop token. None fills
            padding with 0 and repeats a row's stop token.
        seed (int | None): Makes sampling repeatable; without one, torch's default generator of
            the device is used.

    Returns:
        Tensor: int64 ``[b, prompt + new]`` on the model's device; ``new`` is less than
        ``max_new_tokens`` where stop tokens ended all rows earlier.

    Raises:
        TypeError: If the model or the prompt is of an unknown type.
        ValueError: If a prompt is empty, holds ids outside of the vocabulary or does not fit into
            the model with the new tokens, if an option is out of its range, if the model is not
            whole, or if KV caches of its own are too small. Nothing has been changed then.
    """
    prompt, steps = _start(
        model,
        prompt_tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        pad_id=pad_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return torch.cat([prompt.tokens, torch.stack(list(steps), 1)], 1)


def stream(
    model: TransformerDecoder | Pipeline,
    prompt_tokens: Sequence | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    pad_id: int | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Continue prompts, and yield each step's tokens as they come.

    Arguments and errors are those of :func:`generate`; errors are raised by the call itself, not
    by the first step. KV caches are made when the first step is asked for, and removed when the
    iterator ends or is closed. The ranks of a pipeline must all ask for the same steps.

    Yields:
        Tensor: int64 ``[b]``, the next token of every row.
    """
    _, steps = _start(
        model,
        prompt_tokens,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        pad_id=pad_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return steps


def _start(
    model: TransformerDecoder | Pipeline,
    prompt_tokens: Sequence | Tensor,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    pad_id: int | None,
    **sampling,
) -> tuple[Prompt, Iterator[Tensor]]:
    """Check everything, change nothing, and return the prompt and its steps."""
    decoder = _local_decoder(model)
    if not is_int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}")
    if not isinstance(stop_tokens, Collection) or not all(map(is_int, stop_tokens)):
        raise ValueError(f"stop_tokens must be a list of token ids, got {stop_tokens!r}")
    device = next(decoder.parameters()).device
    sampler = Sampler(device=device, **sampling)
    prompt = make_prompt(prompt_tokens, pad_id=pad_id, vocab_size=_vocab_size(model))
    batch_size, prompt_len = prompt.tokens.shape
    total = prompt_len + max_new_tokens
    if total > model.max_seq_len:
        raise ValueError(
            f"{prompt_len} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"max_seq_len of {model.max_seq_len}"
        )
    check_caches(decoder, batch_size, total)
    if isinstance(model, Pipeline):
        options = (max_new_tokens, list(stop_tokens), pad_id, sampling)
        model.require_same("generate() call", (prompt.tokens.tolist(), *options))
    prompt = prompt.to(device)
    return prompt, _steps(model, decoder, prompt, sampler, max_new_tokens, stop_tokens, pad_id)


@torch.no_grad()
def _steps(
    model: TransformerDecoder | Pipeline,
    decoder: TransformerDecoder,
    prompt: Prompt,
    sampler: Sampler,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    pad_id: int | None,
) -> Iterator[Tensor]:
    batch_size, prompt_len = prompt.tokens.shape
    stop = torch.tensor(list(stop_tokens), dtype=torch.int64, device=prompt.tokens.device)
    done = torch.zeros(batch_size, dtype=torch.bool, device=prompt.tokens.device)
    # A GPU gets its next step before the caller, or the check for stop tokens, looks at this one's
    # tokens: it never waits for the host, at the price of one step too many in the end.
    ahead = prompt.tokens.is_cuda
    tokens = None
    with empty_caches(decoder, batch_size, prompt_len + max_new_tokens) as cache_len:
        cached = CachedDecoder(model, prompt.padding, cache_len)
        logits = cached.prefill(prompt.tokens)
        for left in reversed(range(max_new_tokens)):
            chosen = _choose(model, sampler, logits, batch_size)
            if len(stop) and tokens is not None:
                chosen = torch.where(done, tokens if pad_id is None else pad_id, chosen)
            tokens = chosen
            if len(stop):
                done = done | torch.isin(tokens, stop)
                all_done = HostValue(done.all())
            if left and ahead:
                logits = cached.step(tokens)
            yield tokens
            if len(stop) and all_done.get():
                return
            if left and not ahead:
                logits = cached.step(tokens)


def _choose(
    model: TransformerDecoder | Pipeline, sampler: Sampler, logits: Tensor | None, batch_size: int
) -> Tensor:
    """The next tokens ``[b]``; in a pipeline the last rank, which has the logits, says which."""
    tokens = None if logits is None else sampler(logits)
    return model.share_tokens(tokens, batch_size) if isinstance(model, Pipeline) else tokens


def _local_decoder(model: TransformerDecoder | Pipeline) -> TransformerDecoder:
    """The layers in this process, which hold the KV caches."""
    if isinstance(model, Pipeline):
        return model.decoder
    if not isinstance(model, TransformerDecoder):
        raise TypeError(
            f"expected a torchtune TransformerDecoder or a Pipeline, got {type(model).__name__}"
        )
    if isinstance(model, ShardTransformerDecoder):
        shard = model.shard
        if not (shard.is_first_layer() and shard.is_last_layer()):
            raise ValueError(
                f"{shard} is not a whole model: generate with a Pipeline, one shard a process"
            )
    return model


def _vocab_size(model: TransformerDecoder | Pipeline) -> int:
    return model.vocab_size if isinstance(model, Pipeline) else model.tok_embeddings.num_embeddings
