"""The proof on a GPU: `python -m benchmarks.gpu --seconds 300`. docs/gpu.md explains it."""
