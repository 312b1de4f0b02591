"""Section packed: tokens per second of full fine-tuning on packed documents."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torchtune.modules.attention_utils import packed_block_causal_mask

from torchtune_fused.benchmarks.contest import Contest
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.benchmarks.trainers import shifted, torchtune_trainers
from torchtune_fused.flops import training_flops


def packed(setting: Setting) -> Iterator[Contest]:
    """One optimizer step on one pack of documents that do not see each other.

    The mask is made anew for each step, as torchtune's collation does for each batch: a BlockMask
    where FlexAttention runs, a dense one elsewhere.
    """
    for documents, seq_len in setting.shapes("packed"):
        setting.check_length(documents * seq_len)
        tokens = setting.random_tokens(1, documents * seq_len)
        positions = torch.arange(seq_len, device=setting.device).repeat(documents)[None]
        lengths = [torch.full((documents,), seq_len)]

        def inputs(tokens=tokens, positions=positions, lengths=lengths) -> dict[str, Tensor]:
            mask = packed_block_causal_mask(lengths)
            return {"tokens": tokens, "input_pos": positions, "mask": mask.to(setting.device)}

        labels = shifted(tokens.view(documents, seq_len)).view(1, -1)
        yield Contest(
            section="packed",
            work=f"train packed {documents} x {seq_len}",
            tokens=documents * seq_len,
            systems=list(torchtune_trainers(setting, inputs, labels).values()),
            flops=training_flops(setting.structure, documents, seq_len),
        )
