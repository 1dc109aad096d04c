"""Image tokenizers. Nothing has landed here yet."""
