"""The flags of `python -m dsv3_jax.evaluation`; those of infer.py mean the same. Importing this costs no jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Flags:
    """Evaluate a checkpoint: --checkpoint DIR --tasks TASK,TASK."""

    checkpoint: Path | None = None
    """Native checkpoint, run folder (its newest step), or Hugging Face folder; required."""
    tasks: str = ""
    """Comma-separated: perplexity:FILE, multiple_choice:FILE, exact_match:FILE, code:FILE, task files FILE.yaml, or
    humaneval, gsm8k, hellaswag, truthfulqa (data of the `eval` extra); required."""
    adapter: Path | None = None
    """LoRA pairs to evaluate with: a LoRA run (its newest step), an adapter of ours, or a PEFT folder."""
    quantize: str | None = None
    """Round attention and feed-forward weights while loading: int8, int8:GROUP, int4:GROUP, int4a:GROUP or fp8, with
    +act8 also activations. Checkpoints that are quantised already stay so without it."""
    out: Path | None = None
    """Results as JSON. Works in OUT.partial, from which a killed run goes on."""
    items: bool = False
    """Every item's record in the results too; what --against needs."""
    against: Path | None = None
    """Results of another model with --items: paired differences and how many decisions are alike."""
    limit: int | None = None
    """Only the first N items of each task."""
    shots: int | None = None
    """Examples before each prompt, instead of what a task file says."""
    chat: bool = False
    """Prompts are a user's turns in the checkpoint's chat format."""
    window: int | None = None
    """Tokens that perplexity reads in one go; by default the model's context."""
    max_new_tokens: int | None = None
    """Of an answer, instead of what a task says."""
    run_code: bool = False
    """Run programs that the model writes, in a sandbox; code tasks are refused without it."""
    samples: int = 1
    """Programs for each problem of a code task (pass@k)."""
    temperature: float = 0.0
    """Of programs; other tasks are greedy."""
    top_p: float = 1.0
    """Of programs: keep the likeliest tokens that together reach this probability."""
    code_seconds: float = 10.0
    """For one program and all its tests."""
    seed: int = 0
    """Of programs, and of which examples are shown."""
    batch_size: int = 16
    """Texts scored, or rows decoded, together."""
    page_size: int = 64
    """Tokens of a page of the engine's cache."""
    pages: int | None = None
    """Pages of the cache; by default what the rows can need, as far as memory allows."""
    speculative: int = 0
    """Tokens that the multi-token module drafts at a time when answers are decoded; 0: none."""
    mesh: str | None = None
    """Devices to run on, all that JAX sees: expert=8, or data=2,expert=4. By default one device."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; float32 on the CPU, bfloat16 on a GPU."""
    kernels: str = "auto"
    """Implementation of attention and the experts' products: auto, reference or mosaic, with exceptions."""
    force: bool = False
    """Replace existing results, and drop an OUT.partial of another run."""
