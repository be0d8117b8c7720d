"""What the three problems share: errors, devices and seeds, checkpoints, run folders, pictures."""
