"""The pages and figures of docs/ that are written from results."""
