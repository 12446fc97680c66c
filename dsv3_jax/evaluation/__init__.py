"""Evaluation of checkpoints on texts, questions and code (docs/evaluation.md)."""
