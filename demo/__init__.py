"""A generative recommender from data to retrieved items: ``python -m demo``."""
