"""Text generation: the engine, sampling, and tokenizers."""

from torchtune_fused.generation.engine import generate, stream
from torchtune_fused.generation.sampling import Sampler
from torchtune_fused.generation.text_stream import TextStream
from torchtune_fused.generation.tokenizer import HFTokenizer

__all__ = ["HFTokenizer", "Sampler", "TextStream", "generate", "stream"]
