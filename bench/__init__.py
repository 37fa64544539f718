"""Measurements: `decode` runs them, `report` renders them; nothing here is needed to serve."""
