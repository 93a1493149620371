"""Token shards: their format and streams, download, tokenizer, and the embedded corpus."""
