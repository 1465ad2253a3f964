"""From documents to batches of tokens: source, tokenizer, corpus, packing, loader, scoring."""
