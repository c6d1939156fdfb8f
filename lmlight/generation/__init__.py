"""Text generation with any `Net`: sampling, decoding and text streams."""

from lmlight.generation.decoder import Decoder, GenerationStep, generate, generate_ids
from lmlight.generation.sampling import Sampling, apply_repetition_penalty, filter_logits, sample_one_token
from lmlight.generation.text import TextStream, escape_control_characters, generate_text, start_streams

__all__ = [
    "Decoder",
    "GenerationStep",
    "Sampling",
    "TextStream",
    "apply_repetition_penalty",
    "escape_control_characters",
    "filter_logits",
    "generate",
    "generate_ids",
    "generate_text",
    "sample_one_token",
    "start_streams",
]
