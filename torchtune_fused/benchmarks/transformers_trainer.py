"""The peer that trains with transformers and Liger's kernels."""

from collections.abc import Callable

from torch import Tensor, nn
from torchtune import training
from torchtune.modules import TransformerDecoder

from torchtune_fused.benchmarks.contest import LIGER, TRANSFORMERS, System
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.benchmarks.trainers import fused_adamw


def transformers_trainers(setting: Setting, tokens: Tensor) -> dict[str, System]:
    """The Llama of transformers in the same sizes, with random weights, as it is and with Liger."""

    def build(*, liger: bool) -> Callable[[], Tensor]:
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            if setting.device.type != "cuda":
                raise RuntimeError("Liger's kernels need a GPU")
        from transformers import AutoModelForCausalLM

        llama = llama_config(setting.structure)
        with training.set_default_dtype(setting.dtype), setting.device:
            model = AutoModelForCausalLM.from_config(llama, attn_implementation="sdpa").train()
        if liger:
            apply_liger_kernel_to_llama(model=model)  # by default: all kernels, and its fused loss
        optimizer = fused_adamw(model)

        def step() -> Tensor:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    systems = [
        System(TRANSFORMERS, lambda: build(liger=False)),
        System(LIGER, lambda: build(liger=True)),
    ]
    return {system.name: system for system in systems}


def llama_config(model: TransformerDecoder):
    """The ``LlamaConfig`` of a decoder's sizes; RoPE's scaling, which costs nothing, aside.

    Raises:
        ValueError: If transformers' Llama is a different model.
    """
    from transformers import LlamaConfig

    attn, mlp = model.layers[0].attn, model.layers[0].mlp
    if not isinstance(mlp.activation, nn.SiLU):
        raise ValueError(f"transformers' Llama has no {type(mlp.activation).__name__}")
    if attn.q_norm is not None or attn.q_proj.bias is not None:
        raise ValueError("transformers' Llama has no norm of q and k and no biases of q, k and v")
    return LlamaConfig(
        vocab_size=model.tok_embeddings.num_embeddings,
        hidden_size=attn.embed_dim,
        intermediate_size=mlp.w1.out_features,
        num_hidden_layers=len(model.layers),
        num_attention_heads=attn.num_heads,
        num_key_value_heads=attn.num_kv_heads,
        head_dim=attn.head_dim,
        max_position_embeddings=model.max_seq_len,
        tie_word_embeddings=not isinstance(model.output, nn.Module),
        use_cache=False,
    )
