"""From a backbone, data and a recipe to an adapter folder."""
