"""Training data and its evaluation: sessions packed and logged, public catalogues, negatives, metrics."""
