"""What the real-model examples share: text, one process per engine, tables and result files."""
