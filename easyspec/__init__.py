"""What drafter, verifier and gateway share; knows no role."""

__version__ = "0.1.0"
