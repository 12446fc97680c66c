"""Products of e4m3 with e4m3: activations scaled per token and 128 columns, weights per 128 x 128 block.

The recipe is that of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2). `quantize` makes the codes;
`quantized_matmul.api` is how a model calls the products with a stored weight.
"""
