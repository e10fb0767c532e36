"""A catalogue: its vocabulary, the files that hold its SIDs, the index over them, item ids, and versions in a store."""
