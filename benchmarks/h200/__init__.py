"""Compilation for one H200, or eight, on a machine without any: `python -m benchmarks.compile_h200`."""
