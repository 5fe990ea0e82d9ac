"""Steps: the row format, its sources, and the way from rows to batches; see docs/data.md."""
