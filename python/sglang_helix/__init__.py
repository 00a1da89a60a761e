"""A patch series for SGLang: decode context parallelism over a sharded KV cache."""

__version__ = "0.1.0"
