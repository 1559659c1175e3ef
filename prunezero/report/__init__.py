"""Keep what was found: MLflow, tables, pictures, exported pruners."""
