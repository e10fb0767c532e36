"""Log-probs of tokens, from logits or from hidden states and the head."""
