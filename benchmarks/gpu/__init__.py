"""What one GPU does with the model: ceilings, attention, blocks, whole models, packing, fp8, sampling.

`python -m benchmarks.gpu`; see `__main__.py`.
"""
