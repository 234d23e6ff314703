"""For benchmarks and tests: sizes of calls, made-up indices, FLOPs and bytes, compiling for absent H100s.

`traffic` alone is public, as what decoding reads is part of what is measured of a model.
"""
