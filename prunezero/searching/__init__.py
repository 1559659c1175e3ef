"""Find criteria: propose, screen, measure, remember."""
