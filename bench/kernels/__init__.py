"""Passes over random weights, on CPU and GPU."""
