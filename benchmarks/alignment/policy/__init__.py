"""What policy training does on the search shop: rollouts, support and objective, against the truth."""
