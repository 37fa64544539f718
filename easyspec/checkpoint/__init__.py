"""The files of a model, read without torch."""
