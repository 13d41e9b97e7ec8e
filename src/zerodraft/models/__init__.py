"""Getting a model: names and wheels, the cache directory, foreign formats, loading, tokenizers, padding, caches."""
