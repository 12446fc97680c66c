"""LoRA: which leaves get a pair, the tree of pairs, its files. The leaf itself is `dsv3_jax.model.adapted`."""

from dsv3_jax.finetune.lora import Lora, abstract_pairs, attach, init_pairs, merge, split
from dsv3_jax.finetune.targets import chosen_targets

__all__ = ["Lora", "abstract_pairs", "attach", "chosen_targets", "init_pairs", "merge", "split"]
