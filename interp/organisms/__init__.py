"""Small models trained from scratch in this repository: recipes, weights and cards."""
