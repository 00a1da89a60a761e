"""A patch series for SGLang: decode context parallelism over a sharded KV cache."""
