"""What `easyspec bench serve` is made of: workloads, load, windows, their summary and its plot."""
