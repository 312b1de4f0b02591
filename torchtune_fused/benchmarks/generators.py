"""Systems that continue prompts."""

from collections.abc import Callable

import torch
from torchtune.generation import generate as torchtune_generate
from torchtune.generation import generate_next_token

from torchtune_fused.benchmarks.contest import COMPILED, OURS, TORCHTUNE, System
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.generation import generate


def generators(setting: Setting, batch_size: int, prompt_len: int, new: int) -> dict[str, System]:
    """Systems whose runs take a number of tokens, up to ``new``, to continue the prompts by."""
    setting.check_length(prompt_len + new)
    prompt = setting.random_tokens(batch_size, prompt_len)
    sampling = {"temperature": setting.cfg.temperature, "top_k": setting.cfg.top_k}

    def with_caches(*, patch: bool):
        model = setting.load_model(patch=patch).eval()
        with setting.device:
            model.setup_caches(batch_size, setting.dtype, decoder_max_seq_len=prompt_len + new)
        return model

    def torchtune(*, patch: bool = False, compiled: bool = False) -> Callable[[int], None]:
        model, step = with_caches(patch=patch), None
        if compiled:  # as torchtune's generation recipe does it
            step = torch.compile(generate_next_token, mode="max-autotune", fullgraph=True)

        @torch.inference_mode()
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

    def ours() -> Callable[[int], None]:
        model = with_caches(patch=True)
        return lambda tokens: generate(model, prompt, max_new_tokens=tokens, **sampling)

    systems = [
        System(TORCHTUNE, torchtune),
        System(COMPILED, lambda: torchtune(compiled=True)),
        System(f"{OURS}, in torchtune's generate", lambda: torchtune(patch=True)),
        System(OURS, ours),
    ]
    return {system.name: system for system in systems}
