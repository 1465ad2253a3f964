"""Data pipeline, documents to batches: source, tokenizer, corpus, packing, loader, scoring."""
