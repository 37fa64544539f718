"""Pages of docs/ that are made from result files."""
