"""Sessions and their losses."""
