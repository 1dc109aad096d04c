"""Post-training of contrastive audio-text models (CLAP): a sense of order, and tests of it."""
