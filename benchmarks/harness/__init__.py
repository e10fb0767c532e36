"""What every benchmark uses: catalogues, timing, the run's environment, and the suite."""
