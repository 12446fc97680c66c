"""Quantised weights: formats, the leaf that the model computes with, and what is quantised how."""
