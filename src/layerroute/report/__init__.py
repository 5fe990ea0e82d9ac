"""Evidence on disk to a report that can be read: verdict first, then charts, tables, examples and provenance."""
