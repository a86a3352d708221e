"""Side-by-side measurements, one command each; results as JSON in results/."""
