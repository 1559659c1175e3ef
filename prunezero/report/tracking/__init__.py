"""Tracking in MLflow: records, their store, what waits for it, and the saved views."""
