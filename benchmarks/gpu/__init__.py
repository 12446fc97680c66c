"""Speed on one GPU, after correctness: `python -m benchmarks.gpu`."""
