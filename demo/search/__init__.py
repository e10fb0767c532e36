"""A search shop: from its log to an aligned model that answers queries."""
