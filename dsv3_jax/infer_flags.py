"""The flags of infer.py. Importing this costs no jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

TEXT = PrimitiveConstructorSpec[str | None](  # tyro alone would read the text "None" as no text
    nargs=1,
    metavar="TEXT",
    instance_from_str=lambda arguments: arguments[0],
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [str(value)],
)


def _bias(arguments: list[str]) -> tuple[int, float]:
    index, _, bias = arguments[0].partition("=")
    return int(index), float(bias)


BIAS = PrimitiveConstructorSpec[tuple[int, float]](
    nargs=1,
    metavar="ID=BIAS",
    instance_from_str=_bias,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [f"{value[0]}={value[1]}"],
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Decode prompts: --input FILE --output FILE, or --prompt TEXT."""

    checkpoint: Path | None = None
    """Native checkpoint, run folder (its newest step), or Hugging Face folder; required."""
    adapter: Path | None = None
    """LoRA pairs to decode with: a LoRA run (its newest step), an adapter of ours, or a PEFT folder."""
    input: Path | None = None
    """.txt (a prompt a line), or .jsonl with prompt, prompt_token_ids or messages, optional id and the options
    below as keys of a line."""
    output: Path | None = None
    """JSON lines in input order. Works in OUTPUT.partial, from which a killed job goes on."""
    prompt: Annotated[str | None, TEXT] = None
    """Decode this text and stream the answer to the terminal."""
    max_new_tokens: int = 256
    """New tokens at most; 0 only scores (--prompt-logprobs)."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability."""
    top_k: int = 0
    """Keep the K likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the likeliest one's probability."""
    seed: int = 0
    """Same seed, prompt, batch size and type: same text."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End before this string; may be given several times."""
    logprobs: int | None = None
    """Log-probabilities of new tokens, and of the K likeliest ids (K may be 0)."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    batch_size: int | None = None
    """Rows decoded together; 16 for a file, 1 for --prompt."""
    page_size: int = 64
    """Tokens of a page of the cache."""
    pages: int | None = None
    """Pages of the cache; by default what the rows can need, as far as memory allows."""
    speculative: int = 0
    """Tokens that the multi-token module drafts at a time; 0: none. The text is the same, sooner."""
    mesh: str | None = None
    """Devices to decode on, all that JAX sees: expert=8, or data=2,expert=4. Experts are cut over `expert`, rows and
    pages over both; the batch size is rounded up to a multiple of the devices. By default one device."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; float32 on the CPU, bfloat16 on a GPU."""
    quantize: str | None = None
    """Round attention and feed-forward weights while loading: int8, int8:GROUP, int4:GROUP, int4a:GROUP (with zero
    points) or fp8; fp8+act8 and int8+act8 also round the activations of those products (an FP8 checkpoint keeps its
    codes). Checkpoints that are quantised already stay so without it."""
    cache_dtype: Literal["float32", "bfloat16", "int8", "fp8"] | None = None
    """Storage of the cache; by default the compute type, on the CPU float32. int8 and fp8: codes, with scales."""
    keep_kv_b_codes: bool = False
    """Dequantise a quantised kv_b in every call, not once when it is loaded: fewer bytes between calls."""
    kernels: str = "auto"
    """Implementation of attention and the experts' products: auto, reference or mosaic, with exceptions such as
    mosaic,grouped_matmul=reference."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence id."""
    presence_penalty: float = 0.0
    """Taken from the logits of ids that were produced."""
    frequency_penalty: float = 0.0
    """The same for each time that an id was produced."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of ids in the prompt or produced."""
    logit_bias: Annotated[tuple[Annotated[tuple[int, float], BIAS], ...], tyro.conf.UseAppendAction] = ()
    """Added to the logit of a token id; may be given several times."""
    stop_token_ids: tuple[int, ...] = ()
    """Further ids that end the text."""
    min_tokens: int = 0
    """New tokens before which no id ends the text."""
    force: bool = False
    """Replace an existing output, and drop an OUTPUT.partial of another job."""
