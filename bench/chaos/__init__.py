"""Faults in a running stack, and what its clients see of them."""
