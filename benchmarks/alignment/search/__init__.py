"""The alignment experiment on a simulated search shop, where the truth is known."""
