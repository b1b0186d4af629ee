"""Prepared data: shards on disk, the order of examples, padded batches."""
