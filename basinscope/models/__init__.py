"""Finding things in a model: its logits, its vocabulary, its layers."""
