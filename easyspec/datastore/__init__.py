"""Files made from a corpus that guessers draft from: memory-mapped, checked when opened, never written again."""
