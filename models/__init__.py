"""The bundled model pair and the recipe that made it."""
