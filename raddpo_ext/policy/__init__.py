"""Policy training: groups of rollouts, their rewards and advantages."""
