"""Recipe of the draft for SmolLM2-135M-Instruct: `python -m models.recipe.smollm2`."""
