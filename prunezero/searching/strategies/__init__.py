"""Strategies: who proposes candidates, and out of what; evolution and controls to compare with."""
