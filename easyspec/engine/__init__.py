"""What the engines of drafter and verifier have in common."""
