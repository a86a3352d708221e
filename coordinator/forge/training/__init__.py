"""What is minimised and how: losses, objectives, recipes, on-policy feeds, rewards."""
