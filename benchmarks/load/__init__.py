"""The service under load and under faults."""
