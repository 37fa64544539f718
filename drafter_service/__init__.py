"""The drafter: owns the draft model and guesses; nothing it says can change the output."""
