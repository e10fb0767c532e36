"""From purchases of a real catalogue to an aligned model that retrieves."""
