"""Which source guesses, alone and fused."""
