"""One part of the product alone, in this process."""
