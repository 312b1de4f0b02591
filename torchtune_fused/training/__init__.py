"""Fine-tuning: the parts that the recipes are wired from."""
