"""The verifier: owns the base model and decides every token."""
